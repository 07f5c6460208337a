"""What an earlier run teaches, and how it is read from its folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mpipipe.cli.plan import PlanRequest, plan_command
from mpipipe.config.schema import Config, ModelConfig
from mpipipe.errors import ConfigError, OutputError
from mpipipe.logs.past_run import read_past_run
from mpipipe.planning.forecast import forecast_job
from mpipipe.planning.known_times import KnownTimes
from mpipipe.planning.learnt import LearntTimes, PastRun, learn
from mpipipe.planning.plan import DraftPlan, PipelinePlan
from mpipipe.planning.rate_times import rate_times
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.step_times import StepTimes
from tests.unit.model_specs import SMOL
from tests.unit.planned_rank import make_rank

RANKS = (make_rank(0, processor="A"), make_rank(1, processor="A"))
LENGTHS = ((40, 30),) * 24
CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "smollm2_135m"


def plan() -> PipelinePlan:
    return make_plan(Config(model=ModelConfig(dtype="float32")), SMOL, RANKS, "/models/smol")


def rates() -> StepTimes:
    return rate_times(SMOL, plan(), RANKS)


def run_with(decode: float, prefill: float, **changes: Any) -> PastRun:
    """A run whose steps took so many times as long as rates say, and nothing else any time."""
    steps = LearntTimes(rates(), decode, prefill, "")
    forecast = forecast_job(SMOL, plan(), JobShape.of(LENGTHS), steps)
    run = PastRun(
        name="run-1",
        plan=plan(),
        ranks=RANKS,
        lengths=LENGTHS,
        decode_steps_s=tuple(stage.decode_step_s for stage in forecast.stages),
        prefill_steps_s=tuple(stage.prefill_step_s for stage in forecast.stages),
        generate_s=forecast.generating_s,
        start_s=9.0,
        load_s=2.0,
    )
    return dataclasses.replace(run, **changes)


def test_the_factors_of_a_run_are_found_again() -> None:
    learnt = learn(SMOL, run_with(1.5, 0.8), KnownTimes(rates()))
    assert (learnt.decode, learnt.prefill) == pytest.approx((1.5, 0.8))
    known = learnt.applied_to(KnownTimes(rates()))
    start = known.start(SMOL, plan())
    assert (start.start_s, start.load_s, start.compile_s) == (9.0, 2.0, 0.0)
    assert "by the run run-1 decode steps take 1.50 times" in known.steps.source
    stage = plan().stages[1]
    assert known.steps.decode_s(stage, 8, 64) == pytest.approx(1.5 * rates().decode_s(stage, 8, 64))
    assert known.steps.prefill_s(stage, 64, 32) == pytest.approx(
        0.8 * rates().prefill_s(stage, 64, 32)
    )


def test_a_kind_of_step_that_a_run_did_not_have_takes_the_factor_of_the_other() -> None:
    learnt = learn(SMOL, run_with(1.5, 1.5, prefill_steps_s=(0.0, 0.0)), KnownTimes(rates()))
    assert (learnt.decode, learnt.prefill) == pytest.approx((1.5, 1.5))


def test_what_the_steps_do_not_explain_is_taken_over_too() -> None:
    run = run_with(1.0, 1.0)
    slower = dataclasses.replace(run, generate_s=1.2 * run.generate_s)
    learnt = learn(SMOL, slower, KnownTimes(rates()))
    forecast = forecast_job(
        SMOL, plan(), JobShape.of(LENGTHS), learnt.applied_to(KnownTimes(rates())).steps
    )
    assert forecast.generating_s == pytest.approx(slower.generate_s, rel=0.02)


def test_what_drafts_gained_is_in_the_factors_and_is_said() -> None:
    drafting = dataclasses.replace(
        plan(), drafts=DraftPlan(max_tokens=1, rows=(1, 2), step_s=(0.1, 0.1), key_s=0.0)
    )
    run = run_with(1.0, 1.0, plan=drafting)
    learnt = learn(SMOL, dataclasses.replace(run, generate_s=run.generate_s / 2), _known())
    assert learnt.decode == pytest.approx(0.5, rel=0.02)
    assert "what its drafts gained" in learnt.applied_to(_known()).steps.source
    without = learn(SMOL, run_with(1.0, 1.0), _known())
    assert "drafts" not in without.applied_to(_known()).steps.source


def _known() -> KnownTimes:
    return KnownTimes(rates())


# ---- from a folder -------------------------------------------------------------------------------


def rank_of(
    replica: int, stage: int, decode: float, prefill: float, *, load_s: float = 0.5
) -> dict[str, Any]:
    """An entry of metrics.json: seconds of a step of each kind."""

    def totals(seconds: float) -> dict[str, float]:
        return {"num_steps": 4, "compute_s": 4 * seconds}

    steps = {"stage": stage, "decode": totals(decode), "prefill": totals(prefill)}
    return {"replica": replica, "stage": steps, "load_s": load_s}


def write_run(folder: Path, run: PastRun, **changes: Any) -> None:
    ranks = [
        rank_of(0, stage, decode, prefill, load_s=load_s)
        for stage, (decode, prefill, load_s) in enumerate(
            zip(run.decode_steps_s, run.prefill_steps_s, (run.load_s, 0.5), strict=True)
        )
    ]
    phases = {"boot_s": 6.0, "load_s": run.start_s - 6.0, "generate_s": run.generate_s}
    documents = {
        "manifest.json": {"plan": json.loads(run.plan.to_json())},
        "metrics.json": {"attempt": 2, "phases": phases, "ranks": ranks},
    }
    for name, document in (documents | changes).items():
        (folder / name).write_text(json.dumps(document))
    resources = [dataclasses.asdict(rank) for rank in run.ranks]
    hello = {"event": "handshake", "attempt": 2, "resources": resources}
    (folder / "rank_0.log").write_text(json.dumps(hello) + "\n")
    lines = [
        {"attempt": 2, "num_prompt_tokens": prompt, "num_output_tokens": output}
        for prompt, output in run.lengths
    ]
    lines.append({"attempt": 1, "num_prompt_tokens": 999, "num_output_tokens": 999})
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run-1"
    folder.mkdir()
    run = run_with(1.5, 0.8)
    write_run(folder, run)
    read = read_past_run(folder)
    assert read.decode_steps_s == pytest.approx(run.decode_steps_s)
    assert read.prefill_steps_s == pytest.approx(run.prefill_steps_s)
    same = dataclasses.replace(
        read, decode_steps_s=run.decode_steps_s, prefill_steps_s=run.prefill_steps_s
    )
    assert same == run
    (folder / "status.json").write_text("{}")
    assert read_past_run(tmp_path).name == "run-1", "the latest run below a folder"


def test_of_several_replicas_the_first_is_read_with_its_own_requests(tmp_path: Path) -> None:
    """The head writes the lines of all requests, so its identity is on each of them."""
    run = run_with(1.5, 0.8)
    write_run(tmp_path, run)
    lines = (tmp_path / "requests.jsonl").read_text().splitlines()
    every = [json.loads(line) | {"replica": 0, "on_replica": 0} for line in lines]
    every += [line | {"on_replica": 1, "num_prompt_tokens": 7} for line in every]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in every))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["ranks"] += [rank_of(1, stage, 9.0, 9.0) for stage in (0, 1)]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    read = read_past_run(tmp_path)
    assert read.lengths == run.lengths
    assert read.decode_steps_s == pytest.approx(run.decode_steps_s)


def test_of_the_lanes_of_a_stage_the_first_is_read(tmp_path: Path) -> None:
    run = run_with(1.5, 0.8)
    write_run(tmp_path, run)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    first, last = metrics["ranks"]
    metrics["ranks"] = [first, rank_of(0, 0, 9.0, 9.0), last, rank_of(0, 1, 9.0, 9.0)]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    read = read_past_run(tmp_path)
    assert read.decode_steps_s == pytest.approx(run.decode_steps_s)
    assert read.prefill_steps_s == pytest.approx(run.prefill_steps_s)


@pytest.mark.parametrize(
    ("document", "content"),
    [("metrics.json", {}), ("manifest.json", {"plan": None}), ("metrics.json", {"ranks": []})],
)
def test_a_run_that_did_not_end_teaches_nothing(
    document: str, content: dict[str, Any], tmp_path: Path
) -> None:
    write_run(tmp_path, run_with(1.0, 1.0), **{document: content})
    with pytest.raises(OutputError, match="nothing can be learnt from"):
        read_past_run(tmp_path)


def test_a_plan_goes_by_what_was_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens_per_s(*, past_run: Path | None) -> tuple[float, str]:
        request = PlanRequest(num_stages=2, work="24x40x30", past_run=past_run, as_json=True)
        words = ["model.dtype=float32", "pipeline.device=cpu", "pipeline.threads_per_rank=1"]
        assert plan_command(CONFIG, words, request) == 0
        forecast = json.loads(capsys.readouterr().out)["forecast"]
        return forecast["tokens_per_s"], forecast["source"]

    write_run(tmp_path, run_with(2.0, 2.0))
    before, after = tokens_per_s(past_run=None), tokens_per_s(past_run=tmp_path)
    assert after[0] == pytest.approx(before[0] / 2, rel=0.05)
    assert f"by the run {tmp_path.name}" in after[1]


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    run = run_with(1.0, 1.0)
    write_run(tmp_path, dataclasses.replace(run, plan=dataclasses.replace(run.plan, num_layers=4)))
    request = PlanRequest(num_stages=2, work="24x40x30", past_run=tmp_path)
    with pytest.raises(ConfigError, match="that run had model"):
        plan_command(CONFIG, ["model.dtype=float32", "pipeline.device=cpu"], request)
