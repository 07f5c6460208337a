"""What the stages of a simulation do, against times reckoned by hand."""

from __future__ import annotations

import pytest

from mpipipe.simulation.stage_times import HeadTimes, ScriptedTimes
from tests.unit.simulated import alike, made_parts, run_job, uniform


def test_one_stage_takes_its_steps_one_after_the_other() -> None:
    """One prompt step of 8 tokens at 1 ms each, then 3 decode steps of 10 ms."""
    parts = made_parts(ScriptedTimes((0.010,), (0.001,)), num_stages=1)
    job = run_job(parts, alike(1, prompt=8, output=4))
    assert job.clock.now_s() == pytest.approx(0.008 + 3 * 0.010)
    assert parts.stages.uses[0].compute_s == pytest.approx(0.038)
    (record,) = job.records
    assert record.token_s == pytest.approx((0.008, 0.018, 0.028, 0.038))


def test_a_single_request_on_two_stages_leaves_each_idle_half_of_the_time() -> None:
    parts = made_parts(uniform(2), num_stages=2)
    job = run_job(parts, alike(1, prompt=8, output=11))
    assert job.clock.now_s() == pytest.approx(10 * 2 * 0.010)  # prompts take nothing
    assert [use.compute_s for use in parts.stages.uses] == pytest.approx([0.1, 0.1])


def test_two_slots_fill_two_stages_but_for_the_ends() -> None:
    """Two sequences, one in each slot: a step ends every 10 ms; 10 ms to fill, 10 ms to drain."""
    parts = made_parts(uniform(2), num_stages=2)
    job = run_job(parts, alike(2, prompt=8, output=11))
    assert job.clock.now_s() == pytest.approx(20 * 0.010 + 0.010)
    assert parts.stages.uses[1].compute_s == pytest.approx(0.200)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_slowest_stage_sets_the_pace_and_the_others_wait(lookahead: int) -> None:
    """In the steady state a step every 20 ms: bubbles of a half, nothing, and a quarter."""
    times = ScriptedTimes((0.010, 0.020, 0.015))
    parts = made_parts(times, num_stages=3, lookahead=lookahead)
    run_job(parts, alike(3, prompt=8, output=101))
    bubbles = [1 - use.steady_compute_s / use.steady_s for use in parts.stages.uses]
    assert bubbles == pytest.approx([0.5, 0.0, 0.25], abs=0.01)


@pytest.mark.parametrize("num_stages", [1, 2, 4, 16])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_throughput_is_rows_over_the_longest_stage_time(num_stages: int, lookahead: int) -> None:
    times = ScriptedTimes((*[0.008] * (num_stages - 1), 0.010))
    parts = made_parts(times, num_stages=num_stages, lookahead=lookahead)
    job = run_job(parts, alike(4 * num_stages, prompt=8, output=401))
    decoded = 4 * num_stages * 400
    ends_s = 0.010 * num_stages  # to fill and to drain the pipe
    assert decoded / job.clock.now_s() == pytest.approx(4 / 0.010, rel=2 * ends_s / 4.0)


def test_a_hop_beside_the_compute_only_fills_the_pipe_later() -> None:
    """Without lookahead a slot's round takes 2 steps and 2 hops: 24 ms, of which 20 compute."""
    job = run_job(made_parts(uniform(2, hop_s=0.002), num_stages=2), alike(2, 8, 11))
    # The prompts take two hops, the second slot's last step ends 10 ms after the first slot's.
    assert job.clock.now_s() == pytest.approx(0.004 + 10 * 0.024 + 0.010)


def test_sending_holds_up_a_gpu() -> None:
    """Stage 0 computes 10 ms and sends 2 ms: a step every 12 ms."""
    times = ScriptedTimes((0.010, 0.010), hop_s=0.002)
    parts = made_parts(times, num_stages=2, lookahead=1)
    job = run_job(parts, alike(2, prompt=8, output=201))
    assert parts.stages.uses[0].send_s == pytest.approx(402 * 0.002)
    assert job.clock.now_s() == pytest.approx(400 * 0.012, rel=0.02)
    bubble = 1 - parts.stages.uses[0].steady_compute_s / parts.stages.uses[0].steady_s
    assert bubble == pytest.approx(2 / 12, abs=0.005)


def test_a_gpu_between_two_others_is_held_up_twice() -> None:
    """It receives 2 ms, computes 10 ms and sends 2 ms: a step every 14 ms for all."""
    parts = made_parts(uniform(3, 0.010, hop_s=0.002), num_stages=3, lookahead=1)
    job = run_job(parts, alike(3, prompt=8, output=201))
    assert job.clock.now_s() == pytest.approx(600 * 0.014, rel=0.02)
    middle = parts.stages.uses[1]
    # Prompts have a step for each slot, too.
    assert (middle.transfer_s, middle.send_s) == pytest.approx((603 * 0.002,) * 2, rel=0.01)


def test_lookahead_hides_the_way_of_ids_to_the_head_and_back() -> None:
    """3 ms until the scheduler has the ids and 3 ms until the stages have the message."""
    head = HeadTimes(message_s=0.003, notice_s=0.003)
    elapsed_s = {}
    for lookahead in (0, 1):
        parts = made_parts(uniform(2), num_stages=2, lookahead=lookahead)
        elapsed_s[lookahead] = run_job(parts, alike(2, 8, 101), head).clock.now_s()
    assert elapsed_s[0] == pytest.approx(100 * 0.026, rel=0.02)  # a round of two steps and both
    assert elapsed_s[1] == pytest.approx(200 * 0.010, rel=0.02)


def test_the_head_decides_on_one_step_after_the_other() -> None:
    """A head that takes 15 ms for a step cannot feed stages that take 10."""
    parts = made_parts(uniform(2), num_stages=2, lookahead=1)
    job = run_job(parts, alike(2, 8, 101), HeadTimes(step_s=0.015))
    assert job.clock.now_s() == pytest.approx(200 * 0.015, rel=0.05)
    assert job.rank_0.busy_s == pytest.approx(0.015 * parts.core.statistics().num_steps)


def test_a_host_that_launches_slowly_holds_up_its_device() -> None:
    """Steps of 1 ms, of which the host launches one in 3 ms."""
    parts = made_parts(uniform(2, 0.001), num_stages=2, lookahead=1, launch_s=0.003)
    job = run_job(parts, alike(2, 8, 101))
    assert job.clock.now_s() == pytest.approx(200 * 0.003, rel=0.05)
    fast = made_parts(uniform(2, 0.010), num_stages=2, lookahead=1, launch_s=0.003)
    assert run_job(fast, alike(2, 8, 101)).clock.now_s() == pytest.approx(200 * 0.010, rel=0.02)
