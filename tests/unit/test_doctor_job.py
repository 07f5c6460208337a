"""The doctor looks at a job as its run would: the same folder refused, the same prompts planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mpipipe.config.load import load_config
from mpipipe.config.prompts import PromptLine, configured_prompts
from mpipipe.doctor import job
from mpipipe.doctor.checks.job import HostDemand
from mpipipe.doctor.facts import NodeFacts, RankFacts
from mpipipe.doctor.finding import Finding, Severity
from mpipipe.errors import CheckpointError, OutputError
from mpipipe.planning.model_facts import ModelFacts, read_model
from mpipipe.planning.plan import PipelinePlan, StageOffload, StagePlan
from mpipipe.planning.rank_rooms import CPU_LIBRARY_BYTES
from mpipipe.planning.workload import Workload
from mpipipe.run_folder.files import prepare_run_folder
from mpipipe.runtime.requests import Prepared, PreparedPrompts, workload_of
from mpipipe.types import Request
from tests.unit.planned_rank import GIB, make_rank

BENCH = Path(__file__).parents[2] / "configs/bench_gpu.toml"


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "metrics.json", "status.json", "completions_rank_0.jsonl", "rank_1.log"],
)
def test_the_doctor_names_whatever_the_run_would_refuse(tmp_path: Path, name: str) -> None:
    loaded = load_config(BENCH, [f"output.dir={tmp_path}"])
    assert job._run_folder(loaded) == []
    (tmp_path / name).touch()
    with pytest.raises(OutputError, match="already holds a run"):
        prepare_run_folder(tmp_path, overwrite=False)
    (finding,) = job._run_folder(loaded)
    assert finding.severity is Severity.FATAL
    (finding,) = job._run_folder(
        load_config(BENCH, [f"output.dir={tmp_path}", "output.overwrite=true"])
    )
    assert finding.severity is Severity.OK


def test_files_of_others_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert job._run_folder(load_config(BENCH, [f"output.dir={tmp_path}"])) == []


def prompts_of(tmp_path: Path) -> tuple[ModelFacts, list[PromptLine]]:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "y"}\n')
    loaded = load_config(BENCH, [f"prompts.path={path}", "generation.max_new_tokens=7"])
    return read_model(loaded), configured_prompts(loaded)


def prepared(model: ModelFacts, *prompts: Any) -> Prepared:
    """What `tokenize` returns of these prompts."""
    return Prepared(workload_of(model, PreparedPrompts(*prompts)), None, PreparedPrompts(*prompts))


def test_the_plan_knows_the_prompts_as_the_runs_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lines = prompts_of(tmp_path)
    requests = tuple(
        Request(line.prompt_id, line.index, (1,) * length, line.sampling)
        for line, length in zip(lines, (3, 5), strict=True)
        if line.sampling is not None
    )
    monkeypatch.setattr(job, "tokenize", lambda *_: prepared(model, requests, ()))
    findings: list[Finding] = []
    workload = job._workload(model, lines, findings, quick=False)
    assert findings == []
    assert (workload.num_requests, workload.longest_request_tokens) == (2, 12)
    assert (workload.num_prompt_tokens, workload.num_output_tokens) == (8, 14)


def test_what_a_run_would_warn_of_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lines = prompts_of(tmp_path)
    said = ("2 prompts begin with <s>: take it out of them",)
    monkeypatch.setattr(job, "tokenize", lambda *_: prepared(model, (), (), said))
    findings: list[Finding] = []
    job._workload(model, lines, findings, quick=False)
    (finding,) = findings
    assert (finding.check, finding.severity) == ("job.prompts", Severity.WARNING)
    assert (finding.what, finding.remedy) == ("2 prompts begin with <s>", "take it out of them")


def test_a_missing_tokenizer_is_a_finding_and_the_rest_is_planned_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lines = prompts_of(tmp_path)

    def missing(*_: object) -> None:
        raise CheckpointError("no tokenizer in /m: copy it there")

    monkeypatch.setattr(job, "tokenize", missing)
    findings: list[Finding] = []
    workload = job._workload(model, lines, findings, quick=False)
    assert (workload.num_requests, workload.longest_request_tokens) == (2, None)
    (finding,) = findings
    assert (finding.check, finding.severity, finding.exit_code) == (
        "job.tokenizer",
        Severity.FATAL,
        3,
    )


def test_prompts_that_could_not_be_read_are_not_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = prompts_of(tmp_path)
    monkeypatch.setattr(job, "tokenize", lambda *_: pytest.fail("nothing to tokenise"))
    assert job._workload(model, [], [], quick=False) == Workload()


def test_of_many_prompts_the_longest_stand_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doctor does not take minutes."""
    model, lines = prompts_of(tmp_path)
    many = [
        dataclasses.replace(line, prompt_id=f"{number}", text="x" * number)
        for number, line in enumerate(lines * 750)
    ]

    def as_letters(_: object, some: list[PromptLine]) -> Prepared:
        assert min(len(line.text or "") for line in some) == 500
        requests = tuple(
            Request(line.prompt_id, line.index, (1,) * len(line.text or ""), line.sampling)
            for line in some
            if line.sampling is not None
        )
        return prepared(model, requests, ())

    monkeypatch.setattr(job, "tokenize", as_letters)
    workload = job._workload(model, many, [], quick=False)
    assert (workload.num_requests, workload.longest_request_tokens) == (1500, 1506)
    assert workload.num_output_tokens == 1500 * 7
    assert workload.num_prompt_tokens == sum(range(500, 1500)) * 3 // 2


def test_what_needs_no_tokenizer_is_known_in_a_hurry_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lines = prompts_of(tmp_path)
    monkeypatch.setattr(job, "tokenize", lambda *_: pytest.fail("takes seconds"))
    workload = job._workload(model, lines, [], quick=True)
    assert workload.num_requests == 2
    assert workload.sampling is not None


# ---- memory --------------------------------------------------------------------------------------


def plans_of(
    num_ranks: int, *words: str
) -> tuple[ModelFacts, tuple[PipelinePlan, ...], list[Finding]]:
    """As the doctor plans for ranks without GPUs, two on each host."""
    loaded = load_config(BENCH, ["pipeline.device=cpu", *words])
    model, findings = read_model(loaded), list[Finding]()
    ranks = [make_rank(rank, f"node{rank // 2}") for rank in range(num_ranks)]
    workload = Workload(num_requests=8, longest_request_tokens=64)
    return model, job._plans(loaded, model, ranks, workload, findings), findings


def demands_of(num_ranks: int, *words: str) -> list[HostDemand]:
    model, plans, _ = plans_of(num_ranks, *words)
    node = NodeFacts(memory_available=64 * GIB)
    facts = [RankFacts(rank, f"node{rank // 2}", node=node) for rank in range(num_ranks)]
    return job._demands(plans, model, facts)


def test_memory_is_that_of_all_replicas() -> None:
    """Two replicas on two hosts: the first one's plan does not name the second host."""
    words = ("pipeline.num_stages=2", "memory.num_kv_pages=64")
    (alone,) = demands_of(2, *words)
    first, second = demands_of(4, *words, "pipeline.replicas=2")
    assert (first.host, second.host) == ("node0", "node1")
    assert first.weight_bytes == second.weight_bytes == alone.weight_bytes > 0
    assert first.library_bytes == second.library_bytes == alone.library_bytes


def test_replicas_on_one_host_need_their_memory_together() -> None:
    words = ("pipeline.num_stages=1", "memory.num_kv_pages=64")
    (alone,) = demands_of(1, *words)
    (both,) = demands_of(2, *words, "pipeline.replicas=2")
    assert both.weight_bytes == 2 * alone.weight_bytes
    assert both.kv_bytes == 2 * alone.kv_bytes > 0


def test_each_lane_has_libraries_of_its_own() -> None:
    (alone,) = demands_of(1, "pipeline.num_stages=1")
    (shared,) = demands_of(2, "pipeline.num_stages=1", "pipeline.tensor_parallel=2")
    assert shared.library_bytes - alone.library_bytes == CPU_LIBRARY_BYTES


def test_the_finding_of_the_plan_tells_replicas_and_lanes() -> None:
    *_, (finding,) = plans_of(2, "pipeline.num_stages=1", "pipeline.replicas=2")
    assert finding.what.startswith("2 replicas, the first of 1 stage of ")
    *_, (finding,) = plans_of(2, "pipeline.num_stages=1", "pipeline.tensor_parallel=2")
    assert " layers on 2 ranks each in " in finding.what


def test_disk_space_is_wanted_for_all_replicas() -> None:
    def stage(rank: int, host: str, disk_bytes: int) -> StagePlan:
        offload = StageOffload(device_bytes=1, disk_bytes=disk_bytes)
        return StagePlan(0, rank, host, 0, 2, True, True, 9, 1.0, offload=offload)

    stages = [stage(0, "a", 5), stage(1, "a", 7), stage(2, "b", 11)]
    assert job._offload_needs(stages) == {"a": 12, "b": 11}
