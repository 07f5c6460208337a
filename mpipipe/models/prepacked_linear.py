"""Linear layers with weights laid out for the CPU's matrix kernels.

torch's plain `F.linear` on a CPU hands a row-major weight to the matrix kernel in every call, which
re-packs it or reads it badly for batches of a few rows. Packing once at load avoids that.

* *half-stored*: float32 weights that float16 holds exactly (every checkpoint in float16, many
  dequantised ones) are kept in float16 and multiplied in float32 (FBGEMM): the same products from
  half the memory;
* *blocked*: any float32 or bfloat16 weight in oneDNN's layout.

Measured on one core, the matrices of 18 layers of SmolLM2 (135M), milliseconds by rows:

    rows                      1     2     4     8    16    32    64
    float32 blocked          27    28    28    33    42    56    85
    float32 half-stored      16    19    21    28    43    60    90
    bfloat16 plain → blocked, 15 layers: 8 rows 22 → 15, 64 rows 31 → 22
    LM head of 49,152, 8 rows: plain 30, blocked 12, half-stored 9.5

Decode steps have few rows, so half-stored wins where it is exact. oneDNN's batch hint: 8 and 64
measured the same, 1 as slow as plain.

The plain weight is freed. An LM head tied to the embedding of the same stage costs its own packed
copy (the embedding needs rows, the kernel needs blocks).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable

import torch
from torch import nn

__all__ = [
    "BlockedLinear",
    "HalfStoredLinear",
    "PrepackedLinear",
    "can_prepack",
    "prepack",
    "prepack_linears",
    "return_freed_memory",
]

_BATCH_HINT = 8
_CHECKED_ELEMENTS = 1 << 17  # of a weight at once: 0.8 MB of copies, which stay in the cache


# Both compute what the `nn.Linear` of their weight does, up to rounding. What they pack is opaque,
# and no parameter: it cannot be saved or moved.


class BlockedLinear(nn.Module):
    """A weight in oneDNN's blocked layout, in its own dtype."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _BATCH_HINT)
        self._bias = bias_O

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._packed, self._bias, "none", [], ""
        )
        return output

    def plus(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same, with `residual` added in the product's own pass."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            rows, residual, self._packed, self._bias, "add"
        )
        return output


class HalfStoredLinear(nn.Module):
    """A float32 weight that float16 holds exactly: stored in float16, computed in float32."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight_OI, bias_O)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        output: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(rows, self._packed)
        return output

    def plus(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same, with `residual` added."""
        return self.forward(rows).add_(residual)


PrepackedLinear = BlockedLinear | HalfStoredLinear


def prepack(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> PrepackedLinear:
    """The faster form of a weight [out_features, in_features] that `can_prepack` allows."""
    weight_OI = weight_OI.detach()
    bias_O = None if bias_O is None else bias_O.detach()
    if _is_exact_in_half(weight_OI):
        return HalfStoredLinear(weight_OI, bias_O)
    return BlockedLinear(weight_OI, bias_O)


def can_prepack(linear: nn.Linear) -> bool:
    """Whether this torch, this processor and this weight allow packing."""
    weight = linear.weight
    if weight.device.type != "cpu":
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def prepack_linears(model: nn.Module, kept: Iterable[nn.Module] = ()) -> None:
    """Replace every plain `nn.Linear` in `model` that can be packed, but for those in `kept`."""
    left = {module for part in kept for module in part.modules()}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if child not in left and type(child) is nn.Linear and can_prepack(child)
    ]
    while places:  # one at a time: the plain weight is freed before the next
        parent, name, child = places.pop()
        setattr(parent, name, prepack(child.weight, child.bias))
        del child
    return_freed_memory()


def return_freed_memory() -> None:
    """Give freed weights back to the operating system; takes milliseconds.

    glibc keeps them for later allocations that never come: packing 255 MB of weights into 128 MB
    left the process 50 MB larger instead of 128 MB smaller. Other C libraries need no telling.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _is_exact_in_half(weight_OI: torch.Tensor) -> bool:
    if weight_OI.dtype != torch.float32 or torch.backends.quantized.engine not in {"x86", "fbgemm"}:
        return False
    # In pieces: copies of a whole LM head in two types would be the most memory that loading takes.
    num_rows = max(1, _CHECKED_ELEMENTS // weight_OI.shape[1])
    return all(torch.equal(rows.half().float(), rows) for rows in weight_OI.split(num_rows))
