"""The sampler without host synchronisation: settings in device tensors, ids out, nothing asked.

`sample_on_device` takes the tokens that `stage.sampler.sample` takes, row by row, but from columns
of settings that lie on the device, so that a CUDA graph can hold it. What a step may need (a draw,
filters, penalties) is known on the host beforehand: `SamplingNeeds`, the key of a graph. A row that
does not use an operation has the operation's neutral value in its column, which leaves its scores
as they are, bit for bit. Also here: `SeenTokens`, the penalty's memory. Not here: log-probabilities
(`device_logprobs`), stops, and what to do about a row whose logits are broken (id -1).

Invariants: no operation reads a tensor on the host, and no shape depends on a value. A row's token
depends on its own logits, settings and position only.

Shape suffixes: S rows to sample, C rows of a chunk, V vocabulary, N seats, 1 a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpipipe.planning.gpu_limits import CHUNK_ELEMENTS
from mpipipe.planning.sampling_use import SamplingNeeds
from mpipipe.stage.logits_filters import keep_min_p, running_sums
from mpipipe.stage.random_draws import draw_token_ids, signed_key, uniforms
from mpipipe.types import SamplingParams

__all__ = [
    "SamplingColumns",
    "SamplingFields",
    "SamplingNeeds",
    "SeenTokens",
    "chunk_rows",
    "sample_on_device",
    "sampling_fields",
]

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_NOTHING_REMOVED = -1.0  # no cumulated probability is below it

# Temperature (0: greedy), key of the seed, top-k (V: off), 1 - top-p (negative: off), min-p (0:
# off), repetition penalty (1: off).
SamplingFields = tuple[float, int, int, float, float, float]


def sampling_fields(sampling: SamplingParams, vocab_size: int) -> SamplingFields:
    """The columns' entries of one sequence, in the order of `SamplingColumns`."""
    penalty = float(sampling.repetition_penalty)
    # Beyond float32's range numpy would warn, and round to infinity as torch does.
    penalty = penalty if penalty <= _FLOAT32_MAX else float("inf")
    if sampling.is_greedy:
        return (0.0, 0, vocab_size, _NOTHING_REMOVED, 0.0, penalty)
    return (
        min(float(sampling.temperature), _FLOAT32_MAX),
        signed_key(sampling.seed),
        sampling.top_k if 0 < sampling.top_k < vocab_size else vocab_size,
        1 - sampling.top_p if sampling.top_p < 1 else _NOTHING_REMOVED,
        float(sampling.min_p),
        penalty,
    )


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Device tensors with an entry per row: what `sampling_fields` gives, and the row's seat."""

    temperature_S: torch.Tensor  # float32; 0: greedy
    keys_S: torch.Tensor  # int64
    top_k_S: torch.Tensor  # int64 in [1, V]
    rest_S: torch.Tensor  # float32
    min_p_S: torch.Tensor  # float32
    penalty_S: torch.Tensor  # float32
    seats_S: torch.Tensor  # int64: rows of `SeenTokens`

    def rows(self, part: slice) -> SamplingColumns:
        """Views of some rows."""
        return SamplingColumns(
            self.temperature_S[part],
            self.keys_S[part],
            self.top_k_S[part],
            self.rest_S[part],
            self.min_p_S[part],
            self.penalty_S[part],
            self.seats_S[part],
        )


class SeenTokens:
    """Which tokens each sequence has seen, by seat: bool [N, V] on the device.

    Takes N·V bytes, so make it with the first sequence that has a penalty; graphs hold its address.
    All calls must be made on the stream that samples.
    """

    def __init__(self, num_seats: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        # The last column takes the marks that count for nothing.
        self._seen_NV1 = torch.zeros(num_seats, vocab_size + 1, dtype=torch.bool, device=device)

    def set_row(self, seat: int, ids: Sequence[int]) -> None:
        """A sequence takes `seat`, having seen `ids`; those the head cannot produce count not.

        One copy, which the host does not wait for.
        """
        on_gpu = self._seen_NV1.device.type == "cuda"
        row_V = torch.zeros(self._vocab_size, dtype=torch.bool, pin_memory=on_gpu)
        seen = np.asarray(ids, dtype=np.int64)
        row_V.numpy()[seen[(seen >= 0) & (seen < self._vocab_size)]] = True
        # torch keeps pinned memory back from reuse until the copies that read it are done.
        self._seen_NV1[seat, :-1].copy_(row_V, non_blocking=True)

    def mark(self, seats_S: torch.Tensor, ids_S: torch.Tensor) -> None:
        """Count the sampled `ids_S` as seen from now on; -1 is no token."""
        columns_S = ids_S.masked_fill(ids_S < 0, self._vocab_size)
        places_S = seats_S * (self._vocab_size + 1) + columns_S
        self._seen_NV1.view(-1).index_fill_(0, places_S, True)

    def rows(self, seats_S: torch.Tensor) -> torch.Tensor:
        """A copy of the rows of some seats: bool [S, V]."""
        return self._seen_NV1[:, :-1].index_select(0, seats_S)

    def put_rows(self, seats_S: torch.Tensor, rows_SV: torch.Tensor) -> None:
        """Put back what `rows` gave: undoes the marks of a trial run."""
        self._seen_NV1[:, :-1].index_copy_(0, seats_S, rows_SV)


def sample_on_device(
    logits_SV: torch.Tensor,
    columns: SamplingColumns,
    positions_S: torch.Tensor,
    needs: SamplingNeeds,
    seen: SeenTokens | None = None,
) -> torch.Tensor:
    """Choose one token per row: int64 [S]; -1 where the largest logit is not finite.

    Args:
        logits_SV: bfloat16, float16 or float32; not modified.
        columns: of the rows' settings.
        positions_S: int64, index of the token to draw: how many tokens come before it.
        needs: of all rows together; more than they use changes no token.
        seen: needed for `needs.penalty`; it is read only, the caller marks the ids.
    """
    # Of equals the first, as torch documents for max: one pass over the logits as they are.
    largest_S, ids_S = logits_SV.max(dim=-1)
    if needs.draw or needs.penalty:
        ids_S = torch.cat(
            [
                _choose(
                    logits_SV[part],
                    columns.rows(part),
                    positions_S[part],
                    likeliest_C=ids_S[part],
                    needs=needs,
                    seen=seen,
                )
                for part in chunk_rows(*logits_SV.shape)
            ]
        )
    return ids_S.masked_fill(~largest_S.isfinite(), -1)


def chunk_rows(num_rows: int, vocab_size: int) -> list[slice]:
    """Rows to treat at once, so that temporaries stay small; at least one chunk."""
    step = max(1, CHUNK_ELEMENTS // vocab_size)
    return [slice(start, min(start + step, num_rows)) for start in range(0, max(num_rows, 1), step)]


def _choose(
    logits_CV: torch.Tensor,
    columns: SamplingColumns,
    positions_C: torch.Tensor,
    *,
    likeliest_C: torch.Tensor,
    needs: SamplingNeeds,
    seen: SeenTokens | None,
) -> torch.Tensor:
    """The tokens of some rows: drawn, or the likeliest after the penalty."""
    scores_CV = logits_CV.float()
    if needs.penalty:
        assert seen is not None, "a repetition penalty needs to know what was seen"
        scores_CV = _penalised(scores_CV, seen.rows(columns.seats_S), columns.penalty_S)
        likeliest_C = scores_CV.max(dim=-1).indices
    if not needs.draw:
        return likeliest_C
    greedy_C = columns.temperature_S <= 0
    temperature_C = columns.temperature_S.masked_fill(greedy_C, 1)
    scores_CV = scores_CV / temperature_C.unsqueeze(-1)
    scores_CV.clamp_(max=_FLOAT32_MAX)  # as the oracle: only absurd settings overflow
    if needs.filters:
        scores_CV = _filtered(scores_CV, columns)
    drawn_C = draw_token_ids(scores_CV, uniforms(columns.keys_S, positions_C))
    return torch.where(greedy_C, likeliest_C, drawn_C)


def _penalised(
    scores_CV: torch.Tensor, seen_CV: torch.Tensor, penalty_C: torch.Tensor
) -> torch.Tensor:
    """`penalise_repetition` of every row."""
    penalty_C1 = penalty_C.unsqueeze(-1)
    changed_CV = torch.where(scores_CV < 0, scores_CV * penalty_C1, scores_CV / penalty_C1)
    return torch.where(seen_CV, changed_CV, scores_CV)


def _filtered(scores_CV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """`keep_top_k`, `keep_top_p` and `keep_min_p` of every row, with one sort for the first two.

    What top-k leaves out is the beginning of the ascending order, so the order after top-k is the
    same but for tokens that are out already.
    """
    minus_inf = float("-inf")
    ascending_CV, order_CV = scores_CV.sort(dim=-1, stable=True)
    kth_C1 = ascending_CV.gather(-1, (scores_CV.shape[-1] - columns.top_k_S).unsqueeze(-1))
    out_CV = ascending_CV < kth_C1
    probabilities_CV = ascending_CV.masked_fill_(out_CV, minus_inf).softmax(dim=-1)
    out_CV |= running_sums(probabilities_CV) <= columns.rest_S.unsqueeze(-1)
    out_CV[:, -1].fill_(False)
    scores_CV = scores_CV.masked_fill(out_CV.scatter(-1, order_CV, out_CV), minus_inf)
    return keep_min_p(scores_CV, columns.min_p_S)
