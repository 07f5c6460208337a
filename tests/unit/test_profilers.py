"""Whether a rank is profiled as it should be, from its environment; `profile.steps`."""

from __future__ import annotations

import pytest

from mpipipe.config.load import load_config
from mpipipe.errors import ConfigError
from mpipipe.topology.profilers import listens_for_ranges, profiler_problem
from mpipipe.types import ProfilerName


@pytest.mark.parametrize(
    "name", ["NSYS_PROFILING_SESSION_ID", "NVTX_INJECTION64_PATH", "CUDA_INJECTION64_PATH"]
)
def test_a_program_that_takes_ranges_is_seen_by_what_it_sets(name: str) -> None:
    assert listens_for_ranges({name: "1"})
    assert not listens_for_ranges({name: ""})
    assert not listens_for_ranges({"MPIPIPE_PROFILER": "perf"})


@pytest.mark.parametrize(
    ("tool", "environ"),
    [
        ("none", {}),
        ("torch", {}),
        ("perf", {"MPIPIPE_PROFILER": "perf"}),
        ("nsys", {"MPIPIPE_PROFILER": "nsys"}),
        ("nsys", {"NSYS_PROFILING_SESSION_ID": "7"}),  # by hand
    ],
)
def test_a_rank_that_is_profiled_as_asked_has_no_problem(
    tool: ProfilerName, environ: dict[str, str]
) -> None:
    assert profiler_problem(tool, environ, "n1") == ""


@pytest.mark.parametrize(
    ("tool", "started", "said"),
    [
        ("perf", "", "mpirun -n 2 launch/profile_rank.sh perf FOLDER mpipipe run"),
        ("nsys", "", "launch/run.sh starts it in a Slurm job"),
        ("nsys", "perf", "does not run under it"),
        ("nsys", "missing", "nsys is not to be found on n1"),
        ("perf", "refused", "perf_event_paranoid"),
    ],
)
def test_a_rank_that_is_not_says_why_and_what_to_do(
    tool: ProfilerName, started: str, said: str
) -> None:
    problem = profiler_problem(tool, {"MPIPIPE_PROFILER": started}, "n1")
    assert problem.startswith(f'profile.tool = "{tool}", but')
    assert said in problem


@pytest.mark.parametrize("steps", ["[3]", "[5,4]", "[-1,4]", "[1,2,3]"])
def test_steps_are_a_first_and_a_last_one(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"profile\.steps.*first and the last"):
        load_config(None, [f"profile.steps={steps}"])
