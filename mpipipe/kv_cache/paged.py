"""The paged KV cache: fixed pages of all layers, addressed by the head's page lists.

Which page belongs to whom is not known here: the scheduler owns the accounting, and each step's
`BatchLayout` says where to write and what to read. Memory is zero and, on a CPU, committed by the
system only when a page is first written, so a generous `num_pages` costs nothing until it is used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from mpipipe.kv_cache.layout import BatchLayout, SequenceSpan

__all__ = ["PagedKVCache"]


class PagedKVCache:
    """K and V per layer as [num_pages, page_size, K, D]."""

    def __init__(
        self, keys: list[torch.Tensor], values: list[torch.Tensor], page_size: int
    ) -> None:
        self.keys = keys  # per layer [num_pages, page_size, K, D]
        self.values = values
        self.page_size = page_size

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> PagedKVCache:
        """A cache of zeros for `num_layers` layers of one stage."""
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        device = device or torch.device("cpu")
        keys = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        values = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        return cls(keys, values, page_size)

    def write(
        self, layer: int, key_TKD: torch.Tensor, value_TKD: torch.Tensor, layout: BatchLayout
    ) -> None:
        """Store this step's keys and values at the step's slots."""
        self.keys[layer].flatten(0, 1).index_copy_(0, layout.slots_T, key_TKD)
        self.values[layer].flatten(0, 1).index_copy_(0, layout.slots_T, value_TKD)

    def read(
        self, layer: int, index: int, span: SequenceSpan, layout: BatchLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of sequence `index` of the step, all `span.kv_len` tokens: two [L, K, D]."""
        num_pages = -(-span.kv_len // self.page_size)
        pages_P = layout.page_table_BP[index, :num_pages]
        key_LKD = self.keys[layer].index_select(0, pages_P).flatten(0, 1)
        value_LKD = self.values[layer].index_select(0, pages_P).flatten(0, 1)
        return key_LKD[: span.kv_len], value_LKD[: span.kv_len]

    def read_padded(
        self, layer: int, indices: tuple[int, ...], max_len: int, layout: BatchLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the step's sequences `indices`, whole pages: two [len(indices), L, K, D]."""
        num_pages = -(-max_len // self.page_size)
        pages_N = _pages(indices, num_pages, layout)
        keys, values = self.keys[layer], self.values[layer]
        # Page rows are copied whole: one memcpy of page_size * K * D elements per page.
        key_NX = keys.flatten(1).index_select(0, pages_N)
        value_NX = values.flatten(1).index_select(0, pages_N)
        shape = (len(indices), num_pages * self.page_size)
        return key_NX.view(*shape, *keys.shape[2:]), value_NX.view(*shape, *values.shape[2:])

    def forget(self, sequence_id: int) -> None:
        """Nothing: pages are the head's to give to the next sequence."""

    def num_bytes(self) -> int:
        """Memory reserved (not all of it committed)."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def _pages(indices: tuple[int, ...], num_pages: int, layout: BatchLayout) -> torch.Tensor:
    """The first `num_pages` pages of the sequences in one row; computed once per step."""
    key = ("paged", indices, num_pages)
    pages_N = layout.derived.get(key)
    if pages_N is None:
        table_BP = layout.page_table_BP
        rows_B = torch.tensor(indices, dtype=torch.int64, device=table_BP.device)
        pages_N = table_BP.index_select(0, rows_B)[:, :num_pages].flatten()
        layout.derived[key] = pages_N
    assert isinstance(pages_N, torch.Tensor)
    return pages_N


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU from calloc, which commits nothing (torch.zeros writes every byte)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    buffer = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(buffer).view(dtype).view(shape)
