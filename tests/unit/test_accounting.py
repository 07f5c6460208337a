"""Time accounting: the parts add up to the wall clock, and the bubble is the real one."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from mpipipe.clock import ScriptedClock
from mpipipe.metrics.accounting import StageAccount, StageTotals, TimeParts
from mpipipe.plain_values import from_json, to_json


@dataclass(frozen=True)
class Step:
    step: int
    slot: int = 0
    num_tokens: int = 4
    num_sampled: int = 4
    steady: bool = True


def assert_parts(parts: TimeParts, **expected_s: float) -> None:
    for name in ("compute_s", "wait_s", "send_s", "idle_s", "overhead_s"):
        assert getattr(parts, name) == pytest.approx(expected_s.get(name, 0.0), abs=1e-9), name


def test_each_part_of_a_step_is_booked_under_its_name() -> None:
    account = StageAccount(0)
    account.begin(10.0)
    account.step_scheduled(0, 11.0)
    account.input_ready(0, 13.0)
    account.computed(0, 18.0, compute_s=4.0)
    account.sent(Step(0), 18.5)
    account.end(20.5)

    overall = account.snapshot().overall
    assert_parts(overall, idle_s=3.0, wait_s=2.0, compute_s=4.0, overhead_s=1.0, send_s=0.5)
    assert overall.wall_s == pytest.approx(10.5)
    assert overall.bubble_ratio == pytest.approx(6.5 / 10.5)


def test_without_the_threads_own_time_all_of_it_is_compute() -> None:
    account = StageAccount(0)
    account.begin(0.0)
    account.step_scheduled(0, 0.0)
    account.input_ready(0, 0.0)
    account.computed(0, 2.0)
    account.sent(Step(0), 2.0)
    assert_parts(account.snapshot().overall, compute_s=2.0)


def test_a_step_scheduled_while_another_computes_causes_no_idle_time() -> None:
    account = StageAccount(0)
    account.begin(0.0)
    account.step_scheduled(0, 0.0)
    account.input_ready(0, 0.0)
    account.step_scheduled(1, 1.0)
    account.computed(0, 3.0)
    account.sent(Step(0), 3.0)
    account.input_ready(1, 3.0)
    account.computed(1, 5.0)
    account.sent(Step(1), 5.0)
    account.end(5.0)
    assert_parts(account.snapshot().overall, compute_s=5.0)


def test_a_step_that_was_due_when_the_call_ended_counts_as_wait() -> None:
    account = StageAccount(0)
    account.begin(0.0)
    account.step_scheduled(0, 1.0)
    account.end(4.0)
    assert_parts(account.snapshot().overall, idle_s=1.0, wait_s=3.0)


def test_time_between_generate_calls_is_not_counted() -> None:
    account = StageAccount(0)
    for start_s in (0.0, 100.0):
        account.begin(start_s)
        account.step_scheduled(0, start_s)
        account.input_ready(0, start_s)
        account.computed(0, start_s + 1.0)
        account.sent(Step(0), start_s + 1.0)
        account.end(start_s + 2.0)
    totals = account.snapshot()
    assert_parts(totals.overall, compute_s=2.0, idle_s=2.0)
    assert totals.num_steps == 2
    assert totals.num_tokens == 8
    assert totals.num_steady_steps == 0, "steady state does not reach over two calls"


def test_steady_state_lies_between_consecutive_steady_steps_only() -> None:
    account = StageAccount(0)
    account.begin(0.0)
    for number, steady in enumerate((True, True, False, True, True, True)):
        end_s = (number + 1) * 10.0
        account.step_scheduled(number, end_s - 10.0)
        account.input_ready(number, end_s - 10.0 + number)  # step n waits n seconds
        account.computed(number, end_s)
        account.sent(Step(number, steady=steady), end_s)
    account.end(60.0)
    totals = account.snapshot()
    assert totals.num_steady_steps == 3  # steps 1, 4 and 5
    assert_parts(totals.steady, wait_s=10.0, compute_s=20.0)
    assert totals.steady.bubble_ratio == pytest.approx(1 / 3)
    assert totals.overall.wall_s == pytest.approx(60.0)


def test_parts_add_up_to_the_wall_clock_whatever_the_events() -> None:
    rng = random.Random(7)
    clock = ScriptedClock(123_456.789)
    account = StageAccount(0)
    expected_wall_s = 0.0
    step = 0
    for _ in range(20):
        begin_s = clock.now_s()
        account.begin(begin_s)
        for _ in range(50):
            account.step_scheduled(step, clock.now_s() - rng.random())
            clock.advance(rng.random())
            account.input_ready(step, clock.now_s())
            clock.advance(rng.random())
            account.computed(step, clock.now_s(), compute_s=rng.random())
            clock.advance(rng.choice([0.0, rng.random()]))
            account.sent(Step(step, steady=rng.random() < 0.7), clock.now_s())
            step += 1
        clock.advance(rng.random())
        account.end(clock.now_s())
        expected_wall_s += clock.now_s() - begin_s
        clock.advance(5.0)
    totals = account.snapshot()
    assert totals.overall.wall_s == pytest.approx(expected_wall_s, abs=1e-6)
    for parts in (totals.overall, totals.steady):
        assert min(parts.compute_s, parts.wait_s, parts.send_s, parts.overhead_s) > 0
        assert parts.idle_s >= 0
    assert totals.steady.wall_s < totals.overall.wall_s


def test_times_that_go_back_never_make_a_part_negative() -> None:
    account = StageAccount(0)
    account.begin(10.0)
    account.step_scheduled(0, 9.0)
    account.input_ready(0, 8.0)
    account.computed(0, 7.0, compute_s=100.0)
    account.sent(Step(0), 6.0)
    account.end(5.0)
    assert_parts(account.snapshot().overall)


def pipeline_bubbles(num_slots: int, num_rounds: int = 200) -> list[StageTotals]:
    """Two stages of one second each; a slot's next step starts when its ids are back."""
    accounts = [StageAccount(0), StageAccount(1)]
    for account in accounts:
        account.begin(0.0)
    slot_free_s = [0.0] * num_slots
    stage_free_s = [0.0, 0.0]
    for number in range(num_slots * num_rounds):
        slot = number % num_slots
        steady = number >= 2 * num_slots
        for account in accounts:
            account.step_scheduled(number, slot_free_s[slot])
        input_s = slot_free_s[slot]
        for stage, account in enumerate(accounts):
            start_s = max(input_s, stage_free_s[stage])
            account.input_ready(number, start_s)
            account.computed(number, start_s + 1.0)
            account.sent(Step(number, slot=slot, steady=steady), start_s + 1.0)
            stage_free_s[stage] = input_s = start_s + 1.0
        slot_free_s[slot] = input_s
    for account in accounts:
        account.end(max(stage_free_s))
    return [account.snapshot() for account in accounts]


def test_one_slot_on_two_stages_is_half_bubble() -> None:
    for totals in pipeline_bubbles(num_slots=1):
        assert totals.overall.bubble_ratio == pytest.approx(0.5)
        assert totals.steady.bubble_ratio == pytest.approx(0.5)


def test_two_slots_on_two_stages_have_next_to_no_bubble() -> None:
    for totals in pipeline_bubbles(num_slots=2):
        assert 0 < totals.overall.bubble_ratio < 0.01  # filling and draining the pipe
        assert totals.steady.bubble_ratio == pytest.approx(0.0, abs=1e-9)


def test_the_bubble_of_one_slot_is_idle_on_the_first_stage_and_wait_on_the_second() -> None:
    first, second = pipeline_bubbles(num_slots=1)
    assert first.overall.idle_s > 0
    assert first.overall.wait_s == 0
    assert second.overall.wait_s > 0


def test_only_the_last_records_are_kept() -> None:
    account = StageAccount(0, num_recent=3)
    account.begin(0.0)
    for number in range(10):
        account.step_scheduled(number, float(number))
        account.input_ready(number, number + 0.25)
        account.computed(number, number + 0.75)
        account.sent(Step(number, slot=number % 2), number + 1.0)
    records = account.recent()
    assert [record.step for record in records] == [7, 8, 9]
    last = records[-1]
    assert (last.slot, last.num_tokens, last.num_sampled, last.steady) == (1, 4, 4, True)
    times_s = (
        last.start_s,
        last.scheduled_s,
        last.input_ready_s,
        last.compute_end_s,
        last.send_end_s,
    )
    assert times_s == (9.0, 9.0, 9.25, 9.75, 10.0)
    assert account.snapshot().num_steps == 10


def test_totals_survive_json_and_add_up_when_merged() -> None:
    first, _ = pipeline_bubbles(num_slots=2, num_rounds=5)
    again = from_json(StageTotals, to_json(first))
    assert again == first
    both = first.merged(again)
    assert both.num_steps == 2 * first.num_steps
    assert both.overall.wall_s == pytest.approx(2 * first.overall.wall_s)
    assert both.steady.compute_s == pytest.approx(2 * first.steady.compute_s)
    assert both.overall.bubble_ratio == pytest.approx(first.overall.bubble_ratio)


def test_nothing_measured_gives_a_ratio_of_zero() -> None:
    assert StageAccount(3).snapshot().overall.bubble_ratio == 0.0
