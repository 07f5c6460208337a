"""Linear layers whose weight has 8 bits and one float32 scale per output channel.

* *int8* (W8A16): a weight is `weight * scale`, rounded to the type of the activations;
* *fp8* (W8A8): weights are float8_e4m3fn, and each row of the activations is brought to that type
  with a scale of its own when it arrives.

`weights/quantize.py` makes weight and scale while loading. The products here are plain torch, run
on every device and are the oracle of the fast ones (`operations`). O and I: sides of a weight.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

__all__ = ["linear_fp8", "linear_int8", "quantize_rows_fp8"]

_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max  # 448


def linear_int8(
    rows_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
) -> torch.Tensor:
    """[T, I] → [T, O] in the type of `rows_TI`; `weight_OI` int8, `scale_O` float32.

    The dequantised weight stands in memory while it runs. The scale is multiplied in before the
    sums, which would leave float16's range without it.
    """
    weight_OI = (weight_OI * scale_O[:, None]).to(rows_TI.dtype)
    return linear(rows_TI, weight_OI, bias_O)


def linear_fp8(
    rows_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
) -> torch.Tensor:
    """[T, I] → [T, O] in the type of `rows_TI`; `weight_OI` float8_e4m3fn, `scale_O` float32.

    The sums are float32, scaled and with the bias added before they are rounded once.
    """
    narrow_TI, scale_T = quantize_rows_fp8(rows_TI)
    sums_TO = linear(narrow_TI.float(), weight_OI.float())
    out_TO = sums_TO * scale_T[:, None] * scale_O
    if bias_O is not None:
        out_TO += bias_O
    return out_TO.to(rows_TI.dtype)


def quantize_rows_fp8(rows_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in float8_e4m3fn, and its float32 scale [T]; a row of zeros stays one."""
    exact_TI = rows_TI.float()
    scale_T = (exact_TI.abs().amax(dim=-1) / _FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    narrow_TI = (exact_TI / scale_T[:, None]).clamp_(-_FP8_MAX, _FP8_MAX)
    return narrow_TI.to(_FP8), scale_T
