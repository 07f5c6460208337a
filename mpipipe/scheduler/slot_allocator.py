"""Which sequence waits, is in which slot, owns which pages: every change of a sequence's place.

`steps` and `core` decide when a place changes.

Invariants:
* Running sequences are older than waiting ones: the youngest is preempted first, and waits first.
  Only one that restarts may wait although younger ones run; both lists stay in order of arrival.
* Slots are filled evenly: a newcomer goes to the one with the fewest sequences.
* A sequence that is released loses its pages at once, although its row may stay in its batch until
  the slot's next decode step and steps in flight may still write into them: stages run steps in
  order, and that next step removes the row before it computes. So no step after the release reads
  or writes its pages. Do not release a sequence while its step is being built.
* At most two sequences per place are open on the stages (finished ones with steps in flight count).
* A preempted sequence of at least `min_saved_tokens` computed tokens keeps them, if the host's pool
  has room: its pages are saved there and restored when it is admitted again. The moves are messages
  (`page_moves`) that the stages must get before the next step, in order. So a freed page, here or
  there, may be given away at once.
* Whole pages of a prompt that another sequence has computed, or computes in the step being made,
  are not computed again (`shared_prefixes`): a sequence owns those that it finds when it gets its
  place, and more that it finds with its first chunk, which waits while another one computes the
  page behind them. A preempted sequence gives up its own share of such pages, and no more.
* Steps write only to pages with one owner, which no other sequence can find: decodes write behind
  the prompt, chunks behind the pages that were found.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from itertools import takewhile

from mpipipe.control_plane.messages import PagesRestored, PagesSaved, ScheduledSequence
from mpipipe.kv_cache.pages import PageAllocator
from mpipipe.kv_cache.shared_pages import KnownPage, SharedPages
from mpipipe.scheduler.decode_batch import DecodeBatch
from mpipipe.scheduler.instructions import Preempted, SchedulerStatistics
from mpipipe.scheduler.policy import admission_headroom, refill_target
from mpipipe.scheduler.sequence import Sequence, SequenceEvent, SequenceState, next_state
from mpipipe.scheduler.shared_prefixes import SharedPrefixes

__all__ = ["SchedulerLimits", "Slot", "SlotAllocator"]

_REQUEST_ROWS_PER_PLACE = 2  # sequences open on the stages, per place in a slot


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What the pipeline has room for."""

    num_slots: int  # micro-batches in the ring, at least the number of stages
    max_sequences_per_slot: int  # rows of a decode step
    max_tokens_per_step: int  # of a step of prompt chunks
    num_pages: int  # of the KV cache
    page_size: int  # tokens
    max_context_tokens: int  # of the model or the configuration
    lookahead: int  # decode steps of a slot sent before the tokens of the last are known here
    max_sequence_tokens: int | None = None  # that the stages' tables hold; None: the context
    num_host_pages: int = 0  # for pages of preempted sequences, in host memory
    min_saved_tokens: int = 1  # computed tokens from which pages are saved, not recomputed
    max_sharing_tokens: int = 0  # of a sequence that shares pages, when it begins; 0: none does


@dataclass(slots=True, eq=False)
class Slot:
    """A fixed place in the ring: prompts in the making, those that may join, and the batch.

    Or, instead of a batch, sequences with drafts: the batch has no live rows then.
    """

    index: int
    batch: DecodeBatch
    prefilling: list[Sequence] = field(default_factory=list)  # oldest first
    joining: list[Sequence] = field(default_factory=list)  # in the order of their last chunks
    drafting: list[Sequence] = field(default_factory=list)
    awaits_tokens: bool = False  # for drafts: no step before all its tokens are known
    judged_at: int = -2  # the step that had come back when that was decided
    sampled_in: int = -1  # the latest step of this slot that brings tokens back

    @property
    def num_members(self) -> int:
        """Sequences that have a place here."""
        num_decoding = self.batch.num_live + len(self.drafting) + len(self.joining)
        return len(self.prefilling) + num_decoding

    @property
    def decodes(self) -> bool:
        """Some sequence here has only tokens to decode."""
        return bool(self.joining) or bool(self.drafting) or self.batch.num_live > 0

    @property
    def decoding(self) -> list[Sequence]:
        """Those sequences: of the batch, with drafts, and those that may join."""
        return [*self.batch.live_rows(), *self.drafting, *self.joining]


class SlotAllocator:
    """The waiting queue, the ring of slots and the pool of pages."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.pages = SharedPages(limits.num_pages, limits.page_size)
        self.prefixes = SharedPrefixes(self.pages, limits.max_sharing_tokens)
        self.slots = [
            Slot(index, DecodeBatch(limits.page_size, limits.lookahead))
            for index in range(limits.num_slots)
        ]
        self.waiting: deque[Sequence] = deque()  # by arrival
        self.running: dict[Sequence, None] = {}  # by arrival: those with a place
        self.num_open = 0  # known to the stages
        self.host_pages = PageAllocator(limits.num_host_pages, limits.page_size)
        self.preemptions: list[Preempted] = []  # not yet taken by the core's caller
        self.page_moves: list[PagesSaved | PagesRestored] = []  # as above
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.max_pages_used = 0
        self.num_saved = 0
        self.num_saved_pages = 0
        self.max_host_pages_used = 0
        self._min_saved_tokens = limits.min_saved_tokens
        self._max_sequences_per_slot = limits.max_sequences_per_slot
        self._num_promised = 0  # pages set aside for prompts in the making

    def statistics(
        self, *, num_running: int, num_steps_in_flight: int, num_steps: int, num_finished: int
    ) -> SchedulerStatistics:
        """The counts of the core, with those of the allocator."""
        return SchedulerStatistics(
            num_waiting=len(self.waiting),
            num_running=num_running,
            num_steps_in_flight=num_steps_in_flight,
            num_free_pages=self.pages.num_free,
            num_pages=self.pages.num_pages,
            num_steps=num_steps,
            num_finished=num_finished,
            num_preemptions=self.num_preemptions,
            num_recomputed_tokens=self.num_recomputed_tokens,
            max_pages_used=self.max_pages_used,
            num_saved=self.num_saved,
            num_saved_pages=self.num_saved_pages,
            max_host_pages_used=self.max_host_pages_used,
            num_shared_tokens=self.prefixes.num_shared_tokens,
        )

    # ---- admission -------------------------------------------------------------------------------

    @property
    def target(self) -> int:
        """Sequences that each slot should have."""
        num_active = len(self.running) + len(self.waiting)
        return refill_target(num_active, len(self.slots), self._max_sequences_per_slot)

    def count_admissible(self, slots: list[Slot], limit: int, returned: int) -> int:
        """Waiting sequences that `slots` could take now, in order; stops counting at `limit`."""
        target, num_running = self.target, len(self.running)
        num_places = sum([max(0, target - slot.num_members) for slot in slots])
        num_request_rows = _REQUEST_ROWS_PER_PLACE * self._max_sequences_per_slot * len(self.slots)
        num_request_rows -= self.num_open
        num_free = self.pages.num_free - self._num_promised
        limit = min(limit, num_places)
        found: set[KnownPage] = set()
        count = 0
        for sequence in self.waiting:
            num_request_rows -= not sequence.is_open
            if (
                count >= limit
                or sequence.last_step > returned  # its tokens are not all known
                or num_request_rows < 0
            ):
                break
            num_free -= self._pages_to_first_token(sequence) - self.prefixes.count(sequence, found)
            if num_free < admission_headroom(num_running + count):
                break
            count += 1
        return count

    def can_admit(self, num_sequences: int, returned: int) -> bool:
        """Whether so many waiting sequences could be admitted now."""
        num_places = len(self.slots) * self.target - len(self.running)
        return (
            num_places >= num_sequences
            and self.count_admissible(self.slots, num_sequences, returned) >= num_sequences
        )

    def admit(self, returned: int) -> None:
        """Give places to all waiting sequences for which there are places and pages."""
        for _ in range(self.count_admissible(self.slots, len(self.waiting), returned)):
            self._admit_first(min(self.slots, key=_fullness))

    def refill(self, slot: Slot, budget: int, returned: int) -> None:
        """As `admit`, for one slot, until its prompts have `budget` tokens to compute."""
        budget -= sum([s.num_to_prefill - s.num_computed for s in slot.prefilling])
        num_admissible = self.count_admissible([slot], len(self.waiting), returned)
        while num_admissible and budget > 0:
            num_admissible -= 1
            sequence = self.waiting[0]
            num_known = len(sequence.tokens)
            self._admit_first(slot)
            budget -= num_known - sequence.num_computed

    def restore(self, returned: int, step: int) -> None:
        """As `admit`, before `step`, for the first that wait if their pages are saved."""
        num_saved = sum(1 for _ in takewhile(lambda sequence: sequence.host_pages, self.waiting))
        for _ in range(self.count_admissible(self.slots, num_saved, returned)):
            self.waiting[0].restored_at = step
            self._admit_first(min(self.slots, key=_fullness))

    def _admit_first(self, slot: Slot) -> None:
        """Give the sequence that waits first a place in `slot`.

        One is admitted only when all its known tokens and a new one fit beside what those admitted
        before it still need for theirs, and `admission_headroom` is left.
        """
        sequence = self.waiting.popleft()
        next_state(sequence, SequenceEvent.ADMIT)
        sequence.slot = slot.index
        if sequence.host_pages:
            self._restore_pages(sequence)
        else:
            sequence.num_to_prefill = len(sequence.tokens)
            sequence.begins = True
            self._find_pages(sequence)
        if sequence.is_prefilled:
            sequence.num_to_prefill = sequence.num_computed  # `num_to_sample` counts from there
            insort(slot.joining, sequence, key=_last_step)
        else:
            sequence.num_promised = self._pages_to_first_token(sequence) - len(sequence.pages)
            self._num_promised += sequence.num_promised
            slot.prefilling.append(sequence)
        self.num_open += not sequence.is_open
        sequence.is_open = True
        self._run(sequence)

    def _run(self, sequence: Sequence) -> None:
        """Put it into its place by arrival among those that run."""
        youngest = next(reversed(self.running), None)
        self.running[sequence] = None
        if youngest is not None and _arrival(youngest) > _arrival(sequence):
            self.running = dict.fromkeys(sorted(self.running, key=_arrival))

    def _find_pages(self, sequence: Sequence) -> int:
        """Give a sequence of which no chunk is dispatched all pages that it need not compute.

        Returns how many it did not have before.
        """
        num_found = self.prefixes.take(sequence)
        sequence.num_computed = len(sequence.pages) * self.pages.page_size
        if num_found:
            self._note_use()
        return num_found

    def _pages_to_first_token(self, sequence: Sequence) -> int:
        return self.pages.pages_for_tokens(len(sequence.tokens) + 1)

    # ---- pages -----------------------------------------------------------------------------------

    def give_chunk(self, sequence: Sequence, budget: int, step: int) -> ScheduledSequence | None:
        """The next tokens of a prompt, at most `budget`, with their pages.

        None: no page is left and no sequence is younger; this one waits, or has even been released.
        Or another one computes the prefix that both share: this one begins when it has.
        """
        size = self.pages.page_size
        if sequence.begins:
            self._unpromise(sequence, self._find_pages(sequence))
            if self.prefixes.is_computed(sequence):
                return None
        wanted = min(budget, sequence.num_to_prefill - sequence.num_computed)
        while (room := self._room_tokens(sequence)) <= 0:
            if not self._preempt_younger(sequence):
                return None
        start = sequence.num_computed
        end = start + min(wanted, room)
        new_pages = self._take(-(-end // size) - len(sequence.pages))
        fulfilled = min(sequence.num_promised, len(new_pages))
        if sequence.begins:
            # What it finds when it comes back, it has once computed, or it was counted then.
            self.prefixes.num_shared_tokens += start if sequence.began_at < 0 else 0
            sequence.begins, sequence.began_at = False, step
            sequence.num_shared_tokens = start
            new_pages = (*sequence.pages, *new_pages)
            sequence.pages.clear()
        sequence.pages.extend(new_pages)
        self._unpromise(
            sequence, sequence.num_promised if end == sequence.num_to_prefill else fulfilled
        )
        sequence.num_computed = end
        sequence.last_step = step
        self.prefixes.tell(sequence)
        slot = self.slots[sequence.slot]
        if sequence.is_prefilled:
            slot.prefilling.remove(sequence)
            slot.joining.append(sequence)
        return ScheduledSequence(
            sequence.sequence_id, start, end - start, new_pages, sequence.is_prefilled
        )

    def give_pages(self, needing: list[Sequence]) -> dict[Sequence, int]:
        """One page for each, oldest first; younger sequences are preempted for want of pages.

        Of those in need, the youngest may be preempted themselves: they are missing in the answer.
        """
        if len(needing) <= self.pages.num_free:
            given = dict(zip(needing, self._take(len(needing)), strict=True))
            for sequence, page in given.items():
                sequence.pages.append(page)
        else:
            given = {}
            for sequence in sorted(needing, key=_arrival):
                if sequence.slot >= 0 and (last := self.give_page(sequence)) is not None:
                    given[sequence] = last
        return given

    def give_page(self, sequence: Sequence) -> int | None:
        """One page; younger sequences are preempted for want of pages. None: so is it itself."""
        while not self.pages.num_free:
            if not self._preempt_younger(sequence):
                self._preempt(sequence)
                return None
        (page,) = self._take(1)
        sequence.pages.append(page)
        return page

    def give_draft_pages(self, sequence: Sequence, num_tokens: int) -> tuple[int, tuple[int, ...]]:
        """Pages for a token and `num_tokens` drafted ones, or for as many as there is room for.

        The token has its page. Drafts preempt no sequence, and take no page that is promised.
        Returns how many drafted tokens have room, and the pages that were added.
        """
        size, first = self.pages.page_size, sequence.num_computed + 1
        num_free = max(0, self.pages.num_free - self._num_promised)
        num_tokens = min(num_tokens, (len(sequence.pages) + num_free) * size - first)
        new_pages = self._take(max(0, -(-(first + num_tokens) // size) - len(sequence.pages)))
        sequence.pages.extend(new_pages)
        return num_tokens, new_pages

    def cut_pages(self, sequence: Sequence) -> None:
        """Take back the pages of drafts that were refused."""
        kept = self.pages.pages_for_tokens(sequence.num_computed)
        self.pages.free(sequence.pages[kept:])
        del sequence.pages[kept:]

    def _room_tokens(self, sequence: Sequence) -> int:
        num_pages = len(sequence.pages) + self.pages.num_free
        return num_pages * self.pages.page_size - sequence.num_computed

    def _take(self, num_pages: int) -> tuple[int, ...]:
        pages = self.pages.allocate(num_pages)
        self._note_use()
        return pages

    def _note_use(self) -> None:
        used = self.pages.num_pages - self.pages.num_free
        self.max_pages_used = max(self.max_pages_used, used)

    def _unpromise(self, sequence: Sequence, num_pages: int) -> None:
        sequence.num_promised -= num_pages
        self._num_promised -= num_pages

    # ---- giving up a place -----------------------------------------------------------------------

    def _preempt_younger(self, sequence: Sequence) -> bool:
        """Preempt the youngest running sequence, unless that is `sequence` itself."""
        victim = next(reversed(self.running))
        if victim is sequence:
            return False
        self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take place and pages away for an older one; save the pages where that pays."""
        pages, is_drafting = tuple(sequence.pages), sequence.is_drafting
        self._give_up_place(sequence)
        lost = 0 if sequence.begins else sequence.num_computed
        # With drafts in flight it is not known how much is computed; its last token is not on the
        # device in any case.
        if not is_drafting and self._can_save(sequence):
            self._save_pages(sequence, pages)
            lost = 0
        saved = len(sequence.host_pages)
        self.preemptions.append(Preempted(sequence.sequence_id, lost, saved))
        self.num_preemptions += 1
        self.num_recomputed_tokens += lost

    def restart(self, sequence: Sequence) -> None:
        """Take place and pages away; back into the queue, by arrival, to start over."""
        self._give_up_place(sequence)
        self.num_recomputed_tokens += sequence.num_computed

    def _give_up_place(self, sequence: Sequence) -> None:
        next_state(sequence, SequenceEvent.PREEMPT)
        self.release(sequence)
        older = takewhile(lambda other: _arrival(other) < _arrival(sequence), self.waiting)
        self.waiting.insert(sum(1 for _ in older), sequence)

    # ---- pages in host memory --------------------------------------------------------------------

    def _can_save(self, sequence: Sequence) -> bool:
        """Whether its pages, released just now, have room in host memory, and are worth it."""
        num_pages = self.pages.pages_for_tokens(sequence.num_computed)
        is_worth_it = not sequence.begins and sequence.num_computed >= self._min_saved_tokens
        return is_worth_it and 0 < num_pages <= self.host_pages.num_free

    def _save_pages(self, sequence: Sequence, pages: tuple[int, ...]) -> None:
        num_pages = self.pages.pages_for_tokens(sequence.num_computed)
        sequence.host_pages = self.host_pages.allocate(num_pages)
        self.page_moves.append(PagesSaved(pages[:num_pages], sequence.host_pages))
        self.num_saved += 1
        self.num_saved_pages += num_pages
        used = self.host_pages.num_pages - self.host_pages.num_free
        self.max_host_pages_used = max(self.max_host_pages_used, used)

    def _restore_pages(self, sequence: Sequence) -> None:
        """Those that it still finds here are not copied."""
        host_pages = sequence.host_pages[self.prefixes.take(sequence) :]
        sequence.pages.extend(self._take(len(host_pages)))
        self.page_moves.append(
            PagesRestored(
                sequence.sequence_id, sequence.num_computed, host_pages, tuple(sequence.pages)
            )
        )
        self._drop_saved(sequence)
        self.prefixes.tell(sequence)

    def _drop_saved(self, sequence: Sequence) -> None:
        self.host_pages.free(sequence.host_pages)
        sequence.host_pages = ()

    def release(self, sequence: Sequence) -> None:
        """Take it out of its slot and give its pages back."""
        slot = self.slots[sequence.slot]
        if sequence.in_batch:
            slot.batch.leave(sequence)
        elif sequence.is_drafting:
            slot.drafting.remove(sequence)
            sequence.is_drafting = False
        elif sequence.is_prefilled:
            slot.joining.remove(sequence)
        else:
            slot.prefilling.remove(sequence)
            self._unpromise(sequence, sequence.num_promised)
        self.prefixes.withdraw(sequence)
        self.pages.free(sequence.pages)
        sequence.pages.clear()
        sequence.slot = -1
        del self.running[sequence]

    def finish(self, sequence: Sequence) -> None:
        """Take it out of wherever it is; nowhere, when its last sample was already dispatched."""
        was_waiting = sequence.state in (SequenceState.WAITING, SequenceState.PREEMPTED)
        next_state(sequence, SequenceEvent.FINISH)
        if was_waiting:
            self.waiting.remove(sequence)
            self._drop_saved(sequence)
        elif sequence.slot >= 0:
            self.release(sequence)


def _arrival(sequence: Sequence) -> int:
    return sequence.sequence_id


def _last_step(sequence: Sequence) -> int:
    return sequence.last_step


def _fullness(slot: Slot) -> int:
    return slot.num_members
