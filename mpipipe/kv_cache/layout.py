"""`BatchLayout`: what caches and attention need to know about one step's tokens.

A step is *varlen*: the tokens of all its sequences lie one after the other in one row of T tokens,
with no padding. Shape letters used in this package: T tokens of the step, B sequences of the step,
L cached tokens of one sequence (this step's included), P pages, K key/value heads, H query heads,
D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from mpipipe.kv_cache.common_tables import CommonTables

__all__ = [
    "BatchLayout",
    "SequenceLens",
    "build_layout",
    "decode_layout",
    "place_rows",
    "to_device",
]

DerivedT = TypeVar("DerivedT")


@dataclass(frozen=True, slots=True)
class SequenceLens:
    """Where one sequence lies in the step, and how much of it is cached after the step's write."""

    sequence_id: int
    query_start: int  # first row in T
    query_len: int  # rows of this sequence in this step
    kv_len: int  # L: cached tokens including this step's
    rotary_len: int = 0  # as `RequestOpened.rotary_len`; 0: no token sees beyond itself

    @property
    def num_computed(self) -> int:
        """Tokens cached before this step."""
        return self.kv_len - self.query_len


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """One step's tokens, positions and pages. Built once per step, shared by all layers.

    Decode sequences (query_len 1) come first; `num_decodes` counts the leading ones.
    """

    seq_lens: tuple[SequenceLens, ...]  # B entries; decodes first
    num_decodes: int
    positions_T: torch.Tensor  # int64 [T]: position of each token in its sequence
    slot_mapping_T: torch.Tensor  # int64 [T]: page * page_size + offset, where K and V are written
    page_table_BP: torch.Tensor  # int64 [B, max pages of the step], 0-padded; int32 on a GPU
    kv_lens_B: torch.Tensor  # int64 [B]; int32 on a GPU
    query_starts_B1: torch.Tensor | None = None  # int32 [B + 1] on a GPU: first row of each, then T
    max_query_len: int = 0  # on a GPU: the longest query_len, known to the host
    max_kv_len: int = 0  # on a GPU: a bound of kv_lens_B, known to the host
    # int64 [T]: the length that each token's rotary embedding sees, where the model's frequencies
    # depend on it; None: position + 1, as in all decode steps.
    rotary_lens_T: torch.Tensor | None = None
    common: CommonTables | None = None  # of a decode step; None: each row reads alone
    _derived: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.positions_T.shape[0])

    def derive(self, key: tuple[object, ...], compute: Callable[[], DerivedT]) -> DerivedT:
        """What `compute` gives, once per step: masks and gather indices that all layers share.

        Keys start with the owner's name.
        """
        found: DerivedT | None = self._derived.get(key)
        if found is None:
            found = self._derived[key] = compute()
        return found

    @property
    def is_decode(self) -> bool:
        """A step of decodes only: one row per sequence. No other kind may lack `seq_lens`."""
        return self.num_decodes == self.num_tokens


def build_layout(
    entries: Sequence[tuple[SequenceLens, Sequence[int]]],
    page_size: int,
    *,
    rotary_by_length: bool = False,
) -> BatchLayout:
    """The layout of a step from `entries`: each sequence's lengths and its pages.

    A sequence's page i holds its tokens [i * page_size, (i + 1) * page_size); pages beyond
    `kv_len` may be given and are ignored. Sequences lie one after the other from row 0, decodes
    first; a single-token chunk behind longer ones is treated as a chunk. `rotary_by_length`: the
    model needs `rotary_lens_T`.
    """
    seq_lens = tuple(seq for seq, _ in entries)
    num_tokens = sum(seq.query_len for seq in seq_lens)
    max_pages = max((-(-seq.kv_len // page_size) for seq in seq_lens), default=0)
    positions_T = np.empty(num_tokens, dtype=np.int64)
    pages_T = np.empty(num_tokens, dtype=np.int64)
    page_table_BP = np.zeros((len(seq_lens), max_pages), dtype=np.int64)
    row = 0
    for index, (seq, pages) in enumerate(entries):
        num_pages = -(-seq.kv_len // page_size)
        assert seq.query_start == row, f"sequence {index} starts at {seq.query_start}, not {row}"
        assert len(pages) >= num_pages, f"{len(pages)} pages for {seq.kv_len} tokens"
        table_P = page_table_BP[index]
        table_P[:num_pages] = pages[:num_pages]
        end = row + seq.query_len
        if seq.query_len == 1:  # no arrays for the common case: a decode costs 1 µs, not 5
            positions_T[row] = seq.kv_len - 1
            pages_T[row] = table_P[num_pages - 1]
        else:
            positions_T[row:end] = np.arange(seq.num_computed, seq.kv_len)
            pages_T[row:end] = table_P[positions_T[row:end] // page_size]
        row = end
    slot_mapping_T = pages_T * page_size + positions_T % page_size
    return BatchLayout(
        seq_lens=seq_lens,
        num_decodes=sum(1 for _ in takewhile(lambda seq: seq.query_len == 1, seq_lens)),
        positions_T=torch.from_numpy(positions_T),
        slot_mapping_T=torch.from_numpy(slot_mapping_T),
        page_table_BP=torch.from_numpy(page_table_BP),
        kv_lens_B=torch.tensor([seq.kv_len for seq in seq_lens], dtype=torch.int64),
        rotary_lens_T=_rotary_lens(seq_lens, positions_T) if rotary_by_length else None,
    )


def _rotary_lens(seq_lens: Sequence[SequenceLens], positions_T: np.ndarray) -> torch.Tensor | None:
    """What tokens see beyond themselves: with the prompt's first pass, all of the prompt."""
    if all(seq.rotary_len <= seq.num_computed + 1 for seq in seq_lens):
        return None
    begun_T = np.repeat([s.rotary_len for s in seq_lens], [s.query_len for s in seq_lens])
    return torch.from_numpy(np.maximum(positions_T + 1, begun_T))


def to_device(
    layout: BatchLayout,
    sent: Callable[[torch.Tensor], torch.Tensor],
    *,
    max_kv_len: int | None = None,
) -> BatchLayout:
    """`layout`, built on the host, for kernels on a GPU: int32 tables, query starts, bounds.

    Args:
        layout: of a step.
        sent: copies a host tensor to the GPU, in the order of the current stream.
        max_kv_len: what no sequence of any step exceeds, so that decodes are cut as in the graphs;
            None: the longest of this step.
    """
    longest = max((seq.kv_len for seq in layout.seq_lens), default=0)
    starts = [seq.query_start for seq in layout.seq_lens] + [layout.num_tokens]
    return BatchLayout(
        seq_lens=layout.seq_lens,
        num_decodes=layout.num_decodes,
        positions_T=sent(layout.positions_T),
        slot_mapping_T=sent(layout.slot_mapping_T),
        page_table_BP=sent(layout.page_table_BP.int()),
        kv_lens_B=sent(layout.kv_lens_B.int()),
        query_starts_B1=sent(torch.tensor(starts, dtype=torch.int32)),
        max_query_len=max((seq.query_len for seq in layout.seq_lens), default=0),
        max_kv_len=longest if max_kv_len is None else max_kv_len,
        rotary_lens_T=None if layout.rotary_lens_T is None else sent(layout.rotary_lens_T),
    )


def place_rows(
    page_table_BP: torch.Tensor, kv_lens_B: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Position and cache slot of each row's last token: two int64 [B]; as in `decode_layout`."""
    positions_B = (kv_lens_B.long() - 1).clamp_(min=0)
    pages_B1 = page_table_BP.gather(1, (positions_B // page_size).unsqueeze(1))
    return positions_B, pages_B1.squeeze(1).long() * page_size + positions_B % page_size


def decode_layout(
    page_table_BP: torch.Tensor,
    kv_lens_B: torch.Tensor,
    *,
    page_size: int,
    max_kv_len: int,
    placed: tuple[torch.Tensor, torch.Tensor] | None = None,
    common: CommonTables | None = None,
) -> BatchLayout:
    """The layout of a decode step from device tensors alone, fit for a CUDA graph: no `seq_lens`.

    Args:
        page_table_BP: int32.
        kv_lens_B: int32, this step's token included; 0 marks a row that holds no sequence. Such a
            row reads nothing and writes to page `page_table_BP[row, 0]`.
        page_size: tokens per page.
        max_kv_len: what no entry of `kv_lens_B` exceeds in any replay of the graph.
        placed: positions and cache slots of the rows, int64 [B] each, where they are known.
        common: which rows may read pages together.
    """
    if placed is None:
        placed = place_rows(page_table_BP, kv_lens_B, page_size)
    return BatchLayout(
        seq_lens=(),
        num_decodes=int(kv_lens_B.shape[0]),
        positions_T=placed[0],
        slot_mapping_T=placed[1],
        page_table_BP=page_table_BP,
        kv_lens_B=kv_lens_B,
        max_query_len=1,
        max_kv_len=max_kv_len,
        common=common,
    )
