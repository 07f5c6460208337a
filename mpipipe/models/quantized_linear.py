"""Linear layers whose weight has 8 bits and one float32 scale per output channel.

* *int8* (W8A16): a weight is `weight * scale`, rounded to the type of the activations;
* *fp8* (W8A8): weights are float8_e4m3fn, and each row of the activations is brought to that type
  with a scale of its own when it arrives.

`quantize_linears` puts them in the place of the plain layers of a stage that is still on the meta
device; `weights/quantize.py` makes weight and scale while loading. The products here are plain
torch, run on every device, and are the oracle of the fast ones (`operations`).

On a CPU a weight stays int8 in memory: `linear_int8_blocked` widens a block of it at a time, which
is still in the core's cache when it is multiplied. Measured on one core of a busy machine, best of
15, float32, milliseconds by rows; first 30 layers of SmolLM2 (135M), then q, k, v and the output of
one layer of Llama-3-8B:

    rows                               1     4     8    32    64
    blocked, 425 MB                   17    18    25    80    90
    int8 widened whole                33    47    55    80   115
    int8 in blocks, 106 MB            23    28    31    80   129
    torch._weight_int8pack_mm        296  1960  3812  4540
    8B: blocked, 168 MB               10    15    23    27    42
    8B: int8 widened whole            82    95    87    93   145
    8B: int8 in blocks, 42 MB         15    13    18    42    73

In bfloat16 torch's kernel for it is the fastest up to 8 rows: 7, 12, 35 and 92 ms for 1, 4, 8 and
32 rows of SmolLM2, the blocks 55, 66, 72 and 155. No form in float16 is fast.

Shape letters: T rows, O and I the sides of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from mpipipe.types import QuantizeName

__all__ = [
    "QuantizedLinear",
    "QuantizedProduct",
    "linear_fp8",
    "linear_int8",
    "linear_int8_blocked",
    "quantize_linears",
    "quantize_rows_fp8",
    "quantized_linears",
    "use_products",
]

# (rows_TI, weight_OI, scale_O, bias_O) → [T, O] in the type of the rows
QuantizedProduct = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
]

_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max  # 448
_FEW_ROWS = 8
_BLOCK_ELEMENTS = 1 << 17  # half a MiB in float32: a quarter of a core's second-level cache


class QuantizedLinear(nn.Module):
    """Computes what an `nn.Linear` does, from a weight in 8 bits.

    `multiply` is plain torch until `StageModel.finish` gives it the fastest form of the device.
    """

    multiply: QuantizedProduct

    def __init__(
        self, weight_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.scale = nn.Parameter(scale_O, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.multiply = linear_int8 if weight_OI.dtype == torch.int8 else linear_fp8

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features], in the type of `rows`."""
        rows_TI = rows.reshape(-1, self.in_features)
        out_TO = self.multiply(rows_TI, self.weight, self.scale, self.bias)
        return out_TO.view(*rows.shape[:-1], out_TO.shape[-1])

    def plus(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same, with `residual` added."""
        return self.forward(rows).add_(residual)


def quantize_linears(
    model: nn.Module, scheme: QuantizeName, is_wanted: Callable[[str, nn.Linear], bool]
) -> None:
    """Put a `QuantizedLinear` without values in the place of plain linears.

    Experts that a family holds as one tensor, and subclasses of `nn.Linear`, stay as they are.

    Args:
        model: on the meta device.
        scheme: "int8" or "fp8".
        is_wanted: of a linear, by its path in `model`.
    """
    places = [
        (path, child)
        for path, child in model.named_modules()
        if type(child) is nn.Linear and is_wanted(path, child)
    ]
    dtype = torch.int8 if scheme == "int8" else _FP8
    for path, child in places:
        weight_OI = torch.empty(child.weight.shape, dtype=dtype, device="meta")
        scale_O = torch.empty(child.out_features, dtype=torch.float32, device="meta")
        parent, _, name = path.rpartition(".")
        quantized = QuantizedLinear(weight_OI, scale_O, child.bias)
        setattr(model.get_submodule(parent), name, quantized)


def quantized_linears(module: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Those in `module`, with their paths."""
    for path, child in module.named_modules():
        if isinstance(child, QuantizedLinear):
            yield path, child


def use_products(module: nn.Module, product_of: Callable[[torch.dtype], QuantizedProduct]) -> None:
    """Let the quantised linears in `module` compute with `product_of` the type of their weight."""
    for _, quantized in quantized_linears(module):
        quantized.multiply = product_of(quantized.weight.dtype)


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


def linear_int8_blocked(
    rows_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
) -> torch.Tensor:
    """`linear_int8` for a CPU: its cache holds what is dequantised, and the scale comes last.

    In float16, whose range ends before that, `linear_int8`.
    """
    num_rows, (num_out, num_in) = rows_TI.shape[0], weight_OI.shape
    if rows_TI.dtype == torch.float16:
        return linear_int8(rows_TI, weight_OI, scale_O, bias_O)
    if rows_TI.dtype == torch.bfloat16 and num_rows <= _FEW_ROWS:
        ones_O = rows_TI.new_ones(num_out)
        out_TO = torch._weight_int8pack_mm(rows_TI.contiguous(), weight_OI, ones_O)
    else:
        out_TO = rows_TI.new_empty(num_rows, num_out)
        block_BI = rows_TI.new_empty(min(num_out, max(1, _BLOCK_ELEMENTS // num_in)), num_in)
        for first in range(0, num_out, len(block_BI)):
            rows = slice(first, min(first + len(block_BI), num_out))
            part_BI = block_BI[: rows.stop - first].copy_(weight_OI[rows])
            torch.mm(rows_TI, part_BI.t(), out=out_TO[:, rows])
    out_TO.mul_(scale_O)
    return out_TO if bias_O is None else out_TO.add_(bias_O)


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
