"""Varlen steps for the attention and cache suites: sequences that grow over several steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mpipipe.kv_cache.layout import (
    BatchLayout,
    SequenceLens,
    build_layout,
    decode_layout,
    to_device,
)

PAGE_SIZE = 4
NUM_PAGES = 128


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Step:
    layout: BatchLayout
    query_THD: torch.Tensor
    key_TKD: torch.Tensor
    value_TKD: torch.Tensor


class PageTable:
    """Gives pages in a scattered order, so that a wrong page index cannot go unnoticed."""

    def __init__(self) -> None:
        self.free = [(7 * index + 3) % NUM_PAGES for index in range(NUM_PAGES)]
        assert len(set(self.free)) == NUM_PAGES
        self.pages: dict[int, list[int]] = {}
        self.kv_lens: dict[int, int] = {}

    def layout(self, query_lens: Sequence[tuple[int, int]]) -> BatchLayout:
        """The layout of a step of (sequence id, tokens) in this order."""
        entries = []
        row = 0
        for sequence_id, query_len in query_lens:
            pages = self.pages.setdefault(sequence_id, [])
            kv_len = self.kv_lens.get(sequence_id, 0) + query_len
            while len(pages) * PAGE_SIZE < kv_len:
                pages.append(self.free.pop())
            self.kv_lens[sequence_id] = kv_len
            entries.append((SequenceLens(sequence_id, row, query_len, kv_len), list(pages)))
            row += query_len
        return build_layout(entries, PAGE_SIZE)

    def drop(self, sequence_id: int) -> None:
        """Give the sequence's pages back and forget its length, as a preemption does."""
        self.free.extend(self.pages.pop(sequence_id))
        self.kv_lens.pop(sequence_id)


# Fresh prompts; a decode beside a continued chunk and a new prompt; decodes of unequal lengths
# (one of them more than 128 tokens behind: its own gather); a single-token chunk at the end.
MIXED_STEPS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 5), (1, 9)),
    ((0, 1), (1, 3), (2, 4)),
    ((0, 1), (1, 1), (2, 1)),
    ((1, 1), (2, 1), (3, 200)),
    ((0, 1), (2, 1), (3, 1), (1, 6)),
    ((3, 1), (0, 1), (1, 1), (2, 1)),
    ((0, 1), (2, 2), (1, 1)),
)


def random_steps(shape: Shape, dtype: torch.dtype) -> Iterator[Step]:
    """The steps of `MIXED_STEPS` with random queries, keys and values; the same every time."""
    generator = torch.Generator().manual_seed(0)
    pages = PageTable()
    for query_lens in MIXED_STEPS:
        layout = pages.layout(query_lens)

        def draw(num_heads: int, num_tokens: int = layout.num_tokens) -> torch.Tensor:
            # as the layers hand it over: heads first, viewed as tokens first
            drawn = torch.randn(num_heads, num_tokens, shape.head_dim, generator=generator)
            return drawn.to(dtype).transpose(0, 1)

        yield Step(
            layout, draw(shape.num_heads), draw(shape.num_kv_heads), draw(shape.num_kv_heads)
        )


def shared_step(shape: Shape, dtype: torch.dtype) -> tuple[Step, Step, list[int]]:
    """A prompt, and behind it another one that reads the first two pages of it in the same step.

    Then the same with both computed whole, and its rows that must be those of the first.
    """
    generator = torch.Generator().manual_seed(1)
    common, first, second = 2 * PAGE_SIZE, 2 * PAGE_SIZE + 3, 2 * PAGE_SIZE + 5

    def draw(num_heads: int, num_tokens: int) -> torch.Tensor:
        drawn = torch.randn(num_heads, num_tokens, shape.head_dim, generator=generator)
        return drawn.to(dtype).transpose(0, 1)

    lens = (SequenceLens(0, 0, first, first), SequenceLens(1, first, second, second))
    whole = Step(
        build_layout([(lens[0], [9, 5, 7]), (lens[1], [1, 2, 3, 4])], PAGE_SIZE),
        draw(shape.num_heads, first + second),
        draw(shape.num_kv_heads, first + second),
        draw(shape.num_kv_heads, first + second),
    )
    for rows_TKD in (whole.key_TKD, whole.value_TKD):
        rows_TKD[first : first + common] = rows_TKD[:common]
    rows = [*range(first), *range(first + common, first + second)]
    shared = SequenceLens(1, first, second - common, second)
    layout = build_layout([(lens[0], [9, 5, 7]), (shared, [9, 5, 3, 4])], PAGE_SIZE)
    parts = (whole.query_THD, whole.key_TKD, whole.value_TKD)
    return Step(layout, *(part[rows] for part in parts)), whole, rows


# Decode steps of sequences that share pages: the length of each, and its page table. Among them are
# rows that share more with some than with others, sharers of very different lengths, one with no
# token of its own but the newest, one alone, and a page that the newest token has just filled.
_A, _B = [91, 7, 53, 28, 66, 12, 80, 3], [5, 77, 21]
SHARING_STEPS: tuple[tuple[tuple[int, list[int]], ...], ...] = (
    (
        (30, _A),
        (33, [*_A, 40]),
        (14, [*_B, 41]),
        (26, [*_A[:6], 42]),
        (9, [43, 44, 45]),
        (15, [*_B, 46]),
    ),
    (
        (31, _A),
        (34, [*_A, 40]),
        (16, [*_B, 46]),
        (25, [*_A[:6], 47]),
        (164, [*_A[:6], *range(93, 128)]),
    ),
    (
        (26, [*_A[:2], *range(50, 55)]),
        (26, [*_A[:2], *range(56, 61)]),
        (33, [*_B, *range(30, 36)]),
        (33, [*_A, 40]),
        (32, _A),
        (34, [*_A, 47]),
    ),
    ((35, [*_A, 40]),),
    ((17, [*_B, 46, 48]), (36, [*_A, 40])),
)


def sharing_steps(shape: Shape, dtype: torch.dtype) -> Iterator[Step]:
    """Those of `SHARING_STEPS` with random rows for the newest tokens; the others are cached."""
    generator = torch.Generator().manual_seed(2)

    def draw(num_heads: int, num_tokens: int) -> torch.Tensor:
        drawn = torch.randn(num_heads, num_tokens, shape.head_dim, generator=generator)
        return drawn.to(dtype).transpose(0, 1)

    for rows in SHARING_STEPS:
        entries = [
            (SequenceLens(row, row, 1, kv_len), table) for row, (kv_len, table) in enumerate(rows)
        ]
        layout, num_rows = build_layout(entries, PAGE_SIZE), len(rows)
        yield Step(
            layout,
            draw(shape.num_heads, num_rows),
            draw(shape.num_kv_heads, num_rows),
            draw(shape.num_kv_heads, num_rows),
        )


def on_device(step: Step, device: torch.device) -> Step:
    """The step as kernels get it: int32 tables and query starts, on `device`."""
    return Step(
        to_device(step.layout, lambda tensor: tensor.to(device)),
        step.query_THD.to(device),
        step.key_TKD.to(device),
        step.value_TKD.to(device),
    )


def without_spans(step: Step, *, max_kv_len: int, spare_page: int) -> Step:
    """A decode step from device tensors alone, with an empty row at its end.

    The empty row writes to `spare_page`; its output is the last one.
    """
    layout = step.layout
    assert layout.is_decode
    table_BP = layout.page_table_BP.int()
    spare_1P = torch.full_like(table_BP[:1], spare_page)
    lens_B = layout.kv_lens_B.int()
    page_table_BP = torch.cat((table_BP, spare_1P))
    longer = decode_layout(
        page_table_BP,
        torch.cat((lens_B, torch.zeros_like(lens_B[:1]))),
        page_size=PAGE_SIZE,
        max_kv_len=max_kv_len,
    )

    def with_row(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat((rows, torch.ones_like(rows[:1])))

    return Step(longer, with_row(step.query_THD), with_row(step.key_TKD), with_row(step.value_TKD))
