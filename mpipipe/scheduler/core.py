"""The scheduler as a machine: events in, steps and instructions out.

Knows no loop, no MPI, no torch and no clock; the runner feeds it and carries out what it says:

    core.add(request)            -> [Opened]
    core.next_step()             -> StepScheduled to send, or None; call until None
    core.sampled(step, ids)      -> [Emitted, Finished …, Closed]; once for every step sent
    core.stop(sequence, reason)  -> [Finished, Closed …]

Invariants:
* At most `num_slots` steps are in flight. Slots are served round-robin, each refilled at its own
  turn; a slot that awaits samples is passed over, one with only prompt chunks in flight is not, so
  that the chunks of one long prompt follow each other through the stages.
* A sequence with a sample in flight is in no other step.
* Pages are taken at dispatch, for exactly the tokens dispatched, oldest sequence first. When none
  is free, the youngest running sequence gives up its pages at once (stages run steps in order, so
  its steps in flight are done before the new owner writes) and starts over when there is room. If
  the one in need is the youngest itself, it waits: whoever is older may take its pages. So the
  oldest sequence always gets on, and every sequence ends.
* No sequence grows beyond `max_sequence_tokens`, the smaller of the context and all pages together:
  it ends with LENGTH there. So where a completion ends never depends on what else is running.
* A sequence that grows to `restart_tokens` starts over in its slot: transformers computes it anew
  there, with other rotary frequencies (`checkpoint.families`).
* A sequence is closed once it has finished and no step in flight contains it.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from mpipipe.control_plane.messages import ScheduledSequence, StepScheduled
from mpipipe.scheduler.instructions import (
    Closed,
    Emitted,
    Finished,
    Instruction,
    Opened,
    Preempted,
    SchedulerStatistics,
)
from mpipipe.scheduler.policy import (
    admission_headroom,
    check_request,
    choose_shares,
    finish_reason_of,
    is_decoding,
    refill_target,
)
from mpipipe.scheduler.roster import Roster
from mpipipe.scheduler.state import Sequence, SequenceEvent, SequenceState, Slot
from mpipipe.types import FinishReason, Request

__all__ = [
    "Closed",
    "Emitted",
    "Finished",
    "Instruction",
    "Opened",
    "Preempted",
    "SchedulerCore",
    "SchedulerStatistics",
]

_Entry = tuple[Sequence, ScheduledSequence]


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step that was sent and has not come back."""

    slot: Slot
    members: tuple[tuple[Sequence, bool], ...]  # in the order of the step, with `sample`
    decodes_only: bool


class SchedulerCore:
    """Decides which tokens of which sequences the pipeline computes next."""

    def __init__(
        self,
        *,
        num_slots: int,
        max_sequences_per_slot: int,
        max_tokens_per_step: int,
        num_pages: int,
        page_size: int,
        max_context_tokens: int,
        eos_token_ids: Iterable[int] = (),
        restart_tokens: int = 0,
    ) -> None:
        assert num_slots >= 1, f"num_slots = {num_slots}"
        assert 1 <= max_sequences_per_slot <= max_tokens_per_step, "a decode needs a token each"
        self._max_sequences_per_slot = max_sequences_per_slot
        self._max_tokens_per_step = max_tokens_per_step
        self._max_context_tokens = max_context_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._restart_tokens = restart_tokens
        self._roster = Roster(num_slots=num_slots, num_pages=num_pages, page_size=page_size)
        self.max_sequence_tokens = min(max_context_tokens, num_pages * page_size)
        self._turn = 0
        self._sequences: dict[int, Sequence] = {}  # every sequence that is not closed
        self._in_flight: dict[int, _InFlight] = {}
        self._num_sequences = 0
        self._num_steps = 0
        self._num_finished = 0

    @property
    def is_idle(self) -> bool:
        """Everything added is finished and closed, nothing is in flight."""
        return not self._sequences and not self._in_flight

    def take_preemptions(self) -> list[Preempted]:
        """Who was preempted by `next_step` since the last call of this, in order: for the log."""
        preemptions, self._roster.preemptions = self._roster.preemptions, []
        return preemptions

    def statistics(self) -> SchedulerStatistics:
        """Counts of this moment and since the start."""
        num_in_flight, num_steps = len(self._in_flight), self._num_steps
        return self._roster.statistics(
            num_steps_in_flight=num_in_flight, num_steps=num_steps, num_finished=self._num_finished
        )

    def logprob_rows(self, step: int) -> tuple[int, ...]:
        """The sequences that `step` samples, in order, if one asked for logprobs; else empty."""
        sampled = [sequence for sequence, sample in self._in_flight[step].members if sample]
        asked = any(sequence.request.sampling.num_logprobs >= 0 for sequence in sampled)
        return tuple(sequence.sequence_id for sequence in sampled) if asked else ()

    def reopened_tokens(self, sequence_id: int) -> tuple[int, ...] | None:
        """None: the stages learn every token that they sample. All, where `rotary_len` changed."""
        sequence = self._sequences[sequence_id]
        return tuple(sequence.tokens) if sequence.has_restarted else None

    def rotary_len(self, sequence_id: int) -> int:
        """As `RequestOpened.rotary_len`."""
        sequence = self._sequences[sequence_id]
        return sequence.restart_tokens if sequence.has_restarted else sequence.num_prompt_tokens

    # ---- events ----------------------------------------------------------------------------------

    def add(self, request: Request) -> list[Instruction]:
        """Queue a request behind all others.

        Raises:
            PromptError: "empty_prompt", or "too_long" for the context or for all pages together.
        """
        capacity_tokens = self._roster.pages.capacity_tokens
        check_request(
            request, max_context_tokens=self._max_context_tokens, capacity_tokens=capacity_tokens
        )
        sequence = Sequence(
            self._num_sequences,
            request,
            list(request.prompt_ids),
            restart_tokens=self._restart_tokens,
        )
        self._num_sequences += 1
        self._sequences[sequence.sequence_id] = sequence
        self._roster.waiting.append(sequence)
        return [Opened(sequence.sequence_id, request)]

    def sampled(self, step: int, token_ids: SequenceOf[int]) -> list[Instruction]:
        """Step `step` came back with one id per sampled sequence, in the order of the step."""
        flight = self._in_flight.pop(step, None)
        assert flight is not None, f"step {step} is not in flight"
        num_sampled = sum(sample for _, sample in flight.members)
        assert len(token_ids) == num_sampled, f"step {step}: {len(token_ids)} ids, {num_sampled}"
        flight.slot.num_sampling -= num_sampled > 0
        instructions: list[Instruction] = []
        closed: list[int] = []
        ids = iter(token_ids)
        for sequence, sample in flight.members:
            sequence.num_in_flight -= 1
            if sample:
                self._take_token(sequence, next(ids), instructions)
            if sequence.state is SequenceState.FINISHED and not sequence.num_in_flight:
                closed.append(self._close(sequence))
        if closed:
            instructions.append(Closed(tuple(closed)))
        return instructions

    def stop(self, sequence_id: int, reason: FinishReason) -> list[Instruction]:
        """End a sequence from outside: stop string found, or cancelled.

        Nothing happens to one that has ended already; a sample still in flight is dropped.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.state is SequenceState.FINISHED:
            return []
        instructions: list[Instruction] = [self._finish(sequence, reason)]
        if not sequence.num_in_flight:
            instructions.append(Closed((self._close(sequence),)))
        return instructions

    def next_step(self) -> StepScheduled | None:
        """The next micro-batch to send, or None: nothing can run before an event."""
        slots = self._roster.slots
        if len(self._in_flight) >= len(slots):
            return None
        for offset in range(len(slots)):
            slot = slots[(self._turn + offset) % len(slots)]
            if slot.num_sampling:
                continue
            entries = self._run_members(slot)
            num_tokens = sum(entry.num_tokens for _, entry in entries)
            entries += self._refill(slot, self._max_tokens_per_step - num_tokens)
            if entries:
                self._turn = (slot.index + 1) % len(slots)
                return self._send(slot, entries)
        return None

    # ---- building a step -------------------------------------------------------------------------

    def _run_members(self, slot: Slot) -> list[_Entry]:
        """Dispatch what the slot's sequences can run, oldest first.

        A victim is younger than whoever needs its pages: never in what is already dispatched here.
        """
        entries = []
        for sequence, wanted in choose_shares(slot.sequences, self._max_tokens_per_step):
            if sequence.state is not SequenceState.RUNNING:  # a victim of the ones before it
                continue
            num_tokens = self._roster.make_room(sequence, wanted)
            if num_tokens:
                entries.append((sequence, self._roster.dispatch(sequence, num_tokens)))
        return entries

    def _refill(self, slot: Slot, budget: int) -> list[_Entry]:
        """Admit waiting sequences, in order, while slot, budget and pages allow it.

        One is admitted only when all its known tokens and a new one fit beside what the admitted
        ones still need for theirs, so that its prefill is not interrupted half-way.
        """
        roster = self._roster
        num_running = roster.num_running
        target = refill_target(
            num_running + len(roster.waiting), len(roster.slots), self._max_sequences_per_slot
        )
        if not roster.waiting or not budget or len(slot.sequences) >= target:
            return []
        num_free = roster.pages.num_free - roster.pages_to_come()
        entries = []
        while roster.waiting and budget and len(slot.sequences) < target:
            first = roster.waiting[0]
            num_pages = roster.pages_to_first_token(first)
            if first.num_pending or num_pages + admission_headroom(num_running) > num_free:
                break
            sequence = roster.admit_first(slot)
            entry = roster.dispatch(sequence, min(budget, sequence.num_left))
            entries.append((sequence, entry))
            budget -= entry.num_tokens
            num_free -= num_pages
            num_running += 1
        return entries

    def _send(self, slot: Slot, entries: list[_Entry]) -> StepScheduled:
        """Number the step and remember it. Shares of one token come first (kv_cache/layout.py)."""
        entries.sort(key=_is_chunk)  # stable: oldest first within each part
        decodes_only = all(_is_decode(entry) for _, entry in entries)
        step = StepScheduled(
            step=self._num_steps,
            slot=slot.index,
            sequences=tuple(entry for _, entry in entries),
            steady=decodes_only and self._is_steady(),
        )
        members = tuple((sequence, entry.sample) for sequence, entry in entries)
        slot.num_sampling += any(sample for _, sample in members)
        self._in_flight[step.step] = _InFlight(slot, members, decodes_only)
        self._num_steps += 1
        return step

    def _is_steady(self) -> bool:
        """For a step that only decodes: so does all that is in flight, and every slot."""
        return all(flight.decodes_only for flight in self._in_flight.values()) and all(
            is_decoding(slot) for slot in self._roster.slots
        )

    # ---- ending a sequence -----------------------------------------------------------------------

    def _take_token(
        self, sequence: Sequence, token_id: int, instructions: list[Instruction]
    ) -> None:
        """Append a sampled token, unless the sequence ended while it was on its way."""
        sequence.apply(SequenceEvent.SAMPLE)
        sequence.num_pending -= 1
        if sequence.state is SequenceState.FINISHED:
            return
        sequence.tokens.append(token_id)
        reason = finish_reason_of(sequence, token_id, self._eos_token_ids, self.max_sequence_tokens)
        index = sequence.num_output_tokens - 1
        request_id = sequence.request.request_id
        instructions.append(Emitted(sequence.sequence_id, request_id, token_id, index, reason))
        if reason is not None:
            instructions.append(self._finish(sequence, reason))
        elif len(sequence.tokens) == sequence.restart_tokens:
            self._roster.restart(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Finished:
        self._roster.finish(sequence)
        self._num_finished += 1
        output_ids = tuple(sequence.tokens[sequence.num_prompt_tokens :])
        return Finished(sequence.sequence_id, sequence.request.request_id, reason, output_ids)

    def _close(self, sequence: Sequence) -> int:
        sequence.apply(SequenceEvent.CLOSE)
        del self._sequences[sequence.sequence_id]
        return sequence.sequence_id


def _is_decode(entry: ScheduledSequence) -> bool:
    return entry.num_tokens == 1 and entry.sample and entry.num_computed > 0


def _is_chunk(entry: _Entry) -> bool:
    return entry[1].num_tokens > 1
