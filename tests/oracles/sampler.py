"""The oracle of the sampler: row by row, on the host. Tokens, and their log-probabilities.

Rows of a step have settings of their own; those that share a setting's use are treated together,
without a loop over rows except for penalties and log-probabilities. The order is vLLM's and
transformers': repetition penalty, frequency and presence penalty, temperature, top-k, top-p, min-p.
A row's token depends on its logits, its settings and its position only. Not here: stops and the end
of sequence, which the head decides.

Shape suffixes: S rows to sample, G rows of a group, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mpipipe.errors import NumericsError
from mpipipe.stage.device_sampler import keep_min_p, running_sums
from mpipipe.stage.random_draws import draw_token_ids, uniforms
from mpipipe.types import SamplingParams, TokenLogprobs
from tests.oracles.random_draws import keys_tensor

__all__ = [
    "SampleRow",
    "Sampled",
    "filtered_scores",
    "keep_top_k",
    "keep_top_p",
    "penalise_counts",
    "penalise_repetition",
    "sample",
]

_MINUS_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the sampler must know of one sequence."""

    sampling: SamplingParams
    position: int  # index of the token to draw: how many tokens come before it
    seen_ids: Sequence[int] | torch.Tensor = ()  # prompt and completion: a repetition penalty's
    output_ids: Sequence[int] | torch.Tensor = ()  # completion: the other penalties'

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, with no draw."""
        return self.sampling.is_greedy

    @property
    def is_penalised(self) -> bool:
        """Whether a penalty changes its logits."""
        sampling = self.sampling
        penalties = (sampling.frequency_penalty, sampling.presence_penalty)
        return sampling.repetition_penalty != 1 or any(penalties)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome of one step, in the order of its rows."""

    token_ids_S: torch.Tensor  # int64
    logprobs: tuple[TokenLogprobs | None, ...] | None  # None: no row asked


def sample(logits_SV: torch.Tensor, rows: Sequence[SampleRow]) -> Sampled:
    """Choose one token per row of float32 `logits_SV`, which is not modified.

    Log-probabilities are those of the model's raw distribution, before any setting is applied.

    Raises:
        NumericsError: a row has NaN or +inf, or nothing finite.
    """
    assert logits_SV.shape[0] == len(rows), (logits_SV.shape, len(rows))
    if not rows:
        empty_S = torch.empty(0, dtype=torch.int64, device=logits_SV.device)
        return Sampled(token_ids_S=empty_S, logprobs=None)
    best_S = logits_SV.argmax(dim=-1)  # the first of equals; a NaN counts as the largest
    _check_finite(logits_SV.gather(-1, best_S.unsqueeze(-1)).squeeze(-1), rows)
    token_ids_S = best_S
    if any(row.is_penalised or not row.is_greedy for row in rows):
        scores_SV = _penalised(logits_SV, rows)
        token_ids_S = best_S if scores_SV is logits_SV else scores_SV.argmax(dim=-1)
        _draw(scores_SV, rows, token_ids_S)
    if all(row.sampling.num_logprobs < 0 for row in rows):
        return Sampled(token_ids_S=token_ids_S, logprobs=None)
    return Sampled(token_ids_S=token_ids_S, logprobs=_logprobs(logits_SV, rows, token_ids_S))


def filtered_scores(scores_GV: torch.Tensor, settings: Sequence[SamplingParams]) -> torch.Tensor:
    """The log-weights to draw from: temperature, top-k, top-p, min-p; -inf for what is left out.

    `scores_GV`: float32, after the penalties, settings with a temperature above 0.
    """
    device = scores_GV.device
    largest = torch.finfo(scores_GV.dtype).max  # only absurd settings exceed it
    temperatures = [min(s.temperature, largest) for s in settings]
    scores_GV = scores_GV / _column(temperatures, device).unsqueeze(-1)
    scores_GV.clamp_(max=largest)
    vocabulary = scores_GV.shape[-1]

    def top_k(group_GV: torch.Tensor, group: list[SamplingParams]) -> torch.Tensor:
        ks = [s.top_k for s in group]
        return keep_top_k(group_GV, torch.tensor(ks, device=device), max(ks))

    def top_p(group_GV: torch.Tensor, group: list[SamplingParams]) -> torch.Tensor:
        return keep_top_p(group_GV, _column([1 - s.top_p for s in group], device))

    def min_p(group_GV: torch.Tensor, group: list[SamplingParams]) -> torch.Tensor:
        return keep_min_p(group_GV, _column([s.min_p for s in group], device))

    scores_GV = _where(scores_GV, settings, lambda s: 0 < s.top_k < vocabulary, top_k)
    scores_GV = _where(scores_GV, settings, lambda s: s.top_p < 1, top_p)
    return _where(scores_GV, settings, lambda s: s.min_p > 0, min_p)


def _where(
    scores_GV: torch.Tensor,
    settings: Sequence[SamplingParams],
    uses: Callable[[SamplingParams], bool],
    keep: Callable[[torch.Tensor, list[SamplingParams]], torch.Tensor],
) -> torch.Tensor:
    """Apply `keep` to the rows whose setting `uses` it, all at once."""
    indices = [index for index, setting in enumerate(settings) if uses(setting)]
    if not indices:
        return scores_GV
    group = [settings[index] for index in indices]
    if len(indices) == len(settings):
        return keep(scores_GV, group)
    indices_G = torch.tensor(indices, device=scores_GV.device)
    return scores_GV.index_copy(0, indices_G, keep(scores_GV.index_select(0, indices_G), group))


def _penalised(logits_SV: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """A copy with the penalties applied; the logits themselves when no row has one."""
    if not any(row.is_penalised for row in rows):
        return logits_SV
    scores_SV = logits_SV.clone()
    for scores_V, row in zip(scores_SV, rows, strict=True):
        sampling = row.sampling
        frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
        if sampling.repetition_penalty != 1:
            penalise_repetition(scores_V, row.seen_ids, sampling.repetition_penalty)
        if frequency or presence:
            penalise_counts(scores_V, row.output_ids, frequency, presence)
    return scores_SV


def _draw(scores_SV: torch.Tensor, rows: Sequence[SampleRow], token_ids_S: torch.Tensor) -> None:
    """Replace the ids of the rows that are not greedy by drawn ones."""
    indices = [index for index, row in enumerate(rows) if not row.is_greedy]
    if not indices:
        return
    device = scores_SV.device
    group = [rows[index] for index in indices]
    indices_G = torch.tensor(indices, device=device)
    scores_GV = scores_SV if len(group) == len(rows) else scores_SV.index_select(0, indices_G)
    scores_GV = filtered_scores(scores_GV, [row.sampling for row in group])
    keys_G = keys_tensor([row.sampling.seed for row in group], device)
    positions_G = torch.tensor([row.position for row in group], device=device)
    drawn_G = draw_token_ids(scores_GV, uniforms(keys_G, positions_G))
    token_ids_S.index_copy_(0, indices_G, drawn_G)


def _logprobs(
    logits_SV: torch.Tensor, rows: Sequence[SampleRow], token_ids_S: torch.Tensor
) -> tuple[TokenLogprobs | None, ...]:
    token_ids = token_ids_S.tolist()
    return tuple(
        _row_logprobs(logits_SV[index], token_ids[index], row.sampling.num_logprobs)
        if row.sampling.num_logprobs >= 0
        else None
        for index, row in enumerate(rows)
    )


def _row_logprobs(logits_V: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    logprobs_V = logits_V.log_softmax(dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        num_top = min(num_top, logprobs_V.shape[-1])
        smallest = logprobs_V.topk(num_top).values[-1]
        # topk leaves open which of equals it returns: take all of them, then the lowest ids.
        ids = (logprobs_V >= smallest).nonzero().squeeze(-1)
        pairs = zip(ids.tolist(), logprobs_V[ids].tolist(), strict=True)
        top = tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:num_top])
    return TokenLogprobs(token_id=token_id, logprob=logprobs_V[token_id].item(), top=top)


def _check_finite(largest_S: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    finite_S = largest_S.isfinite()
    if finite_S.all():
        return
    index = int((~finite_S).nonzero()[0])
    raise NumericsError(
        f"the model's logits for token {rows[index].position} of a sequence are not finite "
        f"(largest: {largest_S[index].item()}; {int((~finite_S).sum())} of {len(rows)} sequences "
        "of the step): most likely its activations overflowed in float16, or a weight file is "
        "damaged; set model.dtype to bfloat16 or float32, or copy the model again"
    )


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


# ---- one operation each --------------------------------------------------------------------------
#
# But for `penalise_counts`, each equals the class of `transformers.generation.logits_process` that
# its docstring names, row by row and bit for bit, so that an option means here what it means to
# `generate`: same float32 operations in the same order, same treatment of ties, at least one token
# kept. Only exact ties at the border of top-p differ: transformers cuts them in the order of an
# unstable sort; here the lowest ids go first. A row's result does not depend on the other rows.


def penalise_repetition(
    logits_V: torch.Tensor, seen_ids: Sequence[int] | torch.Tensor, penalty: float
) -> None:
    """Divide the positive logits of `seen_ids` by `penalty` and multiply the others, in place.

    As `RepetitionPenaltyLogitsProcessor`: once per id however often it was seen; ids that the head
    cannot produce (a padded embedding) are left out.
    """
    ids = torch.as_tensor(seen_ids, dtype=torch.int64, device=logits_V.device)
    ids = ids[ids < logits_V.shape[-1]]
    seen = logits_V[ids]
    logits_V[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)


def penalise_counts(
    logits_V: torch.Tensor,
    output_ids: Sequence[int] | torch.Tensor,
    frequency_penalty: float,
    presence_penalty: float,
) -> None:
    """Subtract from the logits of `output_ids`, in place, as vLLM and the OpenAI API do.

    `frequency_penalty` as often as an id occurs, `presence_penalty` once.
    """
    ids = torch.as_tensor(output_ids, dtype=torch.int64, device=logits_V.device)
    vocabulary = logits_V.shape[-1]
    counts_V = torch.bincount(ids[ids < vocabulary], minlength=vocabulary)
    logits_V -= frequency_penalty * counts_V
    logits_V -= presence_penalty * (counts_V > 0)


def keep_top_k(scores_SV: torch.Tensor, k_S: torch.Tensor, max_k: int) -> torch.Tensor:
    """-inf for all below the k-th largest, as `TopKLogitsWarper`: ties with the k-th stay.

    `k_S`: int64 in [1, V]; `max_k`: their largest, known to the caller without asking the device.
    """
    largest_SK = scores_SV.topk(max_k, dim=-1).values
    threshold_S1 = largest_SK.gather(-1, (k_S - 1).unsqueeze(-1))
    return scores_SV.masked_fill(scores_SV < threshold_S1, _MINUS_INF)


def keep_top_p(scores_SV: torch.Tensor, rest_S: torch.Tensor) -> torch.Tensor:
    """-inf for the unlikeliest tokens that together hold at most `rest_S`, as `TopPLogitsWarper`.

    `rest_S`: float32 1 - top_p, subtracted in double precision as Python does.
    """
    ascending_SV, order_SV = scores_SV.sort(dim=-1, stable=True)
    removed_SV = running_sums(ascending_SV.softmax(dim=-1)) <= rest_S.unsqueeze(-1)
    removed_SV[:, -1] = False
    return scores_SV.masked_fill(removed_SV.scatter(-1, order_SV, removed_SV), _MINUS_INF)
