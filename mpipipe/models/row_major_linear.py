"""Linear layers on a CPU whose weight stays as it lies: memory that others write or read, too.

A streamed weight is a view of a staging buffer, the weight of a tied LM head is the embedding: a
packed copy of either (`prepacked_linear`) would be memory that no plan has reckoned with. torch's
plain `F.linear` reads a row-major weight badly for a few rows; block by block of its rows, each of
which stays in a core's cache, it is read as fast as a packed one.

Measured on one core, the thread's own time (the machine was busy), best of 21, float32,
milliseconds by rows; the merged matrices of 12 layers of SmolLM2 (135M), 170 MB:

    rows                  1     2     3     4     8    12    16    32    64
    F.linear             11    13    14    21    26    32    28    35    50
    in blocks            13    14    16    15    15    18    29    38    56
    oneDNN, unpacked     14    20    20    19    18    21    26    34    48
    oneDNN, packed       13    14    15    15    17    19    21    29    43

Shape letters: T rows, O and I the sides of a weight.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear

from mpipipe.models.prepacked_linear import can_prepack

__all__ = ["RowMajorLinear", "as_it_lies"]

_VERY_FEW_ROWS, _FEW_ROWS = 3, 12
_BLOCK_ELEMENTS = 1 << 17  # half a MiB in float32: a quarter of a core's second-level cache


class RowMajorLinear(nn.Module):
    """Computes what the `nn.Linear` of its weight does, up to rounding.

    Args:
        weight_OI: where `can_prepack` allows to pack it. No parameter of this module: others
            load it.
        bias_O: as the weight.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self._weight_OI = weight_OI.detach()
        self._bias_O = None if bias_O is None else bias_O.detach()
        self._block_rows = max(1, _BLOCK_ELEMENTS // weight_OI.shape[1])
        self._blocks_IB = tuple(block.t() for block in self._weight_OI.split(self._block_rows))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        num_rows = rows.numel() // rows.shape[-1]
        if rows.dtype != torch.float32 or num_rows > _FEW_ROWS:
            output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                rows, self._weight_OI, self._bias_O, "none", [], ""
            )
            return output
        if num_rows <= _VERY_FEW_ROWS:
            return linear(rows, self._weight_OI, self._bias_O)
        out_TO = self._in_blocks(rows.reshape(num_rows, rows.shape[-1]))
        return out_TO.view(*rows.shape[:-1], out_TO.shape[-1])

    def _in_blocks(self, rows_TI: torch.Tensor) -> torch.Tensor:
        out_TO = rows_TI.new_empty(len(rows_TI), len(self._weight_OI))
        parts_TB = out_TO.split(self._block_rows, dim=1)
        for part_TB, block_IB in zip(parts_TB, self._blocks_IB, strict=True):
            torch.mm(rows_TI, block_IB, out=part_TB)
        return out_TO if self._bias_O is None else out_TO.add_(self._bias_O)

    def plus(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same, with `residual` added."""
        return self.forward(rows).add_(residual)


def as_it_lies(module: nn.Module) -> nn.Module:
    """The faster form of a plain linear, without a copy of its weight; else `module` itself."""
    if type(module) is nn.Linear and can_prepack(module):
        return RowMajorLinear(module.weight, module.bias)
    return module
