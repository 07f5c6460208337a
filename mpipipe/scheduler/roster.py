"""Who waits, who sits in which slot, who owns which pages: every change of a sequence's place.

Not here: when a place changes (`core`) and who is chosen (`policy`). Invariants: a running sequence
is in exactly one slot, slots and queue are ordered by arrival, a sequence outside the slots owns no
page, and a preempted sequence is older than any that never ran.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterator

from mpipipe.control_plane.messages import ScheduledSequence
from mpipipe.kv_cache.pages import PageAllocator
from mpipipe.scheduler.instructions import Preempted, SchedulerStatistics
from mpipipe.scheduler.policy import choose_victim
from mpipipe.scheduler.state import Sequence, SequenceEvent, SequenceState, Slot

__all__ = ["Roster"]


class Roster:
    """The waiting queue, the ring of slots and the pool of pages."""

    def __init__(self, *, num_slots: int, num_pages: int, page_size: int) -> None:
        self.pages = PageAllocator(num_pages, page_size)
        self.slots = [Slot(index) for index in range(num_slots)]
        self.waiting: deque[Sequence] = deque()  # by arrival
        self.preemptions: list[Preempted] = []  # not yet taken by the core's caller
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.max_pages_used = 0

    @property
    def num_running(self) -> int:
        """Sequences in slots."""
        return sum(len(slot.sequences) for slot in self.slots)

    def running(self) -> Iterator[Sequence]:
        """Sequences in slots, slot by slot."""
        for slot in self.slots:
            yield from slot.sequences

    def room_tokens(self, sequence: Sequence) -> int:
        """Tokens that `sequence` could compute next with its own and all free pages."""
        num_pages = len(sequence.pages) + self.pages.num_free
        return num_pages * self.pages.page_size - sequence.num_computed

    def pages_to_first_token(self, sequence: Sequence) -> int:
        """Pages it lacks to compute all its known tokens and one more."""
        return self.pages.pages_for_tokens(len(sequence.tokens) + 1) - len(sequence.pages)

    def pages_to_come(self) -> int:
        """Pages that the prompts in the making have still to take."""
        return sum(
            self.pages_to_first_token(sequence)
            for sequence in self.running()
            if sequence.num_left > 1
        )

    def statistics(
        self, *, num_steps_in_flight: int, num_steps: int, num_finished: int
    ) -> SchedulerStatistics:
        """The counts of the core, with those of this roster."""
        return SchedulerStatistics(
            num_waiting=len(self.waiting),
            num_running=self.num_running,
            num_steps_in_flight=num_steps_in_flight,
            num_free_pages=self.pages.num_free,
            num_pages=self.pages.num_pages,
            num_steps=num_steps,
            num_finished=num_finished,
            num_preemptions=self.num_preemptions,
            num_recomputed_tokens=self.num_recomputed_tokens,
            max_pages_used=self.max_pages_used,
        )

    def admit_first(self, slot: Slot) -> Sequence:
        """Move the first waiting sequence into `slot`."""
        sequence = self.waiting.popleft()
        sequence.apply(SequenceEvent.ADMIT)
        sequence.slot = slot.index
        bisect.insort(slot.sequences, sequence, key=_arrival)
        return sequence

    def dispatch(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """Take the pages for the next `num_tokens` tokens and count them as computed."""
        sequence.apply(SequenceEvent.SCHEDULE)
        num_computed = sequence.num_computed
        end = num_computed + num_tokens
        new_pages: tuple[int, ...] = ()
        num_missing = self.pages.pages_for_tokens(end) - len(sequence.pages)
        if num_missing > 0:
            new_pages = self.pages.allocate(num_missing)
            sequence.pages.extend(new_pages)
            used = self.pages.num_pages - self.pages.num_free
            self.max_pages_used = max(self.max_pages_used, used)
        sample = end == len(sequence.tokens)
        sequence.num_computed = end
        sequence.num_pending += sample
        sequence.num_in_flight += 1
        return ScheduledSequence(sequence.sequence_id, num_computed, num_tokens, new_pages, sample)

    def make_room(self, sequence: Sequence, wanted: int) -> int:
        """Tokens of `wanted` there are pages for, after preempting younger sequences if need be.

        0: nobody is younger, the sequence has to wait for pages.
        """
        if len(sequence.pages) * self.pages.page_size - sequence.num_computed >= wanted:
            return wanted  # 15 of 16 decodes end here
        while (room := self.room_tokens(sequence)) <= 0:
            victim = choose_victim(self.slots)
            assert victim is not None, "the sequence itself is running"
            if victim is sequence:
                return 0
            self._preempt(victim)
        return min(wanted, room)

    def restart(self, sequence: Sequence) -> None:
        """Let it compute all its tokens again, in its slot; nothing of it is in flight."""
        self.num_recomputed_tokens += sequence.num_computed
        self._forget(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take it out of its slot or out of the queue."""
        was_running = sequence.state is SequenceState.RUNNING
        sequence.apply(SequenceEvent.FINISH)
        if was_running:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Take slot and pages away; to the front of the queue, to start over."""
        sequence.apply(SequenceEvent.PREEMPT)
        self.preemptions.append(Preempted(sequence.sequence_id, sequence.num_computed))
        self.num_preemptions += 1
        self.num_recomputed_tokens += sequence.num_computed
        self._release(sequence)
        assert not self.waiting or _arrival(sequence) < _arrival(self.waiting[0])
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.slots[sequence.slot].sequences.remove(sequence)
        sequence.slot = -1
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self.pages.free(sequence.pages)
        sequence.pages.clear()
        sequence.num_computed = 0


def _arrival(sequence: Sequence) -> int:
    return sequence.sequence_id
