"""Penalties, temperature, top-k, top-p and min-p on rows with settings of their own.

Each function but `penalise_counts` equals the class of `transformers.generation.logits_process`
named in its docstring, row by row and bit for bit, so that a setting means here what it means to
`generate`: same float32 operations in the same order, same treatment of ties, at least one token
kept. Only exact ties at
the border of top-p differ: transformers cuts them in the order of an unstable sort; here the
lowest ids go first. A row's result does not depend on the other rows.

Shape suffixes: S rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = [
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalise_counts",
    "penalise_repetition",
    "running_sums",
]

_MINUS_INF = float("-inf")


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
    return scores_SV.masked_fill(probabilities_SV < threshold_S1, _MINUS_INF)
