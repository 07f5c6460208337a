"""What a stage knows from the head's messages: the rows of every slot and how long they have grown.

From it follows the work of a step (`StepWork`) and which earlier step's tokens it reads.

Invariant: as on a real stage (`stage/decode_batch.py`), only messages change what is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mpipipe.control_plane.messages import (
    DecodeScheduled,
    PagesRestored,
    ScheduledSequence,
    StepScheduled,
)
from mpipipe.kv_cache.common_pages import CommonPages, common_pages
from mpipipe.planning.padding import (
    MIN_SPARED_TOKENS,
    MIN_SPARED_TOKENS_GPU,
    joined_tokens,
    padded_tokens,
)
from mpipipe.simulation.stage_times import StepWork

__all__ = ["FollowedSteps", "Step"]

Step = StepScheduled | DecodeScheduled

# Contexts are counted in parts of this size, so that few kinds of work have to be timed.
_CONTEXT_GRAIN = 8


@dataclass(slots=True)
class _SlotRows:
    """The decode batch of a slot, as all stages hold it."""

    ids: list[int] = field(default_factory=list)  # sequences
    offsets: list[int] = field(default_factory=list)  # tokens in the cache, less `rounds`
    sum_of_offsets: int = 0
    pages: list[tuple[int, ...]] = field(default_factory=list)  # whole ones, when a row joined
    groups: list[CommonPages] = field(default_factory=list)  # of rows, which read pages together
    rounds: int = 0
    last_step: int = -1  # the latest that sampled the rows


class FollowedSteps:
    """Follows the steps of one replica in their order.

    Args:
        num_slots: in the ring.
        pads: attention reads all rows of a step as `planning.padding` has it; else, as on a GPU,
            each as long as it is.
        shared_page_size: tokens of a page, where rows read pages that they share once; else 0.
    """

    def __init__(self, num_slots: int, *, pads: bool = False, shared_page_size: int = 0) -> None:
        self._pads = pads
        self._page_size = shared_page_size
        self._pages: dict[int, tuple[int, ...]] = {}  # of open sequences, where pages are shared
        self._slots = [_SlotRows() for _ in range(num_slots)]
        # Of sequences whose prompt is computed, or whose pages came back, and that are in no batch:
        # tokens, and by which step.
        self._prefilled: dict[int, tuple[int, int]] = {}

    @property
    def num_slots(self) -> int:
        """In the ring."""
        return len(self._slots)

    def follow(self, step: Step) -> tuple[StepWork, int]:
        """The work of `step`, and the latest step whose tokens it reads; -1: it reads none."""
        chunks = step.sequences if isinstance(step, StepScheduled) else step.chunks
        rows, context_tokens, needed = 0, 0.0, -1
        if isinstance(step, DecodeScheduled):
            rows, context_tokens, needed = self._decode(step)
        num_tokens, context = self._prefill(step.step, chunks)
        work = StepWork(
            rows=rows,
            context_tokens=_grained(context_tokens),
            chunk_tokens=num_tokens,
            chunk_context_tokens=_grained(context),
            num_sampled=step.num_sampled,
        )
        return work, needed

    def open(self, sequence_id: int) -> None:
        """A sequence begins, or begins again: it has no pages."""
        self._pages.pop(sequence_id, None)

    def close(self, sequence_ids: Sequence[int]) -> None:
        """Sequences have ended."""
        for sequence_id in sequence_ids:
            self._pages.pop(sequence_id, None)

    def restore(self, restored: PagesRestored) -> None:
        """A sequence goes on with the tokens in its pages, all of which the head knows."""
        if self._page_size:
            self._pages[restored.sequence_id] = tuple(restored.pages)
        self._prefilled[restored.sequence_id] = (restored.num_computed, -1)

    def sampled(self, step: Step) -> tuple[int, ...]:
        """The sequences that `step`, the latest that was followed, samples, in its order."""
        chunks = step.sequences if isinstance(step, StepScheduled) else step.chunks
        prompts = tuple([chunk.sequence_id for chunk in chunks if chunk.sample])
        if isinstance(step, StepScheduled):
            return prompts
        return (*self._slots[step.slot].ids, *prompts)

    def _decode(self, step: DecodeScheduled) -> tuple[int, float, int]:
        slot = self._slots[step.slot]
        needed = slot.last_step if len(slot.ids) > len(step.left) else -1
        for row in reversed(step.left):
            del slot.ids[row]
            slot.sum_of_offsets -= slot.offsets.pop(row)
            del slot.pages[row]
        for sequence_id in step.joined:
            num_tokens, sampled_in = self._prefilled.pop(sequence_id)
            needed = max(needed, sampled_in)
            slot.ids.append(sequence_id)
            slot.offsets.append(num_tokens - slot.rounds)
            slot.sum_of_offsets += slot.offsets[-1]
            slot.pages.append(self._whole_pages(sequence_id, num_tokens))
        if self._page_size and (step.left or step.joined):
            least = MIN_SPARED_TOKENS if self._pads else MIN_SPARED_TOKENS_GPU
            slot.groups = _groups(slot.pages, -(-least // self._page_size))
        slot.rounds += 1
        slot.last_step = step.step
        rows = len(slot.ids)
        assert rows == step.num_rows, f"step {step.step}: {rows} rows, and {step.num_rows} sent"
        if self._pads or slot.groups:
            return rows, self._tokens_read(slot) / rows, needed
        return rows, slot.sum_of_offsets / rows + slot.rounds, needed

    def _whole_pages(self, sequence_id: int, num_tokens: int) -> tuple[int, ...]:
        if not self._page_size:
            return ()
        return self._pages[sequence_id][: num_tokens // self._page_size]

    def _tokens_read(self, slot: _SlotRows) -> float:
        """By attention in a step, on a CPU padded; what rows share counts once."""
        lengths = [offset + slot.rounds for offset in slot.offsets]
        read, alone = 0.0, set(range(len(lengths)))
        for group in slot.groups:
            num_common = group.num_pages * self._page_size
            members = [lengths[row] for row in group.rows]
            shared = [num_common] * len(members)
            read += joined_tokens(members, shared, padded=self._pads)
            alone.difference_update(group.rows)
        rest = [lengths[row] for row in sorted(alone)]
        return read + (padded_tokens(rest) if self._pads else sum(rest))

    def _prefill(self, step: int, chunks: Sequence[ScheduledSequence]) -> tuple[int, float]:
        num_tokens, pairs = 0, 0.0
        for chunk in chunks:
            num_tokens += chunk.num_tokens
            pairs += chunk.num_tokens * (chunk.num_computed + chunk.num_tokens / 2)
            if self._page_size:
                known = self._pages.get(chunk.sequence_id, ())
                self._pages[chunk.sequence_id] = known + tuple(chunk.new_pages)
            if chunk.sample:
                computed = chunk.num_computed + chunk.num_tokens
                self._prefilled[chunk.sequence_id] = (computed, step)
        return num_tokens, pairs / num_tokens if num_tokens else 0.0


def _groups(rows: Sequence[tuple[int, ...]], min_spared_pages: int) -> list[CommonPages]:
    """As attention groups rows (`models/attention/sdpa.py`, `kv_cache/common_tables.py`)."""
    num_whole_B = np.array([len(pages) for pages in rows], dtype=np.int64)
    page_table_BP = np.zeros((len(rows), num_whole_B.max(initial=0)), dtype=np.int64)
    for row, pages in enumerate(rows):
        page_table_BP[row, : len(pages)] = pages
    return common_pages(page_table_BP, num_whole_B, min_spared_pages)


def _grained(tokens: float) -> int:
    """`tokens` rounded to the grain; at least one grain, unless there are none."""
    if not tokens:
        return 0
    return max(1, round(tokens / _CONTEXT_GRAIN)) * _CONTEXT_GRAIN
