"""The sampler without host synchronisation: options in device tensors, ids out, nothing asked.

`sample_on_device` takes the tokens that the tests' oracle takes, row by row, but from columns
of options that lie on the device, so that a CUDA graph can hold it. What a step may need (a draw,
filters, penalties) is known on the host beforehand: `SamplingNeeds`, the key of a graph. A row that
does not use an operation has the option's neutral value in its column, which leaves its scores as
they are, bit for bit. `token_history` keeps what the penalties remember, `device_logprobs`
computes log-probabilities; the head decides on stops and on rows with broken logits (id -1).

Invariants: no operation reads a tensor on the host, and no shape depends on a value. A row's token
depends on its own logits, options and position only.

Shape suffixes: S rows to sample, C rows of a chunk, V vocabulary, 1 a column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpipipe.planning.step_limits import CHUNK_ELEMENTS
from mpipipe.sampling_options import OPTIONS, SamplingNeeds
from mpipipe.stage.random_draws import draw_token_ids, signed_key, uniforms
from mpipipe.stage.token_history import TokenHistory
from mpipipe.types import SamplingParams

__all__ = [
    "COLUMNS",
    "Column",
    "SamplingColumns",
    "chunk_rows",
    "column_entries",
    "keep_min_p",
    "running_sums",
    "sample_on_device",
]

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_NOTHING_REMOVED = -1.0  # no cumulated probability is below it


@dataclass(frozen=True, slots=True)
class Column:
    """How the device holds one option of every row."""

    dtype: type[np.generic]
    entry: Callable[[Any, int], float] = lambda value, _: float(value)  # of value and vocabulary


# By the name of the option.
COLUMNS: Mapping[str, Column] = {
    "temperature": Column(np.float32, lambda value, _: min(value, _FLOAT32_MAX)),
    "seed": Column(np.int64, lambda value, _: signed_key(value)),
    "top_k": Column(np.int64, lambda value, size: value if 0 < value < size else size),  # [1, V]
    # 1 - top_p, negative where it is off.
    "top_p": Column(np.float32, lambda value, _: 1 - value if value < 1 else _NOTHING_REMOVED),
    "min_p": Column(np.float32),
    # Beyond float32's range numpy would warn, and round to infinity as torch does.
    "repetition_penalty": Column(
        np.float32, lambda value, _: value if value <= _FLOAT32_MAX else float("inf")
    ),
    "frequency_penalty": Column(np.float32),
    "presence_penalty": Column(np.float32),
}


_OF_DRAWS = {name for name in COLUMNS if OPTIONS[name].needs & SamplingNeeds.DRAWING}


def column_entries(sampling: SamplingParams, vocab_size: int) -> dict[str, float]:
    """The columns' entries of one sequence; of a greedy one, neutral where only draws read them."""
    unused = _OF_DRAWS if sampling.is_greedy else ()
    entries: dict[str, float] = {}
    for name, column in COLUMNS.items():
        value = OPTIONS[name].default if name in unused else getattr(sampling, name)
        entries[name] = column.entry(value, vocab_size)
    return entries


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Device tensors with an entry per row: those of `COLUMNS`, and its request row."""

    of: Mapping[str, torch.Tensor]  # option → [S]
    request_rows_S: torch.Tensor  # int64: rows of `TokenHistory`

    def __getitem__(self, name: str) -> torch.Tensor:
        """The column of an option."""
        return self.of[name]

    def rows(self, part: slice) -> SamplingColumns:
        """Views of some rows."""
        columns = {name: column_S[part] for name, column_S in self.of.items()}
        return SamplingColumns(columns, self.request_rows_S[part])


def sample_on_device(
    logits_SV: torch.Tensor,
    columns: SamplingColumns,
    positions_S: torch.Tensor,
    needs: SamplingNeeds,
    history: TokenHistory | None = None,
) -> torch.Tensor:
    """Choose one token per row: int64 [S]; -1 where the largest logit is not finite.

    Args:
        logits_SV: bfloat16, float16 or float32; not modified.
        columns: of the rows' options.
        positions_S: int64, index of the token to draw: how many tokens come before it.
        needs: of all rows together; more than they use changes no token.
        history: needed for penalties; it is read only, the caller adds the ids.
    """
    # Of equals the first, as torch documents for max: one pass over the logits as they are.
    largest_S, ids_S = logits_SV.max(dim=-1)
    if needs:
        ids_S = torch.cat(
            [
                _choose(
                    logits_SV[part],
                    columns.rows(part),
                    positions_S[part],
                    likeliest_C=ids_S[part],
                    needs=needs,
                    history=history,
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
    history: TokenHistory | None,
) -> torch.Tensor:
    """The tokens of some rows: drawn, or the likeliest after the penalties."""
    scores_CV = logits_CV.float()
    if needs & SamplingNeeds.HISTORY:
        assert history is not None, "a penalty needs to know what was seen"
        scores_CV = _penalised(scores_CV, columns, needs, history)
        likeliest_C = scores_CV.max(dim=-1).indices
    if not needs & SamplingNeeds.DRAW:
        return likeliest_C
    greedy_C = columns["temperature"] <= 0
    temperature_C = columns["temperature"].masked_fill(greedy_C, 1)
    scores_CV = scores_CV / temperature_C.unsqueeze(-1)
    scores_CV.clamp_(max=_FLOAT32_MAX)  # as the oracle: only absurd settings overflow
    if needs & SamplingNeeds.FILTERS:
        scores_CV = _filtered(scores_CV, columns)
    drawn_C = draw_token_ids(scores_CV, uniforms(columns["seed"], positions_C))
    return torch.where(greedy_C, likeliest_C, drawn_C)


def _penalised(
    scores_CV: torch.Tensor, columns: SamplingColumns, needs: SamplingNeeds, history: TokenHistory
) -> torch.Tensor:
    """`penalise_repetition` and `penalise_counts` of every row; the scores are not modified."""
    if needs & SamplingNeeds.SEEN:
        penalty_C1 = columns["repetition_penalty"].unsqueeze(-1)
        changed_CV = torch.where(scores_CV < 0, scores_CV * penalty_C1, scores_CV / penalty_C1)
        seen_CV = history.rows_of(SamplingNeeds.SEEN, columns.request_rows_S)
        scores_CV = torch.where(seen_CV, changed_CV, scores_CV)
    if needs & SamplingNeeds.COUNTS:
        counts_CV = history.rows_of(SamplingNeeds.COUNTS, columns.request_rows_S)
        scores_CV = scores_CV - columns["frequency_penalty"].unsqueeze(-1) * counts_CV
        scores_CV = scores_CV - columns["presence_penalty"].unsqueeze(-1) * (counts_CV > 0)
    return scores_CV


def _filtered(scores_CV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """`keep_top_k`, `keep_top_p` and `keep_min_p` of every row, with one sort for the first two.

    What top-k leaves out is the beginning of the ascending order, so the order after top-k is the
    same but for tokens that are out already.
    """
    minus_inf = float("-inf")
    ascending_CV, order_CV = scores_CV.sort(dim=-1, stable=True)
    kth_C1 = ascending_CV.gather(-1, (scores_CV.shape[-1] - columns["top_k"]).unsqueeze(-1))
    out_CV = ascending_CV < kth_C1
    probabilities_CV = ascending_CV.masked_fill_(out_CV, minus_inf).softmax(dim=-1)
    out_CV |= running_sums(probabilities_CV) <= columns["top_p"].unsqueeze(-1)
    out_CV[:, -1].fill_(False)
    scores_CV = scores_CV.masked_fill(out_CV.scatter(-1, order_CV, out_CV), minus_inf)
    return keep_min_p(scores_CV, columns["min_p"])


def running_sums(values_SV: torch.Tensor) -> torch.Tensor:
    """`cumsum` of each row, the same in every run.

    On a GPU torch sums a row of its own by a scan over the whole device, whose rounding may differ
    from run to run; several rows are summed by a thread block each. One row is therefore doubled.
    """
    if len(values_SV) == 1:
        return values_SV.expand(2, -1).cumsum(dim=-1)[:1]
    return values_SV.cumsum(dim=-1)


def keep_min_p(scores_SV: torch.Tensor, min_p_S: torch.Tensor) -> torch.Tensor:
    """-inf for tokens below `min_p_S` of the likeliest one's probability, as `MinPLogitsWarper`."""
    probabilities_SV = scores_SV.softmax(dim=-1)
    threshold_S1 = min_p_S.unsqueeze(-1) * probabilities_SV.amax(dim=-1, keepdim=True)
    return scores_SV.masked_fill(probabilities_SV < threshold_S1, float("-inf"))
