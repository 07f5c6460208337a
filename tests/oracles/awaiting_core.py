"""The scheduler that awaits every token: the oracle of `mpipipe.scheduler.core` without look-ahead.

Plain lists instead of batches that are changed by deltas: every step names all its sequences. What
ends a completion, and how many steps it takes, must be the same.

Invariants:
* At most `num_slots` steps are in flight. Slots are served round-robin, each refilled at its own
  turn; a slot that awaits samples is passed over, one with only prompt chunks in flight is not, so
  that the chunks of one long prompt follow each other through the stages.
* A sequence with a sample in flight is in no other step.
* Pages are taken at dispatch, for exactly the tokens dispatched, oldest sequence first. When none
  is free, the youngest running sequence gives up its pages at once (stages run steps in order, so
  its steps in flight are done before the new owner writes) and starts over when there is room. If
  the one in need is the youngest itself, it waits: any older sequence may take its pages. So the
  oldest sequence always gets on, and every sequence ends.
* No sequence grows beyond `max_sequence_tokens`, the smaller of the context and all pages together:
  it ends with LENGTH there. So where a completion ends never depends on what else is running.
* A sequence that grows to `restart_tokens` starts over in its slot: transformers computes it anew
  there, with other rotary frequencies (`checkpoint.families`).
* A sequence is closed once it has finished and no step in flight contains it.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from mpipipe.control_plane.messages import ScheduledSequence, StepScheduled
from mpipipe.kv_cache.pages import PageAllocator
from mpipipe.scheduler.instructions import (
    Closed,
    Finished,
    Preempted,
    SchedulerStatistics,
    TokensEmitted,
)
from mpipipe.scheduler.policy import admission_headroom, check_request, refill_target
from mpipipe.scheduler.sequence import SequenceEvent, SequenceState, next_state
from mpipipe.types import FinishReason, Request

Instruction = TokensEmitted | Finished | Closed


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way. Compared by identity."""

    sequence_id: int  # also the order of arrival: a larger id is a younger sequence
    request: Request
    tokens: list[int]  # prompt, then generated
    state: SequenceState = SequenceState.WAITING
    slot: int = -1  # -1: in none
    num_computed: int = 0  # tokens in the KV cache once all steps in flight have run
    num_pending: int = 0  # samples in flight (0 or 1)
    num_in_flight: int = 0  # steps in flight that contain this sequence
    pages: list[int] = field(default_factory=list)
    restart_tokens: int = 0  # with so many known tokens it starts over once; 0: never

    @property
    def has_restarted(self) -> bool:
        """It grew to `restart_tokens`."""
        return self.num_prompt_tokens < self.restart_tokens <= len(self.tokens)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_left(self) -> int:
        """Known tokens that are not computed yet: 1 when decoding, 0 while a sample is awaited."""
        return len(self.tokens) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """Several tokens are left, or the cache is empty: prompt, or recomputation."""
        return self.num_computed == 0 or len(self.tokens) - self.num_computed > 1


@dataclass(slots=True, eq=False)
class Slot:
    """A fixed place in the ring of micro-batches."""

    index: int
    sequences: list[Sequence] = field(default_factory=list)  # oldest first
    num_sampling: int = 0  # steps of this slot in flight that will bring tokens back


def choose_shares(
    sequences: SequenceOf[Sequence], max_tokens_per_step: int
) -> list[tuple[Sequence, int]]:
    """Tokens for each sequence of a slot that can run now, oldest first.

    Sequences that decode get their one token first; prompts share the rest of the budget, the
    oldest as much as it can use (chunked prefill). A sequence with a sample in flight gets none.
    """
    ready = [sequence for sequence in sequences if not sequence.num_pending]
    prefilling = [sequence for sequence in ready if sequence.is_prefilling]
    num_decodes = len(ready) - len(prefilling)
    assert num_decodes <= max_tokens_per_step, "a slot has more sequences than a step has tokens"
    if not prefilling:
        return [(sequence, 1) for sequence in ready]
    budget = max_tokens_per_step - num_decodes
    shares = []
    for sequence in ready:
        if not sequence.is_prefilling:
            shares.append((sequence, 1))
            continue
        chunk = min(budget, sequence.num_left)
        budget -= chunk
        if chunk:
            shares.append((sequence, chunk))
    return shares


def choose_victim(slots: Iterable[Slot]) -> Sequence | None:
    """The youngest running sequence: it has the least to lose and everybody else came before it."""
    youngest = [slot.sequences[-1] for slot in slots if slot.sequences]
    return max(youngest, key=lambda sequence: sequence.sequence_id, default=None)


def is_decoding(slot: Slot) -> bool:
    """The slot has a sequence, and none of its sequences has prompt tokens left to compute."""
    return bool(slot.sequences) and not any(sequence.is_prefilling for sequence in slot.sequences)


def finish_reason_of(
    sequence: Sequence, token_id: int, eos_token_ids: frozenset[int], max_sequence_tokens: int
) -> FinishReason | None:
    """Whether `token_id`, just appended to `sequence`, is its last one.

    `ignore_eos` ignores the model's end-of-sequence ids, not the stop ids that the user named.
    """
    sampling = sequence.request.sampling
    if token_id in sampling.stop_token_ids:
        return FinishReason.STOP
    if token_id in eos_token_ids and not sampling.ignore_eos:
        return FinishReason.STOP
    if sequence.num_output_tokens >= sampling.max_new_tokens:
        return FinishReason.LENGTH
    if len(sequence.tokens) >= max_sequence_tokens:
        return FinishReason.LENGTH
    return None


class SlotAllocator:
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
        """The counts of the core, with those of this slot_allocator."""
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
        next_state(sequence, SequenceEvent.ADMIT)
        sequence.slot = slot.index
        bisect.insort(slot.sequences, sequence, key=_arrival)
        return sequence

    def dispatch(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """Take the pages for the next `num_tokens` tokens and count them as computed."""
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

        0: no sequence is younger, this one has to wait for pages.
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
        next_state(sequence, SequenceEvent.FINISH)
        if was_running:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Take slot and pages away; to the front of the queue, to start over."""
        next_state(sequence, SequenceEvent.PREEMPT)
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


_Entry = tuple[Sequence, ScheduledSequence]


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step that was sent and has not come back."""

    slot: Slot
    members: tuple[tuple[Sequence, bool], ...]  # in the order of the step, with `sample`
    decodes_only: bool


class AwaitingCore:
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
        self._slot_allocator = SlotAllocator(
            num_slots=num_slots, num_pages=num_pages, page_size=page_size
        )
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
        preemptions, self._slot_allocator.preemptions = self._slot_allocator.preemptions, []
        return preemptions

    def statistics(self) -> SchedulerStatistics:
        """Counts of this moment and since the start."""
        num_in_flight, num_steps = len(self._in_flight), self._num_steps
        return self._slot_allocator.statistics(
            num_steps_in_flight=num_in_flight, num_steps=num_steps, num_finished=self._num_finished
        )

    def logprob_rows(self, step: int) -> tuple[int, ...]:
        """The sequences that `step` samples, in order, if one asked for logprobs; else empty."""
        sampled = [sequence for sequence, sample in self._in_flight[step].members if sample]
        asked = any(sequence.request.sampling.num_logprobs >= 0 for sequence in sampled)
        return tuple(sequence.sequence_id for sequence in sampled) if asked else ()

    def known_tokens(self, sequence_id: int) -> tuple[int, ...]:
        """The prompt and all tokens so far."""
        return tuple(self._sequences[sequence_id].tokens)

    def rotary_len(self, sequence_id: int) -> int:
        """As `RequestOpened.rotary_len`."""
        sequence = self._sequences[sequence_id]
        return sequence.restart_tokens if sequence.has_restarted else sequence.num_prompt_tokens

    # ---- events ----------------------------------------------------------------------------------

    def add(self, request: Request) -> int:
        """Queue a request behind all others; returns the id of its sequence.

        Raises:
            PromptError: "empty_prompt", or "too_long" for the context or for all pages together.
        """
        capacity_tokens = self._slot_allocator.pages.capacity_tokens
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
        self._slot_allocator.waiting.append(sequence)
        return sequence.sequence_id

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
        slots = self._slot_allocator.slots
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

        A victim is younger than the sequence that needs its pages: never in what is already
        dispatched here.
        """
        entries = []
        for sequence, wanted in choose_shares(slot.sequences, self._max_tokens_per_step):
            if sequence.state is not SequenceState.RUNNING:  # a victim of the ones before it
                continue
            num_tokens = self._slot_allocator.make_room(sequence, wanted)
            if num_tokens:
                entries.append((sequence, self._slot_allocator.dispatch(sequence, num_tokens)))
        return entries

    def _refill(self, slot: Slot, budget: int) -> list[_Entry]:
        """Admit waiting sequences, in order, while slot, budget and pages allow it.

        One is admitted only when all its known tokens and a new one fit beside what the admitted
        ones still need for theirs, so that its prefill is not interrupted half-way.
        """
        slot_allocator = self._slot_allocator
        num_running = slot_allocator.num_running
        target = refill_target(
            num_running + len(slot_allocator.waiting),
            len(slot_allocator.slots),
            self._max_sequences_per_slot,
        )
        if not slot_allocator.waiting or not budget or len(slot.sequences) >= target:
            return []
        num_free = slot_allocator.pages.num_free - slot_allocator.pages_to_come()
        entries = []
        while slot_allocator.waiting and budget and len(slot.sequences) < target:
            first = slot_allocator.waiting[0]
            num_pages = slot_allocator.pages_to_first_token(first)
            if first.num_pending or num_pages + admission_headroom(num_running) > num_free:
                break
            sequence = slot_allocator.admit_first(slot)
            entry = slot_allocator.dispatch(sequence, min(budget, sequence.num_left))
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
            is_decoding(slot) for slot in self._slot_allocator.slots
        )

    # ---- ending a sequence -----------------------------------------------------------------------

    def _take_token(
        self, sequence: Sequence, token_id: int, instructions: list[Instruction]
    ) -> None:
        """Append a sampled token, unless the sequence ended while it was on its way."""
        sequence.num_pending -= 1
        if sequence.state is SequenceState.FINISHED:
            return
        sequence.tokens.append(token_id)
        reason = finish_reason_of(sequence, token_id, self._eos_token_ids, self.max_sequence_tokens)
        reasons = {} if reason is None else {0: reason}
        instructions.append(TokensEmitted((sequence.sequence_id,), (token_id,), reasons))
        if reason is not None:
            instructions.append(self._finish(sequence, reason))
        elif len(sequence.tokens) == sequence.restart_tokens:
            self._slot_allocator.restart(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Finished:
        self._slot_allocator.finish(sequence)
        self._num_finished += 1
        output_ids = tuple(sequence.tokens[sequence.num_prompt_tokens :])
        return Finished(sequence.sequence_id, reason, output_ids)

    def _close(self, sequence: Sequence) -> int:
        next_state(sequence, SequenceEvent.CLOSE)
        del self._sequences[sequence.sequence_id]
        return sequence.sequence_id


def _is_decode(entry: ScheduledSequence) -> bool:
    return entry.num_tokens == 1 and entry.sample and entry.num_computed > 0


def _is_chunk(entry: _Entry) -> bool:
    return entry[1].num_tokens > 1
