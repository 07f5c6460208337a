"""The scheduler as a machine: events in, steps and instructions out.

Knows no loop, no MPI, no torch and no clock; the runner feeds it and carries out what it says:

    core.add(request)            -> the id of its sequence
    core.next_step()             -> a step to send, or None; call until None
    core.sampled(step, ids)      -> [TokensEmitted, Finished …, Closed]; once for every step sent
    core.accepted()              -> the same of drafts that were right; after `sampled`, until empty
    core.stop(sequence, reason)  -> [Finished, Closed …]

With lookahead, decode steps are sent before their input tokens are known here: tokens pass from
the last stage to the first on the devices, and the CPU reads them up to `lookahead` rounds later.
So what only tokens can tell (stop ids, stop strings) is noticed late, and the surplus tokens of
such a sequence are dropped. What can be counted (length limits) is never overrun. Without lookahead
every token is awaited, and none is surplus.

Invariants:
* At most `num_slots` × (1 + `lookahead`) steps are in flight, and 1 + `lookahead` samples of a
  sequence. Steps come back in the order in which they were sent.
* A step is chunks of prompts of one slot (`StepScheduled`), or one token of every sequence in a
  slot's decode batch (`DecodeScheduled`), with chunks behind them where `steps` fills steps up.
* A sequence with drafts has one step in flight, and all its tokens before that are known here.
  What it has computed and which pages it has follows from what was accepted.
* A decode step is numbered at least `num_slots` after the steps whose tokens it computes, because
  the first stage would have to wait for those; earlier only when the pipe would run dry.
* No sequence grows beyond `max_sequence_tokens`, the smaller of the context and all pages together:
  it ends with LENGTH there. So where a completion ends never depends on what else is running.
* A sequence that is preempted is admitted again when all its tokens are known here: recomputed, or
  restored from host memory, where `take_page_moves` tells the stages to have it. One that grows
  to `restart_tokens` starts over in the same way, once: transformers computes it anew there, with
  other rotary frequencies (`checkpoint.families`). It can be counted, so no step is in vain.
* A sequence is closed once it has finished and no step in flight contains it. Its row may still be
  in its batch then, if its slot has had no other step since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Literal, Self

from mpipipe.control_plane.messages import (
    DecodeScheduled,
    PagesRestored,
    PagesSaved,
    StepScheduled,
)
from mpipipe.metrics.drafts import DraftUse
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.prefix_groups import prefix_groups
from mpipipe.scheduler.decode_batch import Rows
from mpipipe.scheduler.drafts import Drafter, NgramDrafter, agreed
from mpipipe.scheduler.instructions import (
    Closed,
    Finished,
    Instruction,
    Preempted,
    SchedulerStatistics,
    TokensEmitted,
)
from mpipipe.scheduler.policy import check_request
from mpipipe.scheduler.sequence import Sequence, SequenceEvent, SequenceState, next_state
from mpipipe.scheduler.slot_allocator import SchedulerLimits, SlotAllocator
from mpipipe.scheduler.steps import Dispatched, StepMaker
from mpipipe.types import FinishReason, Request

__all__ = ["SchedulerCore", "SchedulerLimits"]


class SchedulerCore:
    """Decides which tokens of which sequences the pipeline computes next.

    Args:
        limits: what there is room for.
        eos_token_ids: end a sequence, unless its request ignores them.
        prefill: "phases" or "mixed": see `StepMaker`.
        restart_tokens: known tokens with which a sequence starts over; 0: none does.
        drafter: decides on drafts; None: every token has a step of its own.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        eos_token_ids: Iterable[int] = (),
        prefill: Literal["phases", "mixed"] = "phases",
        restart_tokens: int = 0,
        drafter: Drafter | None = None,
    ) -> None:
        assert limits.num_slots >= 1, f"num_slots = {limits.num_slots}"
        assert limits.lookahead >= 0, f"lookahead = {limits.lookahead}"
        assert 1 <= limits.max_sequences_per_slot <= limits.max_tokens_per_step, (
            "a decode needs a token each"
        )
        self._limits = limits
        self._eos_token_ids = frozenset(eos_token_ids)
        self._restart_tokens = restart_tokens
        self._drafts = drafter is not None
        self._slot_allocator = SlotAllocator(limits)
        self._steps = StepMaker(limits, self._slot_allocator, prefill, drafter)
        self.max_sequence_tokens = min(
            limits.max_context_tokens, limits.num_pages * limits.page_size
        )
        self._sequences: dict[int, Sequence] = {}  # every sequence that is not closed
        self._stop_ids: frozenset[int] = frozenset()  # of any sequence so far
        self._flights: deque[Dispatched] = deque()
        self._closing: dict[int, list[int]] = {}  # finished, by the last step that contains them
        self._returned = -1  # the latest step that has come back
        self._accepted: list[tuple[Sequence, list[int]]] = []  # of the latest step, not emitted yet
        self._num_drafted = 0
        self._num_accepted = 0
        self._num_saved_steps = 0
        self._num_sequences = 0
        self._num_finished = 0

    @classmethod
    def of_plan(cls, plan: PipelinePlan, eos_token_ids: Iterable[int]) -> Self:
        """The scheduler of a run of `plan`."""
        limits = SchedulerLimits(
            num_slots=plan.num_slots,
            max_sequences_per_slot=plan.max_sequences_per_slot,
            max_tokens_per_step=plan.max_tokens_per_step,
            num_pages=plan.num_kv_pages,
            page_size=plan.page_size_tokens,
            max_context_tokens=plan.max_context_tokens,
            lookahead=plan.lookahead,
            max_sequence_tokens=plan.max_sequence_tokens,
            num_host_pages=plan.num_host_pages,
            min_saved_tokens=plan.min_saved_tokens,
            max_sharing_tokens=plan.max_sharing_tokens,
        )
        return cls(
            limits,
            eos_token_ids=eos_token_ids,
            prefill=plan.prefill,
            restart_tokens=plan.restart_tokens,
            drafter=None if plan.drafts is None else NgramDrafter(plan.drafts),
        )

    def in_order(self, requests: Iterable[Request]) -> list[Request]:
        """The order in which to add requests: where pages are shared, sharers run together."""
        given = list(requests)
        if not self._limits.max_sharing_tokens:
            return given
        prompts = [request.prompt_ids for request in given]
        return [given[number] for number in prefix_groups(prompts, self._limits.page_size).order]

    @property
    def is_idle(self) -> bool:
        """Everything added is finished and closed, nothing is in flight."""
        return not self._sequences and not self._flights

    def take_preemptions(self) -> list[Preempted]:
        """Who was preempted by `next_step` since the last call of this, in order: for the log."""
        preemptions, self._slot_allocator.preemptions = self._slot_allocator.preemptions, []
        return preemptions

    def take_page_moves(self) -> list[PagesSaved | PagesRestored]:
        """What the stages must be told, in order, before the step that `next_step` gave, if any."""
        moves, self._slot_allocator.page_moves = self._slot_allocator.page_moves, []
        return moves

    def statistics(self) -> SchedulerStatistics:
        """Counts of this moment and since the start."""
        num_waiting = len(self._slot_allocator.waiting)
        now = self._slot_allocator.statistics(
            # Those whose last token is on its way have no place any more, and yet they run.
            num_running=self._num_sequences - self._num_finished - num_waiting,
            num_steps_in_flight=len(self._flights),
            num_steps=self._steps.num_steps,
            num_finished=self._num_finished,
        )
        drafts = DraftUse(self._num_drafted, self._num_accepted, self._num_saved_steps)
        return replace(now, drafts=drafts)

    def logprob_rows(self, step: int) -> tuple[int, ...]:
        """The sequences that `step` samples, in order, if one of them asked; empty: none did."""
        flight = self._flights[step - self._returned - 1]
        return flight.rows.ids if flight.rows.with_logprobs else ()

    def begins(self, sequence_id: int, step: int) -> bool:
        """Whether `step`, the latest, has the first chunk of a sequence, or of its new beginning.

        It need not be of its first tokens: those may be in pages that it shares.
        """
        return self._sequences[sequence_id].began_at == step

    def num_shared_tokens(self, sequence_id: int) -> int:
        """Of a sequence that begins, the tokens that it need not compute."""
        return self._sequences[sequence_id].num_shared_tokens

    def known_tokens(self, sequence_id: int) -> tuple[int, ...]:
        """The prompt of a sequence, with all its tokens so far: the stages compute them anew."""
        return tuple(self._sequences[sequence_id].tokens)

    def rotary_len(self, sequence_id: int) -> int:
        """As `RequestOpened.rotary_len`."""
        return self._sequences[sequence_id].rotary_len

    def next_step(self) -> StepScheduled | DecodeScheduled | None:
        """The next micro-batch to send, or None: nothing should run before an event."""
        dispatched = self._steps.next_step(self._returned)
        if dispatched is None:
            return None
        self._flights.append(dispatched)
        return dispatched.message

    # ---- events ----------------------------------------------------------------------------------

    def add(self, request: Request) -> int:
        """Queue a request behind all others; returns the id of its sequence.

        Raises:
            PromptError: "empty_prompt", or "too_long" for the context, for all pages together, or
                for what the stages were made for.
        """
        check_request(
            request,
            max_context_tokens=self._limits.max_context_tokens,
            capacity_tokens=self._slot_allocator.pages.capacity_tokens,
            planned_tokens=self._limits.max_sequence_tokens,
        )
        sampling = request.sampling
        num_tokens = len(request.prompt_ids) + sampling.max_new_tokens
        stop_ids = frozenset() if sampling.ignore_eos else self._eos_token_ids
        if sampling.stop_token_ids:
            stop_ids = stop_ids.union(sampling.stop_token_ids)
        if not stop_ids <= self._stop_ids:
            self._stop_ids |= stop_ids
        sequence = Sequence(
            sequence_id=self._num_sequences,
            request=request,
            tokens=list(request.prompt_ids),
            max_tokens=min(num_tokens, self.max_sequence_tokens),
            stop_ids=stop_ids,
            wants_logprobs=sampling.num_logprobs >= 0,
            may_draft=self._drafts and sampling.num_logprobs < 0 and not sampling.needs,
            restart_tokens=self._restart_tokens,
        )
        self._num_sequences += 1
        self._sequences[sequence.sequence_id] = sequence
        self._slot_allocator.waiting.append(sequence)
        return sequence.sequence_id

    def sampled(self, step: int, token_ids: SequenceOf[int]) -> list[Instruction]:
        """Step `step` came back with one id per sampled row, in the order of the step.

        Of drafts that it verified the first token of each sequence; `accepted` gives the others.
        """
        awaited = self._returned + 1
        assert step == awaited, f"step {step} came back before {awaited}"
        assert not self._accepted, f"step {step} came back before drafts were taken"
        num_sampled = self._flights[0].message.num_sampled
        assert len(token_ids) == num_sampled, f"step {step}: {len(token_ids)} ids, {num_sampled}"
        flight = self._flights.popleft()
        self._returned = step
        rows, ids = flight.rows, tuple(token_ids)
        if flight.drafts:
            ids = self._accept(flight, ids)
        if flight.has_ended:
            rows, ids = _without_ended(rows, ids)
        ending = _ending(rows) if flight.drafts else flight.ending
        return self._emit(rows, ids, ending)

    def accepted(self) -> list[Instruction]:
        """The next token of each sequence whose drafts were right; empty: all are emitted.

        One after the other, so that each may end its sequence: those behind it are dropped then.
        """
        left = [entry for entry in self._accepted if entry[0].state < SequenceState.FINISHED]
        self._accepted = [(sequence, ids[1:]) for sequence, ids in left if len(ids) > 1]
        if not left:
            return []
        self._num_saved_steps += 1
        self._num_accepted += len(left)
        rows = Rows([sequence for sequence, _ in left])
        return self._emit(rows, tuple([ids[0] for _, ids in left]), _ending(rows))

    def _accept(self, flight: Dispatched, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The first token of each row; those behind it, as far as drafts were right, are kept."""
        first: list[int] = []
        start = 0
        for sequence, draft in zip(flight.rows.sequences, flight.drafts, strict=True):
            end = start + 1 + len(draft)
            sampled = ids[start : start + 1 + agreed(draft, ids[start:end])]
            start = end
            first.append(sampled[0])
            self._num_drafted += len(draft)
            if len(sampled) > 1:
                self._accepted.append((sequence, list(sampled[1:])))
            if sequence.is_drafting:
                sequence.num_computed = len(sequence.tokens) - 1 + len(sampled)
                self._slot_allocator.cut_pages(sequence)
        return tuple(first)

    def _emit(self, rows: Rows, ids: tuple[int, ...], ending: list[Sequence]) -> list[Instruction]:
        """Add a token to each row, and say what follows from it."""
        assert len(ids) == len(rows.tokens), (len(ids), len(rows.tokens))
        deque(map(list.append, rows.tokens, ids), maxlen=0)  # half the time of a loop
        reasons = self._reasons(ending, rows, ids)
        instructions: list[Instruction] = []
        if ids:
            instructions.append(TokensEmitted(rows.ids, ids, reasons))
        for row, reason in reasons.items():
            instructions.append(self._finish(rows.sequences[row], reason))
        if (closed := self._closing.pop(self._returned, None)) is not None:
            instructions.append(self._close(closed))
        return instructions

    def stop(self, sequence_id: int, reason: FinishReason) -> list[Instruction]:
        """End a sequence from outside: stop string found, or cancelled.

        Nothing happens to one that has ended already; samples still in flight are dropped.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.state is SequenceState.FINISHED:
            return []
        instructions: list[Instruction] = [self._finish(sequence, reason)]
        if sequence.last_step <= self._returned:
            instructions.append(self._close(self._closing.pop(sequence.last_step)))
        return instructions

    def _reasons(
        self, ending: list[Sequence], rows: Rows, ids: tuple[int, ...]
    ) -> dict[int, FinishReason]:
        """The rows that end with this token, ascending, and why."""
        reasons: dict[int, FinishReason] = {}
        for sequence in ending:
            if sequence.state is not SequenceState.FINISHED:
                row = sequence.row
                if row >= len(ids) or rows.sequences[row] is not sequence:  # others ended
                    row = rows.sequences.index(sequence)
                reasons[row] = FinishReason.LENGTH
        if self._stop_ids and not self._stop_ids.isdisjoint(ids):
            for row, token_id in enumerate(ids):
                if token_id in self._stop_ids and token_id in rows.sequences[row].stop_ids:
                    reasons[row] = FinishReason.STOP
        return dict(sorted(reasons.items())) if len(reasons) > 1 else reasons

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Finished:
        self._slot_allocator.finish(sequence)
        self._num_finished += 1
        if sequence.last_step > self._returned:
            for flight in self._flights:
                flight.has_ended = flight.has_ended or flight.message.step <= sequence.last_step
        self._closing.setdefault(sequence.last_step, []).append(sequence.sequence_id)
        token_ids = tuple(sequence.tokens[len(sequence.request.prompt_ids) :])
        return Finished(sequence.sequence_id, reason, token_ids)

    def _close(self, sequence_ids: list[int]) -> Closed:
        for sequence_id in sequence_ids:
            sequence = self._sequences.pop(sequence_id)
            next_state(sequence, SequenceEvent.CLOSE)
            self._slot_allocator.num_open -= sequence.is_open
        return Closed(tuple(sequence_ids))


def _without_ended(rows: Rows, ids: tuple[int, ...]) -> tuple[Rows, tuple[int, ...]]:
    """Surplus tokens of sequences that ended while the step was on its way are dropped."""
    kept = [
        (sequence, token_id)
        for sequence, token_id in zip(rows.sequences, ids, strict=True)
        if sequence.state is not SequenceState.FINISHED
    ]
    if len(kept) == len(ids):
        return rows, ids
    return Rows([sequence for sequence, _ in kept]), tuple([token_id for _, token_id in kept])


def _ending(rows: Rows) -> list[Sequence]:
    """Those that end with the next token at the latest."""
    return [s for s in rows.sequences if len(s.tokens) + 1 == s.max_tokens]
