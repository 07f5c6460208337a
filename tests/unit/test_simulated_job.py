"""Whole simulated jobs: no request is lost, equal jobs are equal, and what hangs is named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpipipe.control_plane.messages import DecodeScheduled, StepScheduled
from mpipipe.scheduler.core import SchedulerCore
from mpipipe.simulation.simulated_job import SimulatedJob
from mpipipe.simulation.simulated_requests import RequestLengths
from mpipipe.simulation.stage_times import HeadTimes, ScriptedTimes
from tests.unit.simulated import WithholdingCore, alike, made_parts, run_job, uniform

HEAD = HeadTimes(0.0001, 0.0002, 0.0001, 0.00002, 0.00003)


def ends(job: SimulatedJob) -> list[tuple[int, float, int]]:
    """Of every request that has ended: its index, when, and its tokens."""
    return [
        (record.completion.index, record.finished_s, record.completion.num_output_tokens)
        for record in job.records
    ]


lengths = st.builds(
    lambda prompt, limit, output: (prompt, limit, min(limit, output)),
    st.integers(1, 60),
    st.integers(1, 30),
    st.integers(1, 30),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    requests=st.lists(lengths, min_size=1, max_size=20),
    num_stages=st.integers(1, 4),
    num_replicas=st.integers(1, 4),
    num_pages=st.integers(8, 40),
    num_host_pages=st.sampled_from([0, 20]),
    lookahead=st.integers(0, 1),
    prefill=st.sampled_from(["phases", "mixed"]),
)
def test_every_request_ends_once_as_long_as_it_is_meant_to_be(
    requests: list[tuple[int, int, int]],
    num_stages: int,
    num_replicas: int,
    num_pages: int,
    num_host_pages: int,
    lookahead: int,
    prefill: str,
) -> None:
    asked = [RequestLengths(i, *found) for i, found in enumerate(requests)]

    def run() -> SimulatedJob:
        parts = [
            made_parts(
                ScriptedTimes([0.01 + 0.001 * replica] * num_stages, [0.0001] * num_stages, 0.001),
                num_stages=num_stages,
                lookahead=lookahead,
                prefill=prefill,  # type: ignore[arg-type]
                num_pages=num_pages,
                num_host_pages=num_host_pages,
                tokens_per_step=16,
            )
            for replica in range(num_replicas)
        ]
        return run_job(parts, asked, HEAD)

    job = run()
    assert job.deadlocks() == []
    made = {index: num_tokens for index, _, num_tokens in ends(job)}
    assert len(made) == len(job.records) == len(requests)
    assert made == {request.index: request.num_output_tokens for request in asked}
    assert ends(run()) == ends(job)  # deterministic


def test_a_request_that_stops_early_frees_its_place() -> None:
    """One place: the second begins when the first has stopped after 5 of 50 tokens."""
    parts = made_parts(uniform(1), num_stages=1, rows=1)
    job = run_job(parts, alike(2, prompt=8, output=5, limit=50))
    assert [record.finished_s for record in job.records] == pytest.approx([0.04, 0.08])
    assert [record.completion.num_output_tokens for record in job.records] == [5, 5]


def test_lookahead_computes_one_token_too_many_of_what_stops() -> None:
    parts = made_parts(uniform(1), num_stages=1, rows=1, lookahead=1)
    job = run_job(parts, alike(1, prompt=8, output=5, limit=50))
    assert job.records[0].completion.num_output_tokens == 5
    assert parts.core.statistics().num_steps > 5


def test_pages_that_are_kept_in_host_memory_spare_work() -> None:
    """Four places, and pages for two and a half of the sequences: some are preempted."""
    found = []
    for num_host_pages in (0, 40):
        parts = made_parts(
            ScriptedTimes((0.01,), (0.001,)),
            num_stages=1,
            num_pages=10,
            num_host_pages=num_host_pages,
        )
        job = run_job(parts, alike(8, prompt=20, output=40))
        assert job.deadlocks() == []
        statistics = parts.core.statistics()
        assert statistics.num_preemptions > 0
        found.append((statistics.num_recomputed_tokens, job.clock.now_s()))
    (recomputed, without_s), (spared, with_s) = found
    assert recomputed > 0 == spared
    assert with_s < without_s


def test_two_replicas_are_twice_as_fast_as_one() -> None:
    requests = alike(16, prompt=8, output=101)
    one = run_job(made_parts(uniform(2), num_stages=2), requests).clock.now_s()
    parts = [made_parts(uniform(2), num_stages=2) for _ in range(2)]
    two = run_job(parts, requests).clock.now_s()
    assert one / two == pytest.approx(2, rel=0.03)


def test_equal_requests_on_alike_replicas_end_with_the_same_wave() -> None:
    """Without lookahead: 256 on two with 64 places each were four waves of one and five of one."""
    head = HeadTimes(90e-6, 20e-6, 20e-6, 20e-6, 5e-6)
    times = ScriptedTimes((0.02, 0.02), (0.5e-4, 0.5e-4))
    parts = [made_parts(times, num_stages=2, rows=32) for _ in range(2)]
    job = run_job(parts, alike(256, 64, 32), head)
    ends_s = [replica.ended_s for replica in job.replicas]
    assert max(ends_s) - min(ends_s) < 0.01 * max(ends_s)
    alone = run_job(made_parts(times, num_stages=2, rows=32), alike(128, 64, 32), head)
    assert max(ends_s) < 1.02 * alone.clock.now_s()


def test_a_faster_replica_completes_more() -> None:
    """Stages of 10 and of 30 ms: the requests are dispatched on demand, three to one."""
    parts = [made_parts(uniform(2, step_s), num_stages=2) for step_s in (0.03, 0.01)]
    run_job(parts, alike(256, prompt=8, output=21))
    slow, fast = (part.core.statistics().num_finished for part in parts)
    assert slow + fast == 256
    assert fast / slow == pytest.approx(3, rel=0.2)


def test_rank_0_takes_its_time_for_every_message_and_request() -> None:
    parts = [made_parts(uniform(2), num_stages=2) for _ in range(3)]
    head = HeadTimes(dispatch_message_s=0.0001, dispatch_request_s=0.001)
    job = run_job(parts, alike(30, prompt=8, output=4), head)
    messages = job.dispatched.messages
    # Each request is given once and told once.
    assert job.dispatched.busy_s == pytest.approx(2 * 30 * 0.001 + messages.num_messages * 0.0001)
    assert messages.num_bytes > 30 * 8 * 3  # prompts of 8 ids of three bytes
    assert job.dispatched.longest_queue_s > 0


def test_a_busy_rank_0_holds_its_own_replica_up() -> None:
    def elapsed_s(seconds: float) -> float:
        parts = [made_parts(uniform(1), num_stages=1) for _ in range(2)]
        head = HeadTimes(step_s=0.001, dispatch_request_s=seconds)
        return run_job(parts, alike(64, prompt=8, output=2), head).clock.now_s()

    assert elapsed_s(0.02) > 64 * 0.02 * 2 > elapsed_s(0.0)


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_a_deadlock_is_named(num_replicas: int) -> None:
    parts = [
        made_parts(uniform(2), num_stages=2, core_type=WithholdingCore)
        if replica == num_replicas - 1
        else made_parts(uniform(2), num_stages=2)
        for replica in range(num_replicas)
    ]
    job = run_job(parts, alike(4 * num_replicas, prompt=8, output=40))
    first, *_ = found = job.deadlocks()
    assert first.startswith(f"replica {num_replicas - 1}: no step is in flight")
    assert "4 sequences in slots" in first
    assert any(line.startswith("request ") and "not ended" in line for line in found)
    if num_replicas > 1:
        assert any(line.startswith("rank 0: it waits for 4 requests") for line in found)


def test_a_bug_of_the_runner_is_no_deadlock() -> None:
    class ForgettingCore(SchedulerCore):
        @property
        def is_idle(self) -> bool:
            return True

        def next_step(self) -> StepScheduled | DecodeScheduled | None:
            return None

    parts = made_parts(uniform(1), num_stages=1, core_type=ForgettingCore)
    with pytest.raises(AssertionError, match="neither finished nor refused"):
        run_job(parts, alike(1, prompt=8, output=4))
