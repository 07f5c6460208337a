"""A run's own files, simulated anew: a simulated run that is written down comes out as it was."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mpipipe.cli.simulation_job import simulate_command
from mpipipe.errors import OutputError
from mpipipe.logs.reading import RunFiles
from mpipipe.metrics.lines import request_line, step_line
from mpipipe.plain_values import to_json
from mpipipe.simulation.recorded_run import RecordedTimes, read_recorded_run
from mpipipe.simulation.simulate import ReplicaPlan, Simulation, SimulationOptions, simulate_job
from mpipipe.simulation.simulated_requests import RequestLengths
from mpipipe.simulation.stage_times import HeadTimes, StepWork
from tests.unit.test_plan import make_plan
from tests.unit.test_simulate_command import request

IDENTITY = {"run": "0123456789ab", "attempt": 1, "job": None, "replica": 0}
NO_TIME = SimulationOptions(HeadTimes(), trace_steps=10_000)
REQUESTS = [RequestLengths(i, 5 + 7 * i % 40, 12, 12 if i % 3 else 4 + i % 7) for i in range(24)]
PLAN = replace(
    make_plan(), max_sequences_per_slot=4, max_tokens_per_step=32, max_sequence_tokens=8192
)


@dataclass(frozen=True)
class Uneven:
    """Stages that are now and then slow."""

    def compute_s(self, work: StepWork, step: int) -> tuple[float, ...]:
        slow = 3.0 if step % 5 == 0 else 1.0
        return (0.010 + 0.001 * work.num_tokens, (0.008 + 0.001 * work.num_tokens) * slow)

    def hops_s(self, num_tokens: int) -> tuple[float, ...]:
        return (0.0001,)

    @property
    def ids_s(self) -> float:
        return 0.0001


def write_run(folder: Path, simulation: Simulation, **spared: Any) -> RunFiles:
    """The files of a run that took what `simulation` says."""
    folder.mkdir()
    config = {"generation": {"max_new_tokens": 12}}
    plan = json.loads(to_json(PLAN))
    (folder / "manifest.json").write_text(json.dumps({"plan": plan, "config": config}))
    parts = ("compute", "wait", "transfer", "send", "idle")
    ranks: list[dict[str, Any]] = []
    for stage in simulation.result.stages:
        overall = {f"{part}_s": getattr(stage, f"{part}_s") for part in parts}
        overall["overhead_s"] = 0.0
        ranks.append({"rank": stage.stage, "stage": {"overall": overall, "num_steps": 0}})
        start = json.dumps({**IDENTITY, "rank": stage.stage, "stage": stage.stage})[:-1]
        lines = [step_line(start, record, 0.0) for record in simulation.records[stage.stage]]
        (folder / f"steps_rank_{stage.stage}.jsonl").write_text("".join(lines))
    metrics = {"attempt": 1, "ranks": ranks, **spared}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with (folder / "requests.jsonl").open("w") as file:
        for record in simulation.requests:
            start = json.dumps(IDENTITY)[:-1]
            file.write(request_line(start, record, record.gaps_s(), token_times=False))
    return RunFiles(folder)


@pytest.fixture
def simulation() -> Simulation:
    return simulate_job([ReplicaPlan(PLAN, Uneven())], REQUESTS, NO_TIME)


def test_plan_prompts_and_times_come_from_the_files(tmp_path: Path, simulation: Simulation) -> None:
    recorded = read_recorded_run(write_run(tmp_path / "run", simulation))
    assert recorded.plan == PLAN
    asked = [(r.index, r.num_prompt_tokens, r.num_output_tokens) for r in REQUESTS]
    found = [(r.index, r.num_prompt_tokens, r.num_output_tokens) for r in recorded.requests]
    assert found == asked
    assert [r.stops for r in recorded.requests] == [r.stops for r in REQUESTS]
    assert recorded.measured.tokens_per_s == pytest.approx(simulation.result.tokens_per_s)


def test_the_same_schedule_takes_the_same_time(tmp_path: Path, simulation: Simulation) -> None:
    """Within the 50 µs that a message is taken for where no step tells how long it was."""
    recorded = read_recorded_run(write_run(tmp_path / "run", simulation))
    again = simulate_job([ReplicaPlan(recorded.plan, recorded.times)], recorded.requests, NO_TIME)
    assert again.result.num_steps == simulation.result.num_steps
    assert again.result.elapsed_s == pytest.approx(simulation.result.elapsed_s, rel=0.005)
    for stage, measured in zip(again.result.stages, recorded.measured.bubble_ratios, strict=True):
        assert stage.bubble == pytest.approx(measured, abs=0.005)


def test_steps_that_were_not_recorded_take_what_lies_between_those_that_were() -> None:
    decode = [(4, 0.010), (8, 0.014)]
    times = RecordedTimes([{7: (8, 0.1)}], [{"decode": decode, "prefill": [(100, 0.2)]}], (), 0.0)
    assert times.compute_s(StepWork(rows=8), 7) == (0.1,)  # the step of this number and size
    assert times.compute_s(StepWork(rows=4), 7) == (0.010,)  # of another size
    assert times.compute_s(StepWork(rows=6), 3) == pytest.approx((0.012,))
    assert times.compute_s(StepWork(rows=2), 3) == (0.010,)
    assert times.compute_s(StepWork(chunk_tokens=200), 3) == pytest.approx((0.4,))
    assert times.compute_s(StepWork(rows=50, chunk_tokens=50), 3) == (0.2,)  # none was mixed


@pytest.mark.parametrize(
    ("spared", "told"),
    [
        ({}, ""),
        ({"num_shared_tokens": 0, "drafts": {"num_drafted": 8, "num_accepted": 0}}, ""),
        ({"num_shared_tokens": 7168}, "spared 7,168 prompt tokens in shared prefixes, which"),
        (
            {"num_shared_tokens": 16, "drafts": {"num_accepted": 120}},
            "spared 16 prompt tokens in shared prefixes and 120 drafted tokens, which",
        ),
    ],
)
def test_what_the_run_was_spared_and_the_simulation_computes_is_told(
    tmp_path: Path,
    simulation: Simulation,
    capsys: pytest.CaptureFixture[str],
    spared: dict[str, Any],
    told: str,
) -> None:
    """Beside the comparison of the two, which is of unlike work then."""
    files = write_run(tmp_path / "run", simulation, **spared)
    assert simulate_command(request(None, from_run=files.folder, as_json=False)) == 0
    shown = capsys.readouterr().out
    assert told in shown
    assert ("the run was spared" in shown) == bool(told)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no plan of this version"),
        (lambda folder: (folder / "requests.jsonl").write_text(""), "no prompt of it"),
        (lambda folder: (folder / "steps_rank_1.jsonl").unlink(), "no lines of steps"),
    ],
)
def test_a_run_that_says_too_little_is_refused(
    tmp_path: Path, simulation: Simulation, damage: Any, match: str
) -> None:
    files = write_run(tmp_path / "run", simulation)
    damage(files.folder)
    with pytest.raises(OutputError, match=match):
        read_recorded_run(files)
