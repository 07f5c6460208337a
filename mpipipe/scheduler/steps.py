"""Which step comes next, and its message.

`core` handles what comes back and states the invariants; `slot_allocator` keeps places and pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpipipe.control_plane.messages import (
    DecodeScheduled,
    ScheduledSequence,
    StepScheduled,
    VerifiedSequence,
)
from mpipipe.scheduler.decode_batch import Rows
from mpipipe.scheduler.drafts import Drafter
from mpipipe.scheduler.policy import fill_threshold
from mpipipe.scheduler.sequence import Sequence
from mpipipe.scheduler.slot_allocator import SchedulerLimits, Slot, SlotAllocator

__all__ = ["Dispatched", "StepMaker"]

_Chunk = tuple[Sequence, ScheduledSequence]


@dataclass(slots=True, eq=False)
class Dispatched:
    """A step to send, and what to remember until it comes back."""

    message: StepScheduled | DecodeScheduled
    rows: Rows
    ending: list[Sequence]  # those that sample for the last time
    has_ended: bool = False  # a sequence ended since: it may be among the rows
    drafts: tuple[tuple[int, ...], ...] = ()  # of each row, if the step verifies any


class StepMaker:
    """Makes the steps, in order.

    Args:
        limits: what there is room for.
        slot_allocator: the sequences; changed as they are dispatched.
        prefill: "phases": prompts go first, in steps of their own, whenever `_prefers_prefill`;
            "mixed": they fill up decode steps.
        drafter: decides on drafts; None: there are none.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        slot_allocator: SlotAllocator,
        prefill: Literal["phases", "mixed"],
        drafter: Drafter | None = None,
    ) -> None:
        self._limits = limits
        self._slot_allocator = slot_allocator
        self._mixed = prefill == "mixed"
        self._awaits = self._mixed and not limits.lookahead  # all tokens of a slot, before its turn
        self._drafter = drafter
        self.num_steps = 0
        self._returned = -1  # the latest step that has come back
        self._turn = 0  # slot whose turn it is to decode
        self._filling = False  # "phases": prompts go first
        self._last_prefill = -1

    def next_step(self, returned: int) -> Dispatched | None:
        """The next step, when all steps up to number `returned` have come back; None: wait."""
        self._returned = returned
        num_slots, num_in_flight = self._limits.num_slots, self.num_steps - 1 - returned
        if num_in_flight >= num_slots * (1 + self._limits.lookahead):
            return None
        if self._awaits:
            return self._fill_next(early=False)
        waiting = self._slot_allocator.waiting
        if waiting and waiting[0].host_pages:
            self._slot_allocator.restore(returned, self.num_steps)
        next_step = self._fill_next if self._mixed else self._decode_next
        dispatched = None
        if not self._mixed and self._prefers_prefill():
            dispatched = self._prefill()
        dispatched = dispatched or next_step(early=False)
        if dispatched is None and num_in_flight < num_slots:  # the pipe is about to run dry
            dispatched = next_step(early=True)
        return dispatched

    def _prefers_prefill(self) -> bool:
        """Whether prompts are computed now.

        From when enough places and pages are free (`fill_threshold`) until all are taken.
        """
        slot_allocator = self._slot_allocator
        if not self._filling and slot_allocator.waiting:
            threshold = fill_threshold(len(slot_allocator.running), len(slot_allocator.waiting))
            self._filling = slot_allocator.can_admit(threshold, self._returned)
        return self._filling

    def _decode_next(self, early: bool) -> Dispatched | None:
        """A decode step of the slot whose turn it is, or, `early`, of the one that is due first."""
        while True:
            slots = self._slot_allocator.slots
            in_turn = slots[self._turn :] + slots[: self._turn]
            able = (slot for slot in in_turn if self._can_decode(slot))
            if early:
                slot = min(able, key=self._due, default=None)
            else:
                slot = next((slot for slot in able if self._due(slot) <= self.num_steps), None)
            if slot is None:
                return None
            dispatched = self._go_on(slot)
            if dispatched is not None:
                return dispatched

    def _go_on(self, slot: Slot, budget: int = 0) -> Dispatched | None:
        """The slot's next step: of drafts where it has some, else as `_decode` makes it."""
        if drafts := self._drafts_of(slot):
            return self._verify(slot, drafts)
        return self._decode(slot, self._joined(slot), budget)

    def _joined(self, slot: Slot) -> list[Sequence]:
        """Who joins the batch of `slot` now: those that are awaited no longer than it is itself.

        Without a batch, those that sampled first make one.
        """
        if not slot.joining or self._awaits:
            return slot.joining.copy()
        latest = max(self.num_steps, self._due(slot)) - self._limits.num_slots
        joined = [sequence for sequence in slot.joining if sequence.last_step <= latest]
        if slot.batch.num_live:  # pages come back while a step computes
            joined = [s for s in joined if s.restored_at < self.num_steps]
        return joined

    def _can_decode(self, slot: Slot) -> bool:
        """Some sequence decodes here, and may have one more sample in flight."""
        if slot.drafting:
            return slot.sampled_in <= self._returned
        if not self._limits.lookahead and not slot.batch.num_live:
            return bool(slot.joining) and slot.joining[0].last_step <= self._returned
        has_room = slot.decodes and slot.batch.has_room(self._returned)
        return has_room and not self._awaits_tokens(slot)

    def _due(self, slot: Slot) -> int:
        """The step number from which a decode of `slot` finds its tokens on the first stage."""
        if slot.drafting:  # they come with the step
            return self.num_steps
        if slot.batch.num_live:
            return slot.batch.last_step + self._limits.num_slots
        return slot.joining[0].last_step + self._limits.num_slots if slot.joining else 0

    def _fill_next(self, early: bool) -> Dispatched | None:
        """A step of the next slot that awaits no token: its batch, filled up with prompts.

        Slots take turns; each is refilled at its own. One with only chunks of prompts in flight is
        not passed over, so that the chunks of a long prompt follow each other through the stages.
        `early`: as in `_decode_next`.
        """
        slots = self._slot_allocator.slots
        in_turn = [s for s in slots[self._turn :] + slots[: self._turn] if self._goes_on(s, early)]
        for slot in sorted(in_turn, key=self._due) if early else in_turn:
            if self._admits():
                self._slot_allocator.refill(slot, self._budget(slot), self._returned)
            dispatched = self._go_on(slot, self._budget(slot))
            if dispatched is not None:
                self._turn = (slot.index + 1) % self._limits.num_slots
                return dispatched
        return None

    def _goes_on(self, slot: Slot, early: bool) -> bool:
        """Whether a step of `slot` finds its tokens on the first stage, or soon if `early`."""
        if self._awaits or slot.drafting:
            return slot.sampled_in <= self._returned
        if not slot.decodes:
            return True
        is_due = early or self._due(slot) <= self.num_steps
        has_room = is_due and slot.batch.has_room(self._returned)
        return has_room and not self._awaits_tokens(slot)

    def _admits(self) -> bool:
        """Whether a slot is refilled at its turn.

        With lookahead not for every place that is free: steps of decodes alone are graphs.
        """
        if self._awaits:
            return bool(self._slot_allocator.waiting)
        self._filling = self._filling and self._slot_allocator.can_admit(1, self._returned)
        return self._prefers_prefill()

    def _budget(self, slot: Slot) -> int:
        """Tokens of prompts that a step of the slot has room for, beside its decodes."""
        num_decodes = slot.batch.num_live + len(slot.joining)
        return self._limits.max_tokens_per_step - num_decodes

    # ---- drafts ----------------------------------------------------------------------------------

    def _may_draft(self, slot: Slot, decoding: list[Sequence]) -> bool:
        """Whether all that decodes here may be in a step that verifies, and nothing else is due."""
        drafter = self._drafter
        if drafter is None or slot.prefilling or not 0 < len(decoding) <= drafter.max_sequences:
            return False
        if drafter.alone and len(self._slot_allocator.running) > slot.num_members:
            return False
        return min([sequence.draft_room for sequence in decoding]) >= 0

    def _awaits_tokens(self, slot: Slot) -> bool:
        """Whether the slot's next step must wait for its tokens in flight, for the sake of drafts.

        From when drafts are seen to be likely to pay.
        """
        if slot.sampled_in <= self._returned:
            return False
        if not slot.awaits_tokens and slot.judged_at != self._returned:
            slot.judged_at = self._returned
            slot.awaits_tokens = self._expects_drafts(slot)
        return slot.awaits_tokens

    def _expects_drafts(self, slot: Slot) -> bool:
        """Whether awaiting the slot's tokens is likely to pay."""
        if self._drafter is None or slot.num_members > self._drafter.max_sequences:
            return False
        decoding = slot.decoding
        return self._may_draft(slot, decoding) and self._drafter.expects_gain(decoding)

    def _drafts_of(self, slot: Slot) -> dict[Sequence, tuple[int, ...]] | None:
        """What the slot's next step verifies of each sequence; None: it is a plain one.

        Sequences that had drafts go back to the batch by a step without any: it leaves their last
        tokens on the stages, where the batch's steps find them.
        """
        slot.awaits_tokens = False
        if slot.sampled_in > self._returned:
            return None
        decoding = slot.decoding
        if self._drafter is not None and self._may_draft(slot, decoding):
            drafts = self._drafter.propose(decoding, [s.draft_room for s in decoding])
            if drafts:
                return dict(zip(decoding, drafts, strict=True))
        return dict.fromkeys(slot.drafting, ()) if slot.drafting else None

    def _verify(self, slot: Slot, drafts: dict[Sequence, tuple[int, ...]]) -> Dispatched | None:
        """A step of the last token of each of these sequences of the slot, and of its draft.

        None: all were preempted for want of pages.
        """
        for sequence in slot.batch.live_rows():
            slot.batch.leave(sequence)
        slot.joining = [sequence for sequence in slot.joining if sequence not in drafts]
        slot.drafting = list(drafts)
        for sequence in slot.drafting:
            sequence.is_drafting = True
        verified = self._drafted_rows(slot, drafts)
        if not verified:
            return None
        rows = Rows(slot.drafting.copy())
        has_drafts = sum([len(each.token_ids) for each in verified]) > len(verified)
        leaving = [] if has_drafts else self._end_drafting(slot)
        step = DecodeScheduled(
            step=self.num_steps,
            slot=slot.index,
            num_rows=sum([len(each.token_ids) for each in verified]),
            left=slot.batch.change([]),
            joined=(),
            page_rows=(),
            new_pages=(),
            steady=False,
            verified=tuple(verified),
        )
        self._turn = (slot.index + 1) % self._limits.num_slots
        dispatched = self._dispatch(step, rows, leaving)
        if has_drafts:
            dispatched.drafts = tuple([each.token_ids[1:] for each in verified])
        return dispatched

    def _drafted_rows(
        self, slot: Slot, drafts: dict[Sequence, tuple[int, ...]]
    ) -> list[VerifiedSequence]:
        """The rows of those that are not preempted, with as much of a draft as has pages."""
        allocator, page_size = self._slot_allocator, self._limits.page_size
        needing = [s for s in slot.drafting if s.num_computed % page_size == 0]
        given = allocator.give_pages(needing) if needing else {}
        verified: list[VerifiedSequence] = []
        for row, sequence in enumerate(slot.drafting):
            draft, num_computed = drafts[sequence], sequence.num_computed
            room, new_pages = allocator.give_draft_pages(sequence, len(draft))
            if sequence in given:
                new_pages = (given[sequence], *new_pages)
            token_ids = (sequence.tokens[-1], *draft[:room])
            verified.append(
                VerifiedSequence(sequence.sequence_id, num_computed, token_ids, new_pages)
            )
            sequence.num_computed += len(token_ids)
            sequence.last_step, sequence.row = self.num_steps, row
        return verified

    def _end_drafting(self, slot: Slot) -> list[Sequence]:
        """All go back to the batch, behind a step without drafts; returns those that end by it."""
        sequences, slot.drafting = slot.drafting, []
        slot.joining += sequences
        for sequence in sequences:
            sequence.is_drafting = False
            sequence.num_to_prefill = sequence.num_computed  # `num_to_sample` counts from there
        return [sequence for sequence in sequences if not sequence.num_to_sample]

    # ---- making a step ---------------------------------------------------------------------------

    def _decode(self, slot: Slot, joined: list[Sequence], budget: int = 0) -> Dispatched | None:
        """One round of the slot's batch, with at most `budget` tokens of its prompts.

        None: no sequence decodes, after preemption perhaps, and no prompt can go on.
        """
        number, batch = self.num_steps, slot.batch
        needing = batch.rows_needing_pages()
        needing += [s for s in joined if s.num_computed % self._limits.page_size == 0]
        given, chunks = self._share_pages(slot, needing, budget)
        joined = [sequence for sequence in joined if sequence.slot >= 0]
        if not joined and not batch.num_live:
            return self._send_chunks(slot, chunks) if chunks else None
        left = batch.change(joined)
        if joined:
            slot.joining = [sequence for sequence in slot.joining if not sequence.in_batch]
        leaving = batch.advance(number, joined)
        rows = batch.rows
        if chunks:
            self._last_prefill = number
            sampled = _sampled(chunks, first_row=len(rows.ids))
            rows = Rows(rows.sequences + sampled)
            leaving += [sequence for sequence in sampled if not sequence.num_to_sample]
        step = DecodeScheduled(
            step=number,
            slot=slot.index,
            num_rows=len(batch.rows.ids),
            left=left,
            joined=tuple([sequence.sequence_id for sequence in joined]),
            page_rows=tuple([sequence.row for sequence in given]),
            new_pages=tuple(given.values()),
            steady=self._is_steady(),
            chunks=tuple([chunk for _, chunk in chunks]),
        )
        self._turn = (slot.index + 1) % self._limits.num_slots
        return self._dispatch(step, rows, leaving)

    def _is_steady(self) -> bool:
        """For a decode step: so is all that is in flight, and every slot only decodes."""
        return self._last_prefill <= self._returned and all(
            slot.batch.num_live > 0 and not slot.prefilling and not slot.joining
            for slot in self._slot_allocator.slots
        )

    def _prefill(self) -> Dispatched | None:
        """A step of prompt chunks of the slot with the oldest prompt; None: no prompt can go on."""
        self._slot_allocator.admit(self._returned)
        slots = [slot for slot in self._slot_allocator.slots if slot.prefilling]
        for slot in sorted(slots, key=_oldest_prompt):
            _, chunks = self._share_pages(slot, [], self._limits.max_tokens_per_step)
            if chunks:
                return self._send_chunks(slot, chunks)
        self._filling = bool(slots)
        return None

    def _share_pages(
        self, slot: Slot, needing: list[Sequence], budget: int
    ) -> tuple[dict[Sequence, int], list[_Chunk]]:
        """A page for each row in need, and the slot's prompts up to `budget` tokens, with pages.

        Oldest first: a victim is younger than the sequence that needs its pages, so it is not
        dispatched yet.
        """
        if not budget or not slot.prefilling:
            return (self._slot_allocator.give_pages(needing) if needing else {}), []
        given: dict[Sequence, int] = {}
        chunks: list[_Chunk] = []
        for sequence in sorted([*needing, *slot.prefilling], key=_arrival):
            if sequence.slot < 0:  # a victim of those before it
                continue
            if sequence.is_prefilled:
                page = self._slot_allocator.give_page(sequence)
                if page is not None:
                    given[sequence] = page
            elif budget:
                chunk = self._slot_allocator.give_chunk(sequence, budget, self.num_steps)
                if chunk is not None:
                    budget -= chunk.num_tokens
                    chunks.append((sequence, chunk))
        # Shares of one token come first (kv_cache/layout.py); oldest first in each part.
        chunks.sort(key=lambda chunk: chunk[1].num_tokens > 1)
        return given, chunks

    def _send_chunks(self, slot: Slot, chunks: list[_Chunk]) -> Dispatched:
        """A step of chunks of prompts alone."""
        sampled = _sampled(chunks, first_row=0)
        step = StepScheduled(
            step=self.num_steps,
            slot=slot.index,
            sequences=tuple([chunk for _, chunk in chunks]),
            steady=False,
        )
        self._last_prefill = self.num_steps
        leaving = [sequence for sequence in sampled if not sequence.num_to_sample]
        return self._dispatch(step, Rows(sampled), leaving)

    def _dispatch(
        self, step: StepScheduled | DecodeScheduled, rows: Rows, leaving: list[Sequence]
    ) -> Dispatched:
        """Count the step. Those `leaving` give up their place behind it: they end, or restart."""
        self.num_steps += 1
        if rows.ids:
            self._slot_allocator.slots[step.slot].sampled_in = step.step
        ending = []
        for sequence in leaving:
            if sequence.will_restart:
                self._slot_allocator.restart(sequence)
            else:
                self._slot_allocator.release(sequence)
                ending.append(sequence)
        return Dispatched(step, rows, ending)


def _sampled(chunks: list[_Chunk], *, first_row: int) -> list[Sequence]:
    """Those that sample in these chunks, numbered from `first_row` on among the step's rows."""
    sampled = [sequence for sequence, chunk in chunks if chunk.sample]
    for row, sequence in enumerate(sampled, first_row):
        sequence.row = row
    return sampled


def _arrival(sequence: Sequence) -> int:
    return sequence.sequence_id


def _oldest_prompt(slot: Slot) -> int:
    return slot.prefilling[0].sequence_id
