"""Time accounting: the parts add up to the wall clock, and the bubble is the real one."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from mpipipe.clock import ScriptedClock
from mpipipe.metrics.accounting import (
    StageAccount,
    StageTotals,
    StepPhase,
    StepRecord,
    TimeParts,
)
from mpipipe.plain_values import from_json, to_json


@dataclass(frozen=True)
class Step:
    step: int
    slot: int = 0
    num_tokens: int = 4
    num_sampled: int = 4
    steady: bool = True
    num_sequences: int = 4
    phase: StepPhase = "decode"


def assert_parts(parts: TimeParts, **expected_s: float) -> None:
    for name in ("compute_s", "wait_s", "transfer_s", "send_s", "idle_s", "overhead_s"):
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


def run_step(account: StageAccount, number: int, *, due_s: float, ready_s: float) -> None:
    """A step that computes for a second."""
    account.step_scheduled(number, due_s)
    account.input_ready(number, ready_s)
    account.computed(number, ready_s + 1.0)
    account.sent(Step(number), ready_s + 1.0, needs=number, bytes_in=100, bytes_out=10)


@pytest.mark.parametrize(
    ("upstream_s", "wait_s", "transfer_s"),
    [(11.5, 1.5, 0.5), (9.0, 0.0, 2.0), (10.0, 0.0, 2.0), (12.0, 2.0, 0.0), (99.0, 2.0, 0.0)],
)
@pytest.mark.parametrize("told_early", [True, False])
def test_the_wait_ends_when_the_stage_before_was_done_and_the_rest_is_transfer(
    upstream_s: float, wait_s: float, transfer_s: float, told_early: bool
) -> None:
    account = StageAccount(1)
    account.begin(10.0)
    if told_early:
        account.upstream_computed(0, [upstream_s])
    run_step(account, 0, due_s=10.0, ready_s=12.0)
    if not told_early:
        assert_parts(account.snapshot().overall, wait_s=2.0, compute_s=1.0)
        account.upstream_computed(0, [upstream_s])
    totals = account.snapshot()
    assert_parts(totals.overall, wait_s=wait_s, transfer_s=transfer_s, compute_s=1.0)
    assert totals.overall.communication_s == pytest.approx(transfer_s)
    assert (totals.bytes_in, totals.bytes_out, totals.num_undivided) == (100, 10, 0)


def test_a_wait_is_divided_when_the_times_come_and_steps_are_told_in_order() -> None:
    account = StageAccount(1)
    told: list[tuple[int, float | None]] = []
    account.on_step = lambda record, transfer_s: told.append((record.step, transfer_s))
    account.begin(0.0)
    run_step(account, 0, due_s=0.0, ready_s=1.0)
    run_step(account, 1, due_s=2.0, ready_s=2.0)  # no wait: needs no time, but comes second
    run_step(account, 2, due_s=3.0, ready_s=5.0)
    assert told == []
    account.upstream_computed(0, [0.75, 1.5])
    assert told == [(0, 0.25), (1, 0.0)]
    account.give_up(before_s=6.0)  # it left at 6
    assert told[2:] == []
    account.give_up(before_s=6.1)
    assert told[2:] == [(2, None)]
    totals = account.snapshot()
    assert_parts(totals.overall, wait_s=0.75 + 2.0, transfer_s=0.25, compute_s=3.0)
    assert totals.num_undivided == 1
    account.upstream_computed(2, [4.0])  # too late, and harmless
    assert account.snapshot() == totals


def test_times_that_come_after_their_call_divide_its_waits() -> None:
    account = StageAccount(1)
    account.begin(0.0)
    run_step(account, 0, due_s=0.0, ready_s=1.0)
    account.end(2.0)
    account.begin(10.0)
    run_step(account, 0, due_s=10.0, ready_s=12.0)
    account.end(13.0)
    account.upstream_computed(0, [0.5])  # steps are counted over all calls
    account.upstream_computed(1, [11.0])
    assert_parts(account.snapshot().overall, wait_s=1.5, transfer_s=1.5, compute_s=2.0)
    assert account.num_steps == 2


def test_a_step_whose_input_no_other_stage_made_has_no_transfer() -> None:
    account = StageAccount(0)
    account.begin(0.0)
    account.step_scheduled(0, 0.0)
    account.input_ready(0, 1.0)
    account.computed(0, 2.0)
    account.sent(Step(0), 2.0, needs=-1)
    assert account.is_divided
    assert_parts(account.snapshot().overall, wait_s=1.0, compute_s=1.0)


def test_times_that_are_never_needed_are_forgotten() -> None:
    account = StageAccount(0)
    account.upstream_computed(0, [0.0] * 10_000)
    assert len(account._upstream) <= 4096


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
    told: list[tuple[StepRecord, float | None]] = []
    account.on_step = lambda record, transfer_s: told.append((record, transfer_s))
    expected_wall_s = 0.0
    step = num_told = 0
    upstream_s: list[float] = []
    for call in range(20):
        begin_s = clock.now_s()
        account.begin(begin_s)
        for _ in range(50):
            account.step_scheduled(step, clock.now_s() - rng.random())
            upstream_s.append(clock.now_s() + rng.uniform(-0.5, 1.0))  # also too early, or too late
            clock.advance(rng.random())
            account.input_ready(step, clock.now_s())
            clock.advance(rng.random())
            account.computed(step, clock.now_s(), compute_s=rng.random())
            clock.advance(rng.choice([0.0, rng.random()]))
            needs = step - 50 * call if rng.random() < 0.9 else -1
            account.sent(Step(step, steady=rng.random() < 0.7), clock.now_s(), needs=needs)
            step += 1
            if rng.random() < 0.1:  # a batch of times, perhaps of steps that come later
                batch = upstream_s[num_told : step - rng.randint(0, 5)]
                account.upstream_computed(num_told, batch)
                num_told += len(batch)
            assert account.snapshot().overall.wall_s == pytest.approx(
                expected_wall_s + clock.now_s() - begin_s, abs=1e-6
            )
        clock.advance(rng.random())
        account.end(clock.now_s())
        expected_wall_s += clock.now_s() - begin_s
        clock.advance(5.0)
    account.upstream_computed(num_told, upstream_s[num_told : step - 7])
    undivided = account.snapshot().num_undivided
    account.give_up(float("inf"))
    assert account.is_divided
    assert [record.step for record, _ in told] == list(range(step))
    unknown = [record for record, transfer_s in told if transfer_s is None]
    assert undivided >= account.snapshot().num_undivided == len(unknown) > 0
    for record, transfer_s in told:
        assert 0 <= (transfer_s or 0.0) <= record.input_ready_s - record.scheduled_s + 1e-9
    totals = account.snapshot()
    transfers_s = sum(transfer_s or 0.0 for _, transfer_s in told)
    assert totals.overall.transfer_s == pytest.approx(transfers_s, abs=1e-6)
    assert totals.overall.wall_s == pytest.approx(expected_wall_s, abs=1e-6)
    for parts in (totals.overall, totals.steady):
        assert min(parts.compute_s, parts.wait_s, parts.send_s, parts.overhead_s) > 0
        assert parts.transfer_s > 0
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
