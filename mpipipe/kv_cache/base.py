"""The contract of a KV cache as attention sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from mpipipe.kv_cache.layout import BatchLayout, SequenceLens

__all__ = ["KVCache"]


class KVCache(Protocol):
    """Holds K and V of every layer of one stage. `layer` counts within the stage, from 0."""

    def write(
        self, layer: int, key_TKD: torch.Tensor, value_TKD: torch.Tensor, layout: BatchLayout
    ) -> None:
        """Store this step's keys and values."""

    def read(
        self, layer: int, index: int, seq: SequenceLens, layout: BatchLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of sequence `index` of the step, all `seq.kv_len` tokens: two [L, K, D]."""

    def read_padded(
        self, layer: int, indices: tuple[int, ...], max_len: int, layout: BatchLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the step's sequences `indices`, padded: two [len(indices), >= max_len, K, D].

        What lies beyond a sequence's `kv_len` is any finite number: mask it.
        """

    def forget(self, sequence_id: int) -> None:
        """Drop what is kept per sequence (nothing for paged: its pages are the head's)."""

    def num_bytes(self) -> int:
        """Memory reserved."""
