"""Launch-ahead: which step comes next, and its message.

Not here: what comes back (`ahead`, which tells the invariants), places and pages (`ahead_roster`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpipipe.control_plane.messages import DecodeScheduled, ScheduledSequence, StepScheduled
from mpipipe.scheduler.ahead_roster import AheadRoster, AheadSlot
from mpipipe.scheduler.decode_batch import AheadSequence, Rows
from mpipipe.scheduler.policy import fill_threshold

__all__ = ["AheadLimits", "AheadSteps", "Dispatched"]

_Chunk = tuple[AheadSequence, ScheduledSequence]


@dataclass(frozen=True, slots=True)
class AheadLimits:
    """What the pipeline has room for."""

    num_slots: int  # micro-batches in the ring, at least the number of stages
    max_sequences_per_slot: int  # rows of a decode step
    max_tokens_per_step: int  # of a step of prompt chunks
    num_pages: int  # of the KV cache
    page_size: int  # tokens
    max_context_tokens: int  # of the model or the configuration
    laps_ahead: int = 1  # decode steps of a slot sent before the tokens of the last are known here
    max_sequence_tokens: int | None = None  # that the stages' tables hold; None: the context


@dataclass(slots=True, eq=False)
class Dispatched:
    """A step to send, and what to remember until it comes back."""

    message: StepScheduled | DecodeScheduled
    rows: Rows
    ending: list[AheadSequence]  # those that sample for the last time
    has_ended: bool = False  # a sequence ended since: it may be among the rows


class AheadSteps:
    """Makes the steps, in order.

    Args:
        limits: what there is room for.
        roster: the sequences; changed as they are dispatched.
        prefill: "phases" or "mixed": see `_prefers_prefill`.
    """

    def __init__(
        self, limits: AheadLimits, roster: AheadRoster, prefill: Literal["phases", "mixed"]
    ) -> None:
        self._limits = limits
        self._roster = roster
        self._mixed = prefill == "mixed"
        self.num_steps = 0
        self._returned = -1  # the latest step that has come back
        self._turn = 0  # slot whose turn it is to decode
        self._filling = False  # "phases": prompts go first
        self._last_prefill = -1

    def next_step(self, returned: int) -> Dispatched | None:
        """The next step, when all steps up to number `returned` have come back; None: wait."""
        self._returned = returned
        num_slots, num_in_flight = self._limits.num_slots, self.num_steps - 1 - returned
        if num_in_flight >= num_slots * (1 + self._limits.laps_ahead):
            return None
        dispatched = self._prefill() if self._prefers_prefill() else None
        if dispatched is None:
            dispatched = self._decode_next(early=False)
        if dispatched is None and num_in_flight < num_slots:  # the pipe is about to run dry
            dispatched = self._prefill() if self._mixed else None
            dispatched = dispatched or self._decode_next(early=True)
        return dispatched

    def _prefers_prefill(self) -> bool:
        """Whether prompts go before decodes now.

        "mixed": once per lap, so that a decode waits for no more than one step of prompts.
        "phases": from when enough places and pages are free (`fill_threshold`) until all are taken.
        """
        roster = self._roster
        if self._mixed:
            num_decoding = sum([slot.decodes for slot in roster.slots])
            return self.num_steps - self._last_prefill > num_decoding
        if not self._filling and roster.waiting:
            threshold = fill_threshold(len(roster.running), len(roster.waiting))
            self._filling = roster.can_admit(threshold, self._returned)
        return self._filling

    def _decode_next(self, early: bool) -> Dispatched | None:
        """A decode step of the slot whose turn it is, or, `early`, of the one that is due first."""
        while True:
            slots = self._roster.slots
            slots = slots[self._turn :] + slots[: self._turn]
            able = [slot for slot in slots if slot.decodes and slot.batch.has_room(self._returned)]
            if not early:
                able = [slot for slot in able if self._due(slot) <= self.num_steps]
            if not able:
                return None
            dispatched = self._decode(min(able, key=self._due) if early else able[0])
            if dispatched is not None:
                return dispatched

    def _due(self, slot: AheadSlot) -> int:
        """The step number from which a decode of `slot` finds its tokens on the first stage."""
        awaited = slot.batch.last_step if slot.batch.num_live else slot.joining[0].last_step
        return awaited + self._limits.num_slots

    # ---- making a step ---------------------------------------------------------------------------

    def _decode(self, slot: AheadSlot) -> Dispatched | None:
        """One lap of the slot's batch; None: preemption left nobody in it."""
        number, batch = self.num_steps, slot.batch
        # Who must be awaited no longer than the batch itself joins it; alone, the first ones do.
        latest = max(number, self._due(slot)) - self._limits.num_slots
        joined = [sequence for sequence in slot.joining if sequence.last_step <= latest]
        needing = batch.rows_needing_pages()
        needing += [s for s in joined if s.num_computed % self._limits.page_size == 0]
        given = self._roster.give_pages(needing) if needing else {}
        joined = [sequence for sequence in joined if sequence.slot >= 0]
        if not joined and not batch.num_live:
            return None
        if joined:
            slot.joining = [sequence for sequence in slot.joining if sequence not in joined]
        left = batch.change(joined)
        leaving = batch.advance(number, joined)
        step = DecodeScheduled(
            step=number,
            slot=slot.index,
            num_rows=len(batch.rows.ids),
            left=left,
            joined=tuple([sequence.sequence_id for sequence in joined]),
            page_rows=tuple([sequence.row for sequence in given]),
            new_pages=tuple(given.values()),
            steady=self._is_steady(),
        )
        self._turn = (slot.index + 1) % self._limits.num_slots
        return self._dispatch(step, batch.rows, leaving)

    def _is_steady(self) -> bool:
        """For a decode step: so is all that is in flight, and every slot only decodes."""
        return self._last_prefill <= self._returned and all(
            slot.batch.num_live > 0 and not slot.prefilling and not slot.joining
            for slot in self._roster.slots
        )

    def _prefill(self) -> Dispatched | None:
        """A step of prompt chunks of the slot with the oldest prompt; None: no prompt can go on."""
        self._roster.admit(self._returned)
        slots = [slot for slot in self._roster.slots if slot.prefilling]
        for slot in sorted(slots, key=_oldest_prompt):
            entries = self._chunks(slot)
            if entries:
                return self._send_chunks(slot, entries)
        self._filling = bool(slots)
        return None

    def _chunks(self, slot: AheadSlot) -> list[_Chunk]:
        """Dispatch prompts of `slot` up to the budget, oldest first."""
        budget = self._limits.max_tokens_per_step
        chunks: list[_Chunk] = []
        for sequence in slot.prefilling.copy():
            if not budget or sequence.slot < 0:  # the latter: a victim of those before it
                break
            chunk = self._roster.give_chunk(sequence, budget, self.num_steps)
            if chunk is None:
                break
            budget -= chunk.num_tokens
            chunks.append((sequence, chunk))
        return chunks

    def _send_chunks(self, slot: AheadSlot, chunks: list[_Chunk]) -> Dispatched:
        """Shares of one token come first (kv_cache/layout.py)."""
        chunks.sort(key=lambda chunk: chunk[1].num_tokens > 1)  # stable: oldest first in each part
        sampled = [sequence for sequence, chunk in chunks if chunk.sample]
        for row, sequence in enumerate(sampled):
            sequence.row = row
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
        self, step: StepScheduled | DecodeScheduled, rows: Rows, leaving: list[AheadSequence]
    ) -> Dispatched:
        """Count the step. Those `leaving` give up their place behind it: they end, or restart."""
        self.num_steps += 1
        ending = []
        for sequence in leaving:
            if sequence.will_restart:
                self._roster.restart(sequence)
            else:
                self._roster.release(sequence)
                ending.append(sequence)
        return Dispatched(step, rows, ending)


def _oldest_prompt(slot: AheadSlot) -> int:
    return slot.prefilling[0].sequence_id
