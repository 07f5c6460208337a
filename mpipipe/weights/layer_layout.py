"""How the tensors of one module lie in one flat buffer of bytes, so that they move in one copy.

Invariant: tensors that a faster form of the layer merges (q, k and v; gate and up; their weights,
biases and scales each) lie side by side without a gap, so that merging them is a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["ALIGNMENT", "GROUP_ALIGNMENT", "Layout", "Span", "aligned_bytes"]

ALIGNMENT = 4096  # of buffers and of regions of a file, so that pages map to pages
GROUP_ALIGNMENT = 256  # what kernels may ask of a pointer
_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Span:
    """Where one tensor lies in a buffer."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor in `buffer`, uint8 [n]."""
        part = buffer[self.offset : self.offset + self.num_bytes]
        return part.view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of one module in one buffer."""

    spans: Mapping[str, Span]  # by name
    num_bytes: int  # a multiple of ALIGNMENT

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Layout:
        """The layout for tensors of these names, shapes and types, none of which is read."""
        spans: dict[str, Span] = {}
        end = 0
        group: tuple[str, ...] = ()
        for name in sorted(tensors, key=_place):
            if _place(name)[:-1] != group:
                group, end = _place(name)[:-1], _rounded(end, GROUP_ALIGNMENT)
            span = Span(end, tuple(tensors[name].shape), tensors[name].dtype)
            spans[name] = span
            end += span.num_bytes
        return cls(spans, _rounded(end, ALIGNMENT))

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in `buffer`, uint8 [at least num_bytes], by name."""
        return {name: span.view(buffer) for name, span in self.spans.items()}


def aligned_bytes(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory on `device` that begins at a multiple of ALIGNMENT: uint8 [num_bytes]."""
    whole = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + num_bytes]


def _place(name: str) -> tuple[str, ...]:
    """Sorts what is merged side by side: (parent, merged name, leaf, number among the merged)."""
    module, _, leaf = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    for merged in _MERGED:
        if last in merged:
            return parent, merged[0], leaf, str(merged.index(last))
    return parent, last, leaf, ""


def _rounded(num_bytes: int, multiple: int) -> int:
    return -(-num_bytes // multiple) * multiple
