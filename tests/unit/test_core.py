"""The scheduler without lookahead, step by step: every token is awaited, prompts fill steps up."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mpipipe.control_plane.messages import DecodeScheduled, ScheduledSequence, StepScheduled
from mpipipe.errors import PromptError
from mpipipe.scheduler.core import SchedulerCore, SchedulerLimits
from mpipipe.scheduler.instructions import (
    Closed,
    Finished,
    Instruction,
    Preempted,
    TokensEmitted,
)
from mpipipe.scheduler.policy import admission_headroom, refill_target
from mpipipe.scheduler.sequence import (
    TRANSITIONS,
    IllegalTransitionError,
    Sequence,
    SequenceEvent,
    SequenceState,
    next_state,
)
from mpipipe.types import FinishReason, Request, SamplingParams

EOS = 99


@dataclass(frozen=True)
class Sent:
    """A step as a stage sees it: the share of each of its sequences, decodes first."""

    message: StepScheduled | DecodeScheduled
    sequences: tuple[ScheduledSequence, ...]

    @property
    def step(self) -> int:
        return self.message.step

    @property
    def slot(self) -> int:
        return self.message.slot

    @property
    def num_tokens(self) -> int:
        return self.message.num_tokens

    @property
    def steady(self) -> bool:
        return self.message.steady


class FollowedCore(SchedulerCore):
    """A core, and what a stage knows from its messages."""

    def follow(self) -> list[Sent]:
        """All steps that can be sent now."""
        sent = []
        while (step := self.next_step()) is not None:
            sent.append(self._read(step))
        return sent

    def _read(self, step: StepScheduled | DecodeScheduled) -> Sent:
        computed = self.__dict__.setdefault("computed", {})
        if isinstance(step, StepScheduled):
            decodes, chunks = [], step.sequences
        else:
            decodes, chunks = self._read_decodes(step, computed), step.chunks
        for chunk in chunks:
            computed[chunk.sequence_id] = chunk.num_computed + chunk.num_tokens
        sent = Sent(step, (*decodes, *chunks))
        assert sum(s.num_tokens for s in sent.sequences) == step.num_tokens
        assert sum(s.sample for s in sent.sequences) == step.num_sampled
        return sent

    def _read_decodes(
        self, step: DecodeScheduled, computed: dict[int, int]
    ) -> list[ScheduledSequence]:
        rows: list[int] = self.__dict__.setdefault("batches", {}).setdefault(step.slot, [])
        for row in reversed(step.left):
            del rows[row]
        rows.extend(step.joined)
        pages = dict(zip(step.page_rows, step.new_pages, strict=True))
        decodes = []
        for row, sequence_id in enumerate(rows):
            new_pages = (pages[row],) if row in pages else ()
            decodes.append(
                ScheduledSequence(sequence_id, computed[sequence_id], 1, new_pages, True)
            )
            computed[sequence_id] += 1
        return decodes


def make_core(
    *,
    num_slots: int = 2,
    max_sequences: int = 8,
    max_tokens: int = 64,
    num_pages: int = 1000,
    page_size: int = 4,
    max_context: int = 1000,
    max_sharing: int = 0,
) -> FollowedCore:
    limits = SchedulerLimits(
        num_slots, max_sequences, max_tokens, num_pages, page_size, max_context, lookahead=0,
        max_sharing_tokens=max_sharing,
    )  # fmt: skip
    return FollowedCore(limits, eos_token_ids=(EOS,), prefill="mixed")


def add(core: SchedulerCore, *lengths: int, sampling: SamplingParams | None = None) -> None:
    for length in lengths:
        index = core._num_sequences
        request = Request(
            f"r{index}", index, tuple(range(length)), sampling or SamplingParams(max_new_tokens=50)
        )
        core.add(request)


def steps(core: FollowedCore) -> list[Sent]:
    return core.follow()


def give_back(core: SchedulerCore, sent: Sent, token_id: int = 7) -> list[Instruction]:
    return core.sampled(sent.step, (token_id,) * sent.message.num_sampled)


def shape(step: Sent) -> list[tuple[int, int, int, bool]]:
    return [(s.sequence_id, s.num_computed, s.num_tokens, s.sample) for s in step.sequences]


# ---- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", SequenceState)
@pytest.mark.parametrize("event", SequenceEvent)
def test_a_transition_is_in_the_table_or_raises_naming_state_and_event(
    state: SequenceState, event: SequenceEvent
) -> None:
    request = Request("r", 0, (1,), SamplingParams())
    sequence = Sequence(5, request, [1], 9, frozenset(), False, state=state)
    if (state, event) in TRANSITIONS:
        next_state(sequence, event)
        assert sequence.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransitionError) as error:
            next_state(sequence, event)
        assert state.name in str(error.value)
        assert event.name in str(error.value)
        assert sequence.state is state


def test_every_state_but_closed_can_still_end() -> None:
    ending = {state for state, event in TRANSITIONS if event is SequenceEvent.FINISH}
    assert ending == {SequenceState.WAITING, SequenceState.RUNNING, SequenceState.PREEMPTED}
    assert not [state for state, _ in TRANSITIONS if state is SequenceState.CLOSED]


# ---- policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("active", "slots", "bound", "target"),
    [(0, 2, 8, 0), (1, 2, 8, 1), (5, 2, 8, 3), (40, 2, 8, 8)],
)
def test_refill_target_spreads_the_active_over_the_slots(
    active: int, slots: int, bound: int, target: int
) -> None:
    assert refill_target(active, slots, bound) == target


def test_the_first_sequence_needs_no_headroom() -> None:
    assert [admission_headroom(n) for n in (0, 1, 4, 5)] == [0, 1, 2, 3]


# ---- adding --------------------------------------------------------------------------------------


def test_sequences_are_numbered_in_order_of_arrival() -> None:
    core = make_core()
    request = Request("a", 0, (1, 2), SamplingParams())
    assert core.add(request) == 0
    assert core.add(request) == 1


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused_with_numbers() -> None:
    core = make_core(max_context=20)
    with pytest.raises(PromptError, match=r"'r0' has 20 tokens.*context of 20") as error:
        add(core, 20)
    assert error.value.kind == "too_long"
    with pytest.raises(PromptError, match=r"'r0' has 16 tokens.*KV cache of 16 tokens") as error:
        add(make_core(num_pages=4), 16)
    assert error.value.kind == "too_long"
    with pytest.raises(PromptError) as error:
        add(core, 0)
    assert error.value.kind == "empty_prompt"
    assert core.is_idle
    add(core, 19)
    assert not core.is_idle


# ---- slots ---------------------------------------------------------------------------------------


def test_waiting_sequences_spread_evenly_over_the_slots() -> None:
    core = make_core()
    add(core, 3, 3, 3, 3, 3)
    first, second = steps(core)
    assert (first.slot, [s.sequence_id for s in first.sequences]) == (0, [0, 1, 2])
    assert (second.slot, [s.sequence_id for s in second.sequences]) == (1, [3, 4])


def test_slots_take_turns_and_each_waits_for_its_own_samples() -> None:
    core = make_core()
    add(core, 3, 3)
    first, second = steps(core)
    assert core.next_step() is None
    order = []
    for _ in range(3):
        give_back(core, first)
        (first_again,) = steps(core)
        give_back(core, second)
        (second_again,) = steps(core)
        order += [first_again.slot, second_again.slot]
        first, second = first_again, second_again
    assert order == [0, 1, 0, 1, 0, 1]


def test_a_single_sequence_is_never_in_two_steps_when_it_awaits_a_sample() -> None:
    core = make_core(num_slots=4)
    add(core, 3)
    (step,) = steps(core)
    assert core.next_step() is None
    give_back(core, step)
    assert [shape(s) for s in steps(core)] == [[(0, 3, 1, True)]]


def test_the_chunks_of_a_lone_long_prompt_follow_each_other_through_the_stages() -> None:
    core = make_core(num_slots=3, max_tokens=8)
    add(core, 21)
    flight = steps(core)
    assert [shape(s) for s in flight] == [
        [(0, 0, 8, False)],
        [(0, 8, 8, False)],
        [(0, 16, 5, True)],
    ]
    assert core.sampled(flight[0].step, ()) == []
    assert core.next_step() is None  # the last chunk has a sample on its way
    core.sampled(flight[1].step, ())
    assert core.next_step() is None
    give_back(core, flight[2])
    assert [shape(s) for s in steps(core)] == [[(0, 21, 1, True)]]


def test_in_flight_is_bounded_by_the_slots_even_for_chunks() -> None:
    core = make_core(num_slots=2, max_tokens=8)
    add(core, 80)
    first, second = steps(core)
    assert core.statistics().num_steps_in_flight == 2
    core.sampled(first.step, ())
    (third,) = steps(core)
    assert shape(third) == [(0, 16, 8, False)]
    assert shape(second) == [(0, 8, 8, False)]


def test_a_slot_is_refilled_at_its_own_turn_when_one_of_its_sequences_ends() -> None:
    core = make_core(max_sequences=2)
    add(core, 3, 3, sampling=SamplingParams(max_new_tokens=1))
    add(core, 3, 3, 3)
    first, second = steps(core)
    give_back(core, first)  # ends both of slot 0
    (refilled,) = steps(core)
    assert (refilled.slot, [s.sequence_id for s in refilled.sequences]) == (0, [4])
    give_back(core, second)
    (again,) = steps(core)
    assert (again.slot, [s.sequence_id for s in again.sequences]) == (1, [2, 3])


def test_decodes_come_first_then_chunks_and_the_budget_holds() -> None:
    core = make_core(num_slots=1, max_tokens=10)
    add(core, 4)
    (step,) = steps(core)
    add(core, 30)
    give_back(core, step)
    sizes = []
    for _ in range(3):
        (step,) = steps(core)
        assert step.num_tokens <= 10
        sizes.append([(s.sequence_id, s.num_tokens) for s in step.sequences])
        give_back(core, step)
    assert sizes == [[(0, 1), (1, 9)], [(0, 1), (1, 9)], [(0, 1), (1, 9)]]
    (step,) = steps(core)
    assert [(s.sequence_id, s.num_tokens, s.sample) for s in step.sequences] == [
        (0, 1, True),
        (1, 3, True),
    ]


def test_decodes_come_before_older_prompts_in_the_budget() -> None:
    core = make_core(num_slots=1, max_tokens=12)
    add(core, 2)
    (step,) = steps(core)
    add(core, 30, 30)
    give_back(core, step)
    found = []
    for _ in range(3):
        (step,) = steps(core)
        found.append([(s.sequence_id, s.num_tokens) for s in step.sequences])
        give_back(core, step)
    assert found == [[(0, 1), (1, 11)], [(0, 1), (1, 11)], [(0, 1), (1, 8), (2, 3)]]


def test_a_share_of_one_prompt_token_stands_among_the_decodes() -> None:
    core = make_core(num_slots=1)
    add(core, 5, 1, 4)
    (step,) = steps(core)
    assert [s.num_tokens for s in step.sequences] == [1, 5, 4]


# ---- ends ----------------------------------------------------------------------------------------


def test_the_last_token_carries_the_reason_and_the_sequence_is_closed() -> None:
    core = make_core()
    add(core, 3, sampling=SamplingParams(max_new_tokens=2))
    (step,) = steps(core)
    assert give_back(core, step, 7) == [TokensEmitted((0,), (7,), {})]
    (step,) = steps(core)
    assert give_back(core, step, 8) == [
        TokensEmitted((0,), (8,), {0: FinishReason.LENGTH}),
        Finished(0, FinishReason.LENGTH),
        Closed((0,)),
    ]
    assert core.is_idle
    assert core.statistics().num_free_pages == 1000
    assert core.next_step() is None


@pytest.mark.parametrize(
    ("sampling", "token_id", "reason"),
    [
        (SamplingParams(), EOS, FinishReason.STOP),
        (SamplingParams(ignore_eos=True), EOS, None),
        (SamplingParams(stop_token_ids=(5,)), 5, FinishReason.STOP),
        (SamplingParams(stop_token_ids=(5,), ignore_eos=True), 5, FinishReason.STOP),
        (SamplingParams(stop_token_ids=(5,)), 6, None),
        (SamplingParams(max_new_tokens=1), EOS, FinishReason.STOP),
    ],
)
def test_what_ends_a_sequence(
    sampling: SamplingParams, token_id: int, reason: FinishReason | None
) -> None:
    core = make_core()
    add(core, 3, sampling=sampling)
    (step,) = steps(core)
    emitted = give_back(core, step, token_id)[0]
    assert isinstance(emitted, TokensEmitted)
    assert emitted.finish_reasons.get(0) is reason


@pytest.mark.parametrize(("context", "num_pages"), [(6, 1000), (1000, 2)])
def test_a_sequence_ends_with_length_at_the_context_or_when_it_fills_all_pages(
    context: int, num_pages: int
) -> None:
    core = make_core(max_context=context, num_pages=num_pages)
    limit = min(context, num_pages * 4)
    assert core.max_sequence_tokens == limit
    add(core, 3)
    reasons = []
    while not core.is_idle:
        (step,) = steps(core)
        emitted = give_back(core, step)[0]
        assert isinstance(emitted, TokensEmitted)
        reasons.append(emitted.finish_reasons.get(0))
    assert reasons == [None] * (limit - 4) + [FinishReason.LENGTH]


def test_stop_while_idle_closes_at_once_and_again_does_nothing() -> None:
    core = make_core()
    add(core, 3, 3)
    flight = steps(core)
    give_back(core, flight[0])
    assert core.stop(0, FinishReason.STOP) == [
        Finished(0, FinishReason.STOP),
        Closed((0,)),
    ]
    assert core.stop(0, FinishReason.STOP) == []
    assert core.stop(77, FinishReason.STOP) == []


def test_a_sequence_stopped_in_flight_drops_its_token_and_is_closed_when_the_step_returns() -> None:
    core = make_core()
    add(core, 3, 3, 3)
    flight = steps(core)
    assert core.stop(1, FinishReason.ERROR) == [Finished(1, FinishReason.ERROR)]
    assert give_back(core, flight[0]) == [TokensEmitted((0,), (7,), {}), Closed((1,))]


def test_a_waiting_sequence_can_be_stopped() -> None:
    core = make_core(num_slots=1, max_sequences=1)
    add(core, 3, 3)
    (step,) = steps(core)
    assert core.stop(1, FinishReason.ERROR) == [
        Finished(1, FinishReason.ERROR),
        Closed((1,)),
    ]
    give_back(core, step)
    assert core.statistics().num_waiting == 0


def test_a_step_that_is_not_in_flight_or_has_the_wrong_number_of_ids_asserts() -> None:
    core = make_core()
    add(core, 3)
    (step,) = steps(core)
    with pytest.raises(AssertionError, match="step 9 came back before 0"):
        core.sampled(9, ())
    with pytest.raises(AssertionError, match="step 0: 2 ids, 1"):
        core.sampled(step.step, (1, 2))


# ---- pages ---------------------------------------------------------------------------------------


def test_pages_are_taken_for_exactly_the_tokens_of_the_step() -> None:
    core = make_core(num_slots=1, max_tokens=8)
    add(core, 10)
    (step,) = steps(core)
    assert step.sequences[0].new_pages == (0, 1)
    core.sampled(step.step, ())
    (step,) = steps(core)
    assert step.sequences[0].new_pages == (2,)
    for _ in range(2):
        give_back(core, step)
        (step,) = steps(core)
        assert step.sequences[0].new_pages == ()
    give_back(core, step)
    (step,) = steps(core)
    assert (step.sequences[0].num_computed, step.sequences[0].new_pages) == (12, (3,))


def test_the_youngest_is_preempted_for_the_oldest_and_starts_over_later() -> None:
    core = make_core(num_slots=1, num_pages=5)
    add(core, 7, 5)
    (step,) = steps(core)
    assert [s.new_pages for s in step.sequences] == [(0, 1), (2, 3)]
    for _ in range(2):  # 0 reaches 9 known tokens and takes the last page
        give_back(core, step)
        (step,) = steps(core)
    assert core.take_preemptions() == []
    for _ in range(2):  # 1 reaches 9 known tokens as well: there is no page, it is the youngest
        give_back(core, step)
        (step,) = steps(core)
    assert shape(step) == [(0, 10, 1, True)]
    assert core.take_preemptions() == [Preempted(1, num_lost_tokens=8)]
    assert core.take_preemptions() == []
    for _ in range(2):  # 0 takes a fourth page, of those that 1 had
        give_back(core, step)
        (step,) = steps(core)
    assert step.sequences[0].new_pages == (2,)
    assert core.statistics().num_preemptions == 1
    give_back(core, step, EOS)
    (step,) = steps(core)
    assert shape(step) == [(1, 0, 9, True)]  # prompt and generated tokens again
    assert step.sequences[0].new_pages == (0, 1, 2)


def test_tokens_that_a_preempted_sequence_finds_again_are_not_counted_as_shared_twice() -> None:
    core = make_core(num_slots=1, num_pages=6, max_sharing=1000)
    add(core, 9, 9, sampling=SamplingParams(max_new_tokens=12))
    while not core.is_idle:
        (step,) = steps(core)
        give_back(core, step)
    assert core.statistics().num_preemptions == 1
    assert core.statistics().num_shared_tokens == 8  # two pages, when 1 first began


def test_a_token_in_flight_of_a_preempted_sequence_counts() -> None:
    core = make_core(num_slots=2, num_pages=4, page_size=4)
    add(core, 4, 4)
    first, second = steps(core)
    for _ in range(4):
        give_back(core, first)
        (first,) = steps(core)
        give_back(core, second)
        (second,) = steps(core)
    give_back(core, first)
    (first,) = steps(core)  # needs a third page: sequence 1 loses its own while in flight
    assert core.take_preemptions() == [Preempted(1, num_lost_tokens=8)]
    assert core.next_step() is None
    assert give_back(core, second, 42) == [TokensEmitted((1,), (42,), {})]
    give_back(core, first, EOS)
    (step,) = steps(core)
    assert shape(step) == [(1, 0, 9, True)]


def test_a_preempted_sequence_can_finish_with_the_token_in_flight() -> None:
    core = make_core(num_slots=2, num_pages=4, page_size=4)
    add(core, 4, 4)
    first, second = steps(core)
    for _ in range(4):
        give_back(core, first)
        (first,) = steps(core)
        give_back(core, second)
        (second,) = steps(core)
    give_back(core, first)
    (first,) = steps(core)
    assert core.statistics().num_waiting == 1
    assert give_back(core, second, EOS)[-2:] == [
        Finished(1, FinishReason.STOP),
        Closed((1,)),
    ]
    assert core.statistics().num_waiting == 0


def test_no_sequence_is_admitted_into_pages_that_a_prompt_in_the_making_needs() -> None:
    core = make_core(num_pages=8, max_tokens=8)
    add(core, 20, 8)
    flight = steps(core)
    # After its first chunk 6 pages are free, but prompt 0 needs 4 of them for 20 + 1 tokens.
    assert [shape(step) for step in flight] == [[(0, 0, 8, False)], [(0, 8, 8, False)]]
    assert core.statistics().num_waiting == 1


def test_a_preempted_sequence_is_not_run_before_its_token_in_flight_is_back() -> None:
    core = make_core(num_slots=2, num_pages=4)
    add(core, 4, 4)
    first, second = steps(core)
    for _ in range(4):
        give_back(core, first)
        (first,) = steps(core)
        give_back(core, second)
        (second,) = steps(core)
    give_back(core, first)
    (first,) = steps(core)  # takes a page of sequence 1, whose step is in flight
    assert [p.sequence_id for p in core.take_preemptions()] == [1]
    core.stop(0, FinishReason.ERROR)
    assert core.statistics().num_free_pages == 4
    assert core.next_step() is None
    give_back(core, second)
    assert [shape(step) for step in steps(core)] == [[(1, 0, 9, True)]]


def test_a_stopped_prompt_is_closed_when_the_last_of_its_chunks_is_back() -> None:
    core = make_core(max_tokens=8)
    add(core, 30)
    first, second = steps(core)
    assert core.stop(0, FinishReason.ERROR) == [Finished(0, FinishReason.ERROR)]
    assert core.sampled(first.step, ()) == []
    assert core.sampled(second.step, ()) == [Closed((0,))]


# ---- steady --------------------------------------------------------------------------------------


def test_a_step_is_steady_when_the_whole_ring_decodes() -> None:
    core = make_core()
    add(core, 3, 3)
    first, second = steps(core)
    assert not first.steady
    assert not second.steady
    give_back(core, first)
    (first,) = steps(core)
    assert not first.steady  # the prompt of slot 1 is still in flight
    give_back(core, second)
    (second,) = steps(core)
    assert second.steady
    give_back(core, first)
    add(core, 3)
    (first,) = steps(core)
    assert not first.steady  # takes the new prompt in
    give_back(core, second)
    (second,) = steps(core)
    assert not second.steady


def test_a_ring_with_an_empty_slot_is_not_steady() -> None:
    core = make_core()
    add(core, 3)
    for _ in range(3):
        (step,) = steps(core)
        assert not step.steady
        give_back(core, step)
