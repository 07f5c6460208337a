"""Launch-ahead, step by step: what is sent when."""

from __future__ import annotations

from random import Random

import pytest

from mpipipe.control_plane.messages import DecodeScheduled, StepScheduled
from mpipipe.errors import PromptError
from mpipipe.scheduler.core import SchedulerCore, SchedulerLimits
from mpipipe.scheduler.instructions import Closed, Finished, Instruction, TokensEmitted
from mpipipe.scheduler.policy import fill_threshold
from mpipipe.types import FinishReason, Request, SamplingParams

EOS = 99
Step = StepScheduled | DecodeScheduled


def make_core(
    *,
    num_slots: int = 2,
    max_sequences: int = 8,
    max_tokens: int = 64,
    num_pages: int = 1000,
    page_size: int = 4,
    mixed: bool = False,
) -> SchedulerCore:
    limits = SchedulerLimits(num_slots, max_sequences, max_tokens, num_pages, page_size, 2000, 1)
    return SchedulerCore(limits, eos_token_ids=(EOS,), prefill="mixed" if mixed else "phases")


def add(core: SchedulerCore, *lengths: int, max_new_tokens: int = 50) -> None:
    for length in lengths:
        index = core._num_sequences
        sampling = SamplingParams(max_new_tokens=max_new_tokens)
        core.add(Request(f"r{index}", index, tuple(range(length)), sampling))


def steps(core: SchedulerCore) -> list[Step]:
    result: list[Step] = []
    while (step := core.next_step()) is not None:
        result.append(step)
    return result


def give_back(core: SchedulerCore, step: Step, token_id: int = 7) -> list[Instruction]:
    return core.sampled(step.step, (token_id,) * step.num_sampled)


def decodes(found: list[Step]) -> list[DecodeScheduled]:
    return [step for step in found if isinstance(step, DecodeScheduled)]


# ---- what is in flight ---------------------------------------------------------------------------


def test_decode_steps_are_sent_before_their_tokens_are_known() -> None:
    core = make_core()
    add(core, 5, 5)
    first, second, third, fourth = steps(core)
    assert isinstance(first, StepScheduled)
    assert isinstance(second, StepScheduled)
    assert (first.slot, second.slot) == (0, 1)
    assert third == DecodeScheduled(2, 0, 1, (), (0,), (), (), False)
    assert fourth == DecodeScheduled(3, 1, 1, (), (1,), (), (), False)
    assert core.next_step() is None
    assert give_back(core, first) == [TokensEmitted((0,), (7,), {})]
    assert core.next_step() == DecodeScheduled(4, 0, 1, (), (), (), (), False)


def test_steps_are_steady_when_all_that_is_in_flight_decodes() -> None:
    core = make_core()
    add(core, 5, 5)
    flight = steps(core)
    for _ in range(4):
        give_back(core, flight.pop(0))
        flight += steps(core)
    assert [step.steady for step in flight] == [False, True, True, True]


def test_a_page_is_taken_for_the_row_that_begins_one() -> None:
    core = make_core(page_size=4)
    add(core, 3, 7)  # both reach a multiple of 4 with the first token that they decode
    flight = steps(core)
    found: list[Step] = []
    for _ in range(4):
        found.append(flight.pop(0))
        give_back(core, found[-1])
        flight += steps(core)
    grown = [(step.step, step.page_rows) for step in decodes(found + flight) if step.page_rows]
    assert grown == [(4, (0,)), (5, (0,))]


def test_one_sequence_alone_has_two_samples_in_flight() -> None:
    core = make_core(num_slots=4)
    add(core, 5)
    prefill, decode = steps(core)
    assert decode.step == 1
    give_back(core, prefill)
    assert [step.step for step in steps(core)] == [2]


def test_steps_come_back_in_order() -> None:
    core = make_core()
    add(core, 5, 5)
    _, second, *_ = steps(core)
    with pytest.raises(AssertionError, match="came back before"):
        give_back(core, second)


# ---- ends ----------------------------------------------------------------------------------------


def test_a_length_limit_is_never_overrun() -> None:
    core = make_core()
    add(core, 5, max_new_tokens=2)
    prefill, decode = steps(core)
    assert core.next_step() is None
    give_back(core, prefill)
    assert core.next_step() is None
    assert give_back(core, decode, 8) == [
        TokensEmitted((0,), (8,), {0: FinishReason.LENGTH}),
        Finished(0, FinishReason.LENGTH),
        Closed((0,)),
    ]
    assert core.is_idle


def test_a_completion_of_one_token_never_joins_a_batch() -> None:
    core = make_core()
    add(core, 5, max_new_tokens=1)
    (prefill,) = steps(core)
    assert give_back(core, prefill) == [
        TokensEmitted((0,), (7,), {0: FinishReason.LENGTH}),
        Finished(0, FinishReason.LENGTH),
        Closed((0,)),
    ]


def test_surplus_tokens_after_a_stop_are_dropped_and_the_row_leaves_next() -> None:
    core = make_core(num_slots=1)
    add(core, 5, 5)
    prefill, first = steps(core)
    give_back(core, prefill)
    (second,) = steps(core)
    assert core.sampled(first.step, (EOS, 8)) == [
        TokensEmitted((0, 1), (EOS, 8), {0: FinishReason.STOP}),
        Finished(0, FinishReason.STOP),
    ]
    (third,) = decodes(steps(core))
    assert (third.left, third.num_rows) == ((0,), 1)
    assert core.sampled(second.step, (5, 9)) == [TokensEmitted((1,), (9,), {}), Closed((0,))]


def test_the_whole_completion_is_told_at_its_end() -> None:
    core = make_core(num_slots=1)
    add(core, 5)
    prefill, first = steps(core)
    core.sampled(prefill.step, (4,))
    steps(core)
    *_, finished = core.sampled(first.step, (EOS,))
    assert isinstance(finished, Finished)
    assert finished.token_ids == (4, EOS)


def test_a_cancelled_sequence_is_closed_when_no_step_has_it() -> None:
    core = make_core()
    add(core, 5, 5)
    flight = steps(core)
    assert core.stop(0, FinishReason.ERROR) == [Finished(0, FinishReason.ERROR)]
    assert core.stop(0, FinishReason.ERROR) == []
    assert give_back(core, flight[0]) == []
    assert give_back(core, flight[1]) == [TokensEmitted((1,), (7,), {})]
    assert give_back(core, flight[2]) == [Closed((0,))]


# ---- prompts -------------------------------------------------------------------------------------


def test_several_prompts_share_a_step_up_to_its_tokens() -> None:
    core = make_core(num_slots=1, max_tokens=16)
    add(core, 10, 10, 3)
    found = [step for step in steps(core) if isinstance(step, StepScheduled)]
    shapes = [[(s.sequence_id, s.num_tokens, s.sample) for s in step.sequences] for step in found]
    assert shapes == [[(0, 10, True), (1, 6, False)], [(1, 4, True), (2, 3, True)]]


def test_prompts_wait_in_phases_until_enough_places_are_free() -> None:
    assert [fill_threshold(n, 100) for n in (0, 1, 8, 16, 255)] == [1, 1, 1, 2, 31]
    assert fill_threshold(255, 3) == 3, "the last ones need not wait for more"
    core = make_core(max_sequences=16, max_tokens=1000)
    add(core, *[5] * 50)
    flight = steps(core)
    for _ in range(8):
        give_back(core, flight.pop(0))
        flight += steps(core)
    assert core.statistics().num_waiting == 18
    free_places = 0
    while core.statistics().num_waiting == 18:
        core.stop(free_places, FinishReason.ERROR)
        free_places += 1
        give_back(core, flight.pop(0))
        flight += steps(core)
    assert free_places == 3  # an eighth of the 29 others


def test_mixed_fills_decode_steps_up_with_prompts_before_their_tokens_are_known() -> None:
    core = make_core(max_tokens=8, mixed=True)
    add(core, *[8] * 12)
    flight = steps(core)
    assert [step.phase for step in flight] == ["prefill", "prefill", "mixed", "mixed"]
    assert decodes(flight)[0].joined == (0,)  # nothing has come back yet
    phases = [step.phase for step in flight]
    while not core.is_idle:
        give_back(core, flight.pop(0))
        sent = steps(core)
        phases += [step.phase for step in sent]
        flight += sent
        assert all(step.num_tokens <= 8 for step in sent)
    num_mixed = phases.count("mixed")
    assert num_mixed > 10
    assert phases == ["prefill"] * 2 + ["mixed"] * num_mixed + ["decode"] * (
        len(phases) - num_mixed - 2
    )


def test_mixed_fills_again_when_an_eighth_of_the_places_is_free() -> None:
    core = make_core(max_sequences=16, max_tokens=64, mixed=True)
    add(core, *[2] * 50)
    flight: list[Step] = []
    for _ in range(8):
        flight += steps(core)
        give_back(core, flight.pop(0))
    assert core.statistics().num_waiting == 18
    free_places = 0
    while core.statistics().num_waiting == 18:
        core.stop(free_places, FinishReason.ERROR)
        free_places += 1
        give_back(core, flight.pop(0))
        flight += steps(core)
    assert free_places == 3  # an eighth of the 29 others


def test_stages_never_know_more_than_two_sequences_a_place() -> None:
    core = make_core(max_sequences=2, max_tokens=4)
    add(core, *[2] * 40, max_new_tokens=1)  # places are free again when a step has been sent
    flight: list[Step] = []
    most_open = 0
    while not core.is_idle:
        flight += steps(core)
        most_open = max(most_open, core._slot_allocator.num_open)
        give_back(core, flight.pop(0))
    assert most_open == 2 * 2 * 2
    assert core._slot_allocator.num_open == 0


# ---- fullness ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_slots", "places"), [(2, 64), (4, 64), (2, 256)])
def test_slots_stay_full_and_even_until_the_queue_is_empty(num_slots: int, places: int) -> None:
    random = Random(1)
    core = make_core(
        num_slots=num_slots, max_sequences=places, max_tokens=1024, num_pages=10**5, page_size=16
    )
    for _ in range(1000):
        add(core, random.randint(64, 1024), max_new_tokens=random.randint(16, 256))
    flight: list[Step] = []
    rows, unevenness = [], []
    while core.statistics().num_waiting:
        flight += steps(core)
        step = flight.pop(0)
        give_back(core, step)
        if isinstance(step, DecodeScheduled):
            rows.append(step.num_rows)
            members = [slot.num_members for slot in core._slot_allocator.slots]
            unevenness.append(max(members) - min(members))
    assert sum(rows) / len(rows) > 0.93 * places
    assert sum(unevenness) / len(unevenness) < 0.06 * places


def test_newcomers_make_the_slots_even() -> None:
    core = make_core(num_slots=3, max_tokens=1000)
    add(core, *[5] * 11)
    steps(core)
    assert [slot.num_members for slot in core._slot_allocator.slots] == [4, 4, 3]


@pytest.mark.parametrize("mixed", [False, True])
def test_few_pages_cost_little_recomputation(mixed: bool) -> None:
    random = Random(2)
    core = make_core(max_sequences=64, max_tokens=1024, num_pages=1000, page_size=16, mixed=mixed)
    num_tokens = 0
    for _ in range(300):
        length, output = random.randint(64, 1024), random.randint(16, 256)
        num_tokens += length + output
        add(core, length, max_new_tokens=output)
    flight: list[Step] = []
    while not core.is_idle:
        flight += steps(core)
        give_back(core, flight.pop(0))
    statistics = core.statistics()
    assert statistics.num_preemptions > 0
    assert statistics.max_pages_used > 950
    assert statistics.num_recomputed_tokens < 0.05 * num_tokens


# ---- the length that the stages are made for -----------------------------------------------------


def test_a_request_that_may_outgrow_the_stages_tables_is_refused_and_the_others_run() -> None:
    limits = SchedulerLimits(1, 4, 64, 100, 4, 2000, 1, max_sequence_tokens=20)
    core = SchedulerCore(limits)
    add(core, 10, max_new_tokens=10)
    with pytest.raises(PromptError, match=r"may grow to 21 tokens.* at most 20: lower") as caught:
        add(core, 10, max_new_tokens=11)
    assert caught.value.kind == "too_long"
    with pytest.raises(PromptError, match="context of 2000"):
        add(core, 2000, max_new_tokens=1)
    while not core.is_idle:
        for step in steps(core):
            give_back(core, step)
    assert core.statistics().num_finished == 1


def test_requests_are_cut_at_the_context_when_the_stages_hold_all_of_it() -> None:
    core = SchedulerCore(SchedulerLimits(1, 4, 64, 100, 4, 20, 1, max_sequence_tokens=20))
    add(core, 10, max_new_tokens=500)
    while not core.is_idle:
        for step in steps(core):
            give_back(core, step)
    assert core.statistics().num_finished == 1
