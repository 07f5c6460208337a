"""How a launch ended, from its exit code and what the run said."""

from __future__ import annotations

from typing import Any

import pytest

from mpipipe.experiments.outcome import Ending, judge_ending, was_stopped

EVIDENCE = {"has_metrics": True, "has_tokens": True, "has_speed": True}
NEEDS = "the plan needs 20 GiB on rank 0, and 14 are there: use more stages"
SHORT = "memory ran out (CUDA out of memory. Tried to allocate 2 GiB): lower gpu_memory_fraction"


@pytest.mark.parametrize(
    ("ending", "outcome", "reason"),
    [
        ({"exit_code": 0, **EVIDENCE}, "ok", ""),
        ({"exit_code": 0, **EVIDENCE, "has_tokens": False}, "failed", "without completions"),
        ({"exit_code": 0, **EVIDENCE, "has_speed": False}, "failed", "without throughput"),
        ({"exit_code": 4, **EVIDENCE, "num_failed": 3}, "failed", "3 prompts became error"),
        ({"exit_code": 0}, "failed", "without metrics.json"),
        ({"exit_code": None}, "timeout", "within 60 s"),
        ({"exit_code": 2, "error": NEEDS, "kind": "PlanError"}, "infeasible", "20 GiB"),
        ({"exit_code": 2, "error": NEEDS}, "infeasible", "20 GiB"),
        ({"exit_code": 2, "error": "x", "kind": "OutputError"}, "failed", "output folder: x"),
        ({"exit_code": 2, "last_line": "no such option"}, "failed", "no such option"),
        ({"exit_code": 5, "error": SHORT}, "out_of_memory", "CUDA out of memory"),
        ({"exit_code": 6, "last_line": "std::bad_alloc"}, "out_of_memory", "bad_alloc"),
        ({"exit_code": 1, "error": "gone", "kind": "MemoryError"}, "out_of_memory", "gone"),
        ({"exit_code": 5, "error": "no MPI"}, "failed", "MPI, ranks, memory or devices: no MPI"),
        ({"exit_code": 137, "last_line": "srun: x"}, "failed", "SIGKILL"),
        ({"exit_code": 4, "num_failed": 3}, "failed", "3 prompts became error records"),
        ({"exit_code": 255}, "failed", "exit code 255"),
    ],
)
def test_an_end_is_a_result_with_a_reason(
    ending: dict[str, Any], outcome: str, reason: str
) -> None:
    found, told = judge_ending(Ending(limit_s=60.0, **ending))
    assert found == outcome
    assert reason in told
    assert "\n" not in told
    assert bool(told) == (outcome != "ok")


def test_a_long_error_is_cut() -> None:
    _, told = judge_ending(Ending(exit_code=1, limit_s=1.0, error="word\n" * 1000))
    assert len(told) < 450
    assert told.endswith("...")


def test_a_launch_that_was_told_to_stop_is_no_result() -> None:
    assert was_stopped(75)
    assert was_stopped(130)
    assert not was_stopped(0)
    assert not was_stopped(None)
