"""The contract of a KV cache as attention sees it, and the slow and simple one: the tests' oracle.

The contiguous cache keeps one growing tensor per sequence. It knows nothing of pages: what
`BatchLayout` says about slots and page tables is ignored, which is what makes it a check on them. A
sequence that starts again (preempted, `num_computed == 0`) starts with nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from mpipipe.kv_cache.layout import BatchLayout, SequenceLens

__all__ = ["ContiguousKVCache", "KVCache"]


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


class ContiguousKVCache:
    """K and V as [L, K, D] per (layer, sequence)."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def write(
        self, layer: int, key_TKD: torch.Tensor, value_TKD: torch.Tensor, layout: BatchLayout
    ) -> None:
        """Append this step's keys and values to those of each sequence."""
        for seq in layout.seq_lens:
            rows = slice(seq.query_start, seq.query_start + seq.query_len)
            # clone: the rows may be views of a tensor that the layer reuses
            key_LKD, value_LKD = key_TKD[rows].clone(), value_TKD[rows].clone()
            entry = (layer, seq.sequence_id)
            if seq.num_computed > 0:
                old_key_LKD, old_value_LKD = self.entries[entry]
                assert old_key_LKD.shape[0] == seq.num_computed, (
                    f"sequence {seq.sequence_id} has {old_key_LKD.shape[0]} tokens cached, "
                    f"the step says {seq.num_computed}"
                )
                key_LKD = torch.cat((old_key_LKD, key_LKD))
                value_LKD = torch.cat((old_value_LKD, value_LKD))
            self.entries[entry] = (key_LKD, value_LKD)

    def read(
        self, layer: int, index: int, seq: SequenceLens, layout: BatchLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of sequence `index` of the step: two [L, K, D]."""
        assert layout.seq_lens[index] == seq, f"sequence {index} of the step is another one"
        return self.entries[layer, seq.sequence_id]

    def read_padded(
        self, layer: int, indices: tuple[int, ...], max_len: int, layout: BatchLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the step's sequences `indices`, zero-padded: two [len(indices), L, K, D]."""
        pairs = [self.entries[layer, layout.seq_lens[index].sequence_id] for index in indices]
        return (
            torch.stack([_padded(key_LKD, max_len) for key_LKD, _ in pairs]),
            torch.stack([_padded(value_LKD, max_len) for _, value_LKD in pairs]),
        )

    def forget(self, sequence_id: int) -> None:
        """Drop the sequence's tensors of all layers."""
        for entry in [entry for entry in self.entries if entry[1] == sequence_id]:
            del self.entries[entry]

    def num_bytes(self) -> int:
        """Memory held at this moment."""
        return sum(key.nbytes + value.nbytes for key, value in self.entries.values())


def _padded(tensor_LKD: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - tensor_LKD.shape[0]
    return torch.nn.functional.pad(tensor_LKD, (0, 0, 0, 0, 0, missing))
