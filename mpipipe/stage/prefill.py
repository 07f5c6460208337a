"""What the engine works out about varlen steps, those of prompt chunks above all; no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpipipe.kv_cache.layout import SequenceLens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.control_plane.messages import ScheduledSequence
    from mpipipe.planning.plan import PipelinePlan

__all__ = ["full_decode", "full_prefill", "sampled_rows"]


def full_prefill(plan: PipelinePlan) -> tuple[list[SequenceLens], range]:
    """Prompts that fill a step to `max_tokens_per_step`, and pages enough for each of them."""
    seq_lens: list[SequenceLens] = []
    first = 0
    longest = min(plan.max_sequence_tokens, plan.num_kv_pages * plan.page_size_tokens)
    while first < plan.max_tokens_per_step:
        length = min(longest, plan.max_tokens_per_step - first)
        seq_lens.append(SequenceLens(len(seq_lens), first, length, length))
        first += length
    return seq_lens, range(-(-longest // plan.page_size_tokens))


def full_decode(plan: PipelinePlan) -> tuple[list[SequenceLens], range]:
    """Decodes of as many sequences as a slot may have, as long as all pages let them be; pages.

    One of them is twice as long as the others, which is as much padding as there can be.
    """
    rows = plan.max_sequences_per_slot
    num_pages = max(1, plan.num_kv_pages // (rows + 1))
    most = min(2 * num_pages, plan.num_kv_pages)
    lengths = [most * plan.page_size_tokens] + [num_pages * plan.page_size_tokens] * (rows - 1)
    seq_lens = [
        SequenceLens(row, row, 1, min(plan.max_sequence_tokens, length))
        for row, length in enumerate(lengths)
    ]
    return seq_lens, range(most)


def sampled_rows(chunks: Sequence[ScheduledSequence], first_row: int = 0) -> np.ndarray:
    """The last row of each chunk that samples, chunks lying from `first_row` on: int64 [S]."""
    rows: list[int] = []
    end = first_row
    for chunk in chunks:
        end += chunk.num_tokens
        if chunk.sample:
            rows.append(end - 1)
    return np.array(rows, dtype=np.int64)
