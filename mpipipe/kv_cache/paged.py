"""The paged KV cache: fixed pages of all layers, addressed by the head's page lists.

The pages of some layers may be in pinned host memory (`HostLayers`). Kernels then read them over
the link, only the pages of the sequences of a step, when it comes to that layer.

The scheduler decides which sequence owns which page; each step's `BatchLayout` says where to write
and what to read. Memory is zero and, on a CPU, committed by the
system only when a page is first written, so a generous `num_pages` costs nothing until it is used.

The tensors always have the shape [num_pages, page_size, K, D]. On a GPU the memory behind it may be
*head-major* ([num_pages, K, page_size, D]): a head's tokens of one page lie side by side, which is
how attention kernels read them. So nothing here may assume that the tensors are contiguous:
`flatten` of a strided tensor is a copy, and writing to it writes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mpipipe.kv_cache.layout import BatchLayout, SequenceLens

__all__ = ["HostLayers", "PagedKVCache", "store_rows"]

ROW_MULTIPLE = 8  # elements of 2 bytes: 16 bytes, the widest load


@dataclass(frozen=True, slots=True)
class HostLayers:
    """The layers whose pages are in host memory, numbered within the stage.

    `memory` gives so many bytes: uint8, pinned memory of the host as the device sees it.
    """

    layers: tuple[int, ...]
    memory: Callable[[int], torch.Tensor]


class PagedKVCache:
    """K and V per layer as [num_pages, page_size, K, D]."""

    def __init__(
        self,
        pages_NPX: torch.Tensor,
        parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        page_size: int,
        host_bytes: int = 0,
    ) -> None:
        self.pages_NPX = pages_NPX  # on the device: [2 * layers, num_pages, elements of a page]
        self.keys = [key for key, _ in parts]  # per layer [num_pages, page_size, K, D]
        self.values = [value for _, value in parts]
        self.page_size = page_size
        self.host_bytes = host_bytes  # of the layers that are not on the device

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
        head_major: bool = False,
        host: HostLayers | None = None,
    ) -> PagedKVCache:
        """A cache of zeros for `num_layers` layers of one stage.

        `head_major`: lay a page out as [K, page_size, D], each row of D padded to 16 bytes, for
        GPU kernels; the tensors' shape stays the same. Padding rows of 100 to 104 lets a kernel
        load 16 bytes at a time: 495 instead of 621 µs for 256 sequences of 512 tokens (H200).
        """
        page, row = (page_size, num_kv_heads), head_dim
        if head_major:
            page, row = (num_kv_heads, page_size), -(-head_dim // ROW_MULTIPLE) * ROW_MULTIPLE
        host_layers = () if host is None else host.layers
        shape = (2 * (num_layers - len(host_layers)), num_pages, *page, row)
        pages = _zeros(shape, dtype, device or torch.device("cpu"))
        on_device = on_host = _pairs(pages, head_dim, head_major)
        host_bytes = 0
        if host is not None:
            shape = (2 * len(host_layers), *shape[1:])
            host_bytes = math.prod(shape) * dtype.itemsize
            in_host = host.memory(host_bytes).zero_().view(dtype).view(shape)
            on_host = _pairs(in_host, head_dim, head_major)
        parts = [next(on_host if n in host_layers else on_device) for n in range(num_layers)]
        return cls(pages.flatten(2), parts, page_size, host_bytes)

    def write(
        self, layer: int, key_TKD: torch.Tensor, value_TKD: torch.Tensor, layout: BatchLayout
    ) -> None:
        """Store this step's keys and values at the step's slots."""
        store_rows(self.keys[layer], layout.slot_mapping_T, key_TKD)
        store_rows(self.values[layer], layout.slot_mapping_T, value_TKD)

    def read(
        self, layer: int, index: int, seq: SequenceLens, layout: BatchLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of sequence `index` of the step, all `seq.kv_len` tokens: two [L, K, D]."""
        num_pages = -(-seq.kv_len // self.page_size)
        pages_P = layout.page_table_BP[index, :num_pages]
        key_LKD = self.keys[layer].index_select(0, pages_P).flatten(0, 1)
        value_LKD = self.values[layer].index_select(0, pages_P).flatten(0, 1)
        return key_LKD[: seq.kv_len], value_LKD[: seq.kv_len]

    def read_padded(
        self,
        layer: int,
        indices: tuple[int, ...],
        max_len: int,
        layout: BatchLayout,
        *,
        first_page: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the step's sequences `indices`, whole pages: two [len(indices), L, K, D].

        `first_page`: of each of them, from which on they are read.
        """
        num_pages = min(-(-max_len // self.page_size), layout.page_table_BP.shape[1])
        pages_N = layout.derive(
            ("paged", indices, first_page, num_pages),
            lambda: _pages(indices, slice(first_page, num_pages), layout),
        )
        keys, values = self.keys[layer], self.values[layer]
        if keys.is_contiguous():
            # Page rows are copied whole: one memcpy of page_size * K * D elements per page.
            keys, values = keys.flatten(1), values.flatten(1)
        key_NX, value_NX = keys.index_select(0, pages_N), values.index_select(0, pages_N)
        num_tokens = (num_pages - first_page) * self.page_size
        shape = (len(indices), num_tokens, *self.keys[layer].shape[2:])
        return key_NX.view(shape), value_NX.view(shape)

    def forget(self, sequence_id: int) -> None:
        """Nothing: pages are the head's to give to the next sequence."""

    def num_bytes(self) -> int:
        """Memory reserved on the device (not all of it committed)."""
        return self.pages_NPX.nbytes


def store_rows(
    pages_PSKD: torch.Tensor, slot_mapping_T: torch.Tensor, rows_TKD: torch.Tensor
) -> None:
    """Write row t to slot `slot_mapping_T[t]` (page * page_size + offset) of keys or values.

    The cache tensor may be strided. Two rows with the same slot: one of them stays.
    """
    if pages_PSKD.is_contiguous():
        pages_PSKD.flatten(0, 1).index_copy_(0, slot_mapping_T, rows_TKD)
        return
    page_size = pages_PSKD.shape[1]
    pages_PSKD.index_put_((slot_mapping_T // page_size, slot_mapping_T % page_size), rows_TKD)


def _pages(indices: tuple[int, ...], columns: slice, layout: BatchLayout) -> torch.Tensor:
    """The pages of the sequences in `columns` of the page table, in one row."""
    table_BP = layout.page_table_BP
    if indices != tuple(range(table_BP.shape[0])):
        rows_B = torch.tensor(indices, dtype=torch.int64, device=table_BP.device)
        table_BP = table_BP.index_select(0, rows_B)
    return table_BP[:, columns].flatten()


def _pairs(
    pages: torch.Tensor, head_dim: int, head_major: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values by layer: of memory [2 * layers, num_pages, …, row], keys first."""
    parts = pages[..., :head_dim].transpose(2, 3) if head_major else pages
    keys, values = parts.tensor_split(2)
    return zip(keys.unbind(), values.unbind(), strict=True)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU from calloc, which commits nothing (torch.zeros writes every byte)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    buffer = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(buffer).view(dtype).view(shape)
