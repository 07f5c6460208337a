"""Weights in 8 bits, with a scale for each output channel, from weights in a floating type.

Symmetric, by the largest magnitude of each row: `weight ≈ narrow * scale`. Done on the device where
the tensor is, a block of rows at a time, so that little stands in memory beside source and result.

Where a row holds NaN or infinity its scale is NaN or infinite: products are NaN, which the trial
step of `models/verification.py` reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mpipipe.weights.destination import Destination

__all__ = ["Place", "quantize_to", "quantize_weight", "scale_name"]

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}
_BLOCK_ELEMENTS = 1 << 24  # 64 MiB in float32
# On a CPU half a MiB a thread, which stays in a core's cache from one operation to the next: 16.8
# million weights in bfloat16 take a thread 0.07 s, 0.13 s in the large blocks.
_CPU_BLOCK_ELEMENTS = 1 << 17


def scale_name(name: str, state: Mapping[str, torch.Tensor]) -> str | None:
    """Where in a module's `state` the scale of the weight called `name` is: beside it.

    None: that weight has more than 8 bits.
    """
    return name.removesuffix("weight") + "scale" if state[name].dtype in _LARGEST else None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a module goes: its names there, and what is there so far, on `meta`."""

    names: tuple[str, ...]
    like: torch.Tensor


def quantize_to(
    destination: Destination, exact_OI: torch.Tensor, weight: Place, scale: Place
) -> tuple[torch.Tensor, torch.Tensor]:
    """The module's own tensors for `weight` and `scale`, made from `exact_OI`."""
    narrow_OI = destination.empty(weight.names, weight.like)
    scale_O = destination.empty(scale.names, scale.like)
    quantize_weight(exact_OI, narrow_OI, scale_O)
    return destination.keep(weight.names, narrow_OI), destination.keep(scale.names, scale_O)


def quantize_weight(
    weight_OI: torch.Tensor, narrow_OI: torch.Tensor, scale_O: torch.Tensor
) -> None:
    """Fill `narrow_OI` (int8 or float8_e4m3fn) and `scale_O` (float32) from `weight_OI`.

    A row of zeros stays one.
    """
    largest = _LARGEST[narrow_OI.dtype]
    on_cpu = weight_OI.device.type == "cpu"
    num_elements = _CPU_BLOCK_ELEMENTS * torch.get_num_threads() if on_cpu else _BLOCK_ELEMENTS
    block_rows = max(1, num_elements // weight_OI.shape[1])
    block_BI = torch.empty(
        min(block_rows, len(weight_OI)),
        weight_OI.shape[1],
        dtype=torch.float32,
        device=weight_OI.device,
    )
    for first in range(0, len(weight_OI), block_rows):
        rows = slice(first, min(first + block_rows, len(weight_OI)))
        exact_BI = block_BI[: rows.stop - first].copy_(weight_OI[rows])
        scale_B = torch.linalg.vector_norm(exact_BI, ord=float("inf"), dim=1) / largest
        scale_O[rows] = scale_B
        # The smallest normal number: beside it, a row of zeros would be divided by zero.
        scale_B = scale_B.clamp_(min=torch.finfo(torch.float32).tiny)
        exact_BI.div_(scale_B[:, None])
        if narrow_OI.dtype == torch.int8:
            exact_BI.round_()
        narrow_OI[rows] = exact_BI.clamp_(-largest, largest).to(narrow_OI.dtype)
