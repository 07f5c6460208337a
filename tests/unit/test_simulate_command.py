"""`mpipipe simulate`: machines that are not here, with the real scheduler."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mpipipe.cli.simulation_job import SimulationRequest, simulate_command
from mpipipe.errors import ConfigError, PlanError
from mpipipe.simulation import simulate
from mpipipe.simulation.followed_steps import FollowedSteps
from tests.unit.simulated import WithholdingCore

ROOT = Path(__file__).resolve().parents[2]
OPENLLAMA_7B = ROOT / "configs/shapes/openllama_7b"
SMOLLM2 = ROOT / "configs/shapes/smollm2_135m"
LLAMA_405B = ROOT / "configs/shapes/llama3_405b"


def request(model: Path | None = OPENLLAMA_7B, *words: str, **asked: Any) -> SimulationRequest:
    defaults: dict[str, Any] = {
        "gpus": "",
        "num_nodes": 1,
        "link": "10GbE",
        "num_stages": 0,
        "num_replicas": 0,
        "work": "32x64x16",
        "seed": 0,
        "from_run": None,
        "stand_for_all": 0,
        "dispatch_s": (20e-6, 6e-6),
        "trace": None,
        "as_json": True,
    }
    return SimulationRequest(config=model, words=words, **(defaults | asked))


def simulated(
    capsys: pytest.CaptureFixture[str], *args: Any, code: int = 0, **asked: Any
) -> dict[str, Any]:
    assert simulate_command(request(*args, **asked)) == code
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def test_two_t4_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    found = simulated(capsys, gpus="2 x t4", num_nodes=2)
    assert found["simulated"]
    assert (found["num_stages"], found["num_replicas"], found["num_completed"]) == (2, 1, 32)
    assert found["tokens_per_s"] == pytest.approx(32 * 16 / found["elapsed_s"])
    assert [stage["host"] for stage in found["stages"]] == ["node0", "node1"]
    for stage in found["stages"]:
        parts_s = sum(
            stage[f"{part}_s"] for part in ("compute", "wait", "transfer", "send", "idle")
        )
        assert parts_s == pytest.approx(found["elapsed_s"])
    assert found["deadlocks"] == []
    assert found["dispatch"] is None
    assert found["forecast_tokens_per_s"] == pytest.approx(found["tokens_per_s"], rel=0.1)


def test_cpus_say_whose_step_times_they_have(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIPIPE_CACHE", str(tmp_path))  # no profiles
    found = simulated(capsys, ROOT / "configs/shapes/smollm2_135m", num_stages=1, work="4x16x8")
    assert "CPU ranks of this host, one CPU core of planning/cost.py" in found["times"]


def test_a_slower_link_makes_the_job_slower(capsys: pytest.CaptureFixture[str]) -> None:
    rates = [
        simulated(capsys, gpus="4 x t4", num_nodes=4, link=link)["tokens_per_s"]
        for link in ("10GbE", "1GbE")
    ]
    assert rates[0] > 1.02 * rates[1]


def test_of_unlike_cards_the_fast_one_waits(capsys: pytest.CaptureFixture[str]) -> None:
    """With equal shares of the layers; those that the planner chooses are faster."""
    asked: dict[str, Any] = {"gpus": "h100, t4", "work": "64x64x32"}
    equal = simulated(capsys, OPENLLAMA_7B, "pipeline.split=[16,16]", **asked)
    fast, slow = equal["stages"]
    assert fast["bubble"] > slow["bubble"] + 0.2
    assert simulated(capsys, **asked)["tokens_per_s"] > 1.05 * equal["tokens_per_s"]


def test_64_stages_of_a_405b_shape(capsys: pytest.CaptureFixture[str]) -> None:
    found = simulated(capsys, LLAMA_405B, gpus="64 x h100", num_nodes=8, work="256x64x4")
    assert (found["num_stages"], found["num_completed"]) == (64, 256)
    assert sum(stage["num_layers"] for stage in found["stages"]) == 126


def test_some_of_a_thousand_replicas_stand_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"gpus": "t4", "num_nodes": 1000, "num_stages": 2, "num_replicas": 1000}
    few = simulated(capsys, **asked, work="8000x64x4", stand_for_all=16)
    assert (few["num_replicas"], few["num_simulated_replicas"]) == (1000, 16)
    assert few["num_completed"] == 8000
    assert few["num_output_tokens"] == 8000 * 4
    # What rank 0 does is that of all: each prompt handed out and taken back.
    assert few["dispatch"]["busy_share"] * few["elapsed_s"] > 2 * 8000 * 6e-6
    more = simulated(capsys, **asked, work="8000x64x4", stand_for_all=64)
    assert more["tokens_per_s"] == pytest.approx(few["tokens_per_s"], rel=0.1)
    assert more["dispatch"]["num_bytes"] == pytest.approx(few["dispatch"]["num_bytes"], rel=0.02)


def test_the_answer_as_text_and_as_a_trace(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    asked = request(gpus="4 x t4", num_stages=2, num_replicas=2, trace=trace, as_json=False)
    assert simulate_command(asked) == 0
    told = capsys.readouterr().out
    assert told.startswith("simulated: 2 replicas of 2 stages")
    for words in ("32 of 32 prompts", "rank 0 to its own stages", "rank 0 dispatching", "bubble"):
        assert words in told
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert any(event.get("cat") == "compute" for event in events)


def test_a_deadlock_is_told_and_is_a_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpipipe.simulation.simulate.SchedulerCore", WithholdingCore)
    assert simulate_command(request(gpus="2 x t4", as_json=False)) == 1
    told = capsys.readouterr().out
    assert "deadlock: replica 0: no step is in flight" in told
    assert "0 of 32 prompts" in told


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"model": None}, "give a configuration"),
        ({"gpus": "3 x t4", "num_stages": 2}, "2 GPUs, and --gpus '3 x t4' has 3"),
        ({"gpus": "2 x t5"}, "t5"),
        ({"gpus": "2 x t4", "num_nodes": 2, "link": "string"}, "there is no link"),
        ({"from_run": Path("run")}, "leave CONFIG"),
        ({"work": "many"}, "not of the form"),
    ],
)
def test_options_that_do_not_fit_are_told(asked: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        simulate_command(request(**asked))


def test_what_does_not_fit_is_refused_as_a_run_would() -> None:
    with pytest.raises(PlanError):
        simulate_command(request(LLAMA_405B, gpus="2 x t4"))


def test_the_command_needs_neither_torch_nor_mpi() -> None:
    """As a user starts it, in a process of its own."""
    words = ["simulate", str(OPENLLAMA_7B), "--gpus", "2 x t4", "--work", "8x32x4", "--json"]
    code = (
        f"import sys; sys.argv = ['mpipipe', *{words!r}]\n"
        "from mpipipe.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'mpi4py'} & set(sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["num_completed"] == 8


def test_pages_that_prompts_share_are_read_once_on_cpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As forecasts have it: 1,024 of 1,056 tokens are common to 16 rows."""
    asked: dict[str, Any] = {"work": "16x1024+32x32"}
    words = ("pipeline.device=cpu", "model.dtype=float32")
    once = simulated(capsys, SMOLLM2, *words, **asked)
    for_each = partial(FollowedSteps, pads=True)
    monkeypatch.setattr(simulate, "FollowedSteps", lambda num_slots, **_: for_each(num_slots))
    apart = simulated(capsys, SMOLLM2, *words, **asked)
    assert once["num_shared_tokens"] == apart["num_shared_tokens"] > 0
    assert once["elapsed_s"] < 0.9 * apart["elapsed_s"]


def test_pages_that_prompts_share_are_read_once_on_gpus_as_plans_count_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: dict[str, Any] = {"work": "64x1024+32x32", "gpus": "2 x h200"}
    settings = "model.weights=random"
    once = simulated(capsys, SMOLLM2, settings, **asked)
    apart = simulated(capsys, SMOLLM2, settings, "memory.read_prefixes_once=false", **asked)
    assert once["num_shared_tokens"] == apart["num_shared_tokens"] > 0
    assert once["elapsed_s"] < apart["elapsed_s"]


def test_prompts_that_begin_alike_go_to_one_replica_as_in_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight texts of eight prompts each: four replicas compute as few of their tokens as one."""
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": f"{number % 8} " * 500 + f"{number:03} " * 8, "max_new_tokens": 8 + number % 3}
        for number in range(64)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = (f"prompts.path={path}", "model.weights=random", "pipeline.max_sequences_per_slot=4")
    found = [
        simulated(capsys, SMOLLM2, *words, work="", num_stages=1, num_replicas=number)
        for number in (1, 4)
    ]
    assert found[0]["num_shared_tokens"] == found[1]["num_shared_tokens"] > 0
