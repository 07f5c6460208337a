"""Log-probabilities without host synchronisation: selected on the device, put together later.

`select_logprobs` and then `logprobs_of`, on the copies that have reached the host, give what
the tests' oracle gives: of the model's raw distribution, equals in the order of their ids.

Shape suffixes: S rows to sample, C rows of a chunk, V vocabulary, K tokens listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mpipipe.stage.device_sampler import chunk_rows
from mpipipe.types import TokenLogprobs

__all__ = ["logprobs_of", "select_logprobs"]

HostArray = torch.Tensor | np.ndarray[Any, Any]

_MAGNITUDE_BITS = 0x7FFFFFFF  # of a float32: all but the sign
_ID_BITS = 32


def select_logprobs(
    logits_SV: torch.Tensor, ids_S: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of `ids_S` and of the `num_top` likeliest tokens, best first.

    Args:
        logits_SV: bfloat16, float16 or float32; not modified.
        ids_S: int64; a row with -1 gets numbers without meaning.
        num_top: the most that any row asks for, 0 or more.

    Returns:
        Device tensors chosen_S float32, top ids_SK int64, top values_SK float32; K is at most V.
    """
    parts = [
        _select(logits_SV[part], ids_S[part], num_top) for part in chunk_rows(*logits_SV.shape)
    ]
    chosen, top_ids, top_values = zip(*parts, strict=True)
    return torch.cat(chosen), torch.cat(top_ids), torch.cat(top_values)


def _select(
    logits_CV: torch.Tensor, ids_C: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs_CV = logits_CV.float().log_softmax(dim=-1)
    chosen_C = logprobs_CV.gather(-1, ids_C.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    num_top = min(num_top, logprobs_CV.shape[-1])
    if num_top == 0:
        top_ids_CK = torch.empty(len(ids_C), 0, dtype=torch.int64, device=logits_CV.device)
    else:
        # No two keys are equal, so it does not matter which of equals topk would return.
        top_ids_CK = _rank_keys(logprobs_CV).topk(num_top, dim=-1).indices
    return chosen_C, top_ids_CK, logprobs_CV.gather(-1, top_ids_CK)


def _rank_keys(values_CV: torch.Tensor) -> torch.Tensor:
    """int64 keys in the order of float32 values, equals in falling order of their indices.

    Read as integers, the bits of positive floats are in order and those of negative ones in
    reverse; flipping all of those but the sign puts both in order.
    """
    bits_CV = (values_CV + 0.0).view(torch.int32)  # -0 becomes 0
    ordered_CV = torch.where(bits_CV < 0, bits_CV ^ _MAGNITUDE_BITS, bits_CV)
    indices_V = torch.arange(values_CV.shape[-1], device=values_CV.device)
    return (ordered_CV.long() << _ID_BITS) - indices_V


def logprobs_of(
    ids_S: HostArray,
    chosen_S: HostArray,
    top_ids_SK: HostArray,
    top_values_SK: HostArray,
    num_top: Sequence[int],
) -> tuple[TokenLogprobs | None, ...]:
    """What `select_logprobs` selected, on the host, as each row asked for it.

    `num_top`: how many tokens a row wants listed; -1: nothing at all. Rows with id -1 get nothing.
    """
    rows = zip(
        ids_S.tolist(),
        chosen_S.tolist(),
        top_ids_SK.tolist(),
        top_values_SK.tolist(),
        num_top,
        strict=True,
    )
    return tuple(
        TokenLogprobs(
            token_id=token_id,
            logprob=chosen,
            top=tuple(zip(top_ids[:wanted], top_values[:wanted], strict=True)),
        )
        if wanted >= 0 and token_id >= 0
        else None
        for token_id, chosen, top_ids, top_values, wanted in rows
    )
