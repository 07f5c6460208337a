"""The run folder, and what must not change the tokens: stages, slots, pages, caches, batching."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mpipipe.logs.facts import read_facts
from mpipipe.logs.reading import RunFiles
from mpipipe.logs.schema import check_line, schema_of
from mpipipe.logs.summary import summarise
from tests.e2e.conftest import (
    LIMIT_S,
    ROOT,
    Outcome,
    check_wall_clock,
    execute,
    mpiexec,
    mpipipe,
    read_jsonl,
    run,
)
from tests.e2e.warm_server import warm_python
from tests.unit.trace_format import faults

SAMPLED = ["generation.temperature=1.5", "generation.top_k=50", "generation.seed=11"]
RECORD_KEYS = {
    "id",
    "text",
    "token_ids",
    "finish_reason",
    "num_prompt_tokens",
    "num_output_tokens",
    "queue_s",
    "ttft_s",
    "latency_s",
    "tokens_per_s",
    "crc32",
}


def tokens(records: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Token ids by prompt id."""
    return {record["id"]: record["token_ids"] for record in records}


@pytest.fixture(scope="module")
def many_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts of unequal lengths, long enough to need several pages each."""
    path = tmp_path_factory.mktemp("prompts") / "many.jsonl"
    lines = [{"id": f"p{i}", "prompt": "many words " * (1 + i % 4) + str(i)} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def on_two_ranks(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that three tests look at."""
    words = (
        "log.sample_interval_s=0.2", "log.token_times=true", "generation.max_new_tokens=90",
        "profile.tool=perf", "log.level=debug",
    )  # fmt: skip
    outcome = run(2, tiny_config, tmp_path_factory.mktemp("two") / "run", *words, warm=False)
    assert outcome.exit_code == 0, outcome.stderr
    return outcome


def test_the_run_folder_holds_what_the_readme_says(
    on_two_ranks: Outcome, repeated: Outcome
) -> None:
    outcome, folder = on_two_ranks, on_two_ranks.folder
    assert "mpirun -n 2 launch/profile_rank.sh perf" in outcome.stderr, "not started under it"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "manifest.json",
        "completions.jsonl",
        "completions_rank_0.jsonl",
        "rank_0.log",
        "rank_1.log",
        "metrics.json",
        "status.json",
        "messages_rank_0.jsonl",
        "messages_rank_1.jsonl",
        "steps_rank_0.jsonl",
        "steps_rank_1.jsonl",
        "samples_rank_0.jsonl",
        "samples_rank_1.jsonl",
        "requests.jsonl",
        "clock.jsonl",
    }
    records = outcome.completions()
    assert [record["id"] for record in records] == ["first", "second", "third"]
    assert all(set(record) == RECORD_KEYS for record in records)
    assert all(record["num_output_tokens"] == len(record["token_ids"]) for record in records)
    unordered = read_jsonl(folder / "completions_rank_0.jsonl")
    assert tokens(unordered) == tokens(records)
    check_schema(folder)
    # Between two parts another process may have the core: what is missing in one run only is that.
    in_runs_s = [unexplained_s(folder), unexplained_s(repeated.folder)]
    for of_rank_s in zip(*in_runs_s, strict=True):
        assert min(of_rank_s) <= 0.1, in_runs_s


def check_schema(folder: Path) -> None:
    """Every line and document is as mpipipe/logs/FILES.md says."""
    names = [path.name for path in folder.iterdir() if schema_of(path.name) is not None]
    assert len(names) == 12
    for name in names:
        path = folder / name
        lines = [json.loads(path.read_text())] if path.suffix == ".json" else read_jsonl(path)
        assert [fault for line in lines for fault in check_line(name, line)] == []


def unexplained_s(folder: Path) -> list[float]:
    """Of each rank the seconds of which `mpipipe logs summary` does not know where they went.

    Beyond a hundredth of them all.
    """
    files = RunFiles(folder)
    found = summarise(read_facts(files), files.document("metrics.json"))
    assert files.notes() == []
    assert [rank.num_steps_kept for rank in found.ranks] == [rank.num_steps for rank in found.ranks]
    for rank in found.ranks:
        assert rank.seconds["compute"] > 0
        assert rank.seconds["load"] > 0
    return [rank.seconds["unexplained"] - 0.01 * rank.wall_s for rank in found.ranks]


@pytest.fixture(scope="module")
def repeated(on_two_ranks: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that the first one's manifest describes, with a profile and log-probabilities."""
    folder = tmp_path_factory.mktemp("repeated")
    again = folder / "again.json"
    again.write_text(json.dumps(on_two_ranks.json("manifest.json")["config"]))
    words = ("profile.tool=torch", "profile.steps=[2,4]", "generation.num_logprobs=3")
    outcome = run(2, again, folder / "run", *words, warm=False)
    assert outcome.exit_code == 0, outcome.stderr
    return outcome


def test_the_manifest_is_enough_to_repeat_the_run(on_two_ranks: Outcome, repeated: Outcome) -> None:
    assert tokens(repeated.completions()) == tokens(on_two_ranks.completions())


@pytest.mark.parametrize(("num_ranks", "which"), [(1, "tiny_alone"), (2, "on_two_ranks")])
def test_the_manifest_tells_what_ran_and_where(
    num_ranks: int, which: str, request: pytest.FixtureRequest
) -> None:
    outcome: Outcome = request.getfixturevalue(which)
    manifest = outcome.json("manifest.json")
    assert Path(manifest["config"]["model"]["path"]).is_absolute()
    assert manifest["config"]["output"]["dir"] == str(outcome.folder)
    assert len(manifest["plan"]["stages"]) == len(manifest["hosts"]) == num_ranks
    _check_surroundings(outcome, num_ranks)


def _check_surroundings(outcome: Outcome, num_ranks: int) -> None:
    """What a run of this machine, started by a test, tells of it."""
    manifest = outcome.json("manifest.json")
    assert manifest["schema"] == 1
    assert "run" in manifest["argv"]
    (node,) = manifest["nodes"]
    assert node["host"] == manifest["hosts"][0]["host"]
    assert node["cpu_model"]
    assert node["kernel"] == os.uname().release
    assert node["memory_bytes"] >= manifest["hosts"][0]["memory_available_bytes"]
    launch = manifest["launch"]
    assert (launch["num_nodes"], launch["num_ranks"]) == (1, num_ranks)
    assert launch["launcher"] == manifest["hosts"][0]["launcher"]
    assert manifest["environment"]["OMP_NUM_THREADS"] == "1"
    assert not {"PATH", "HOME"} & manifest["environment"].keys()
    assert "node.memory" in {finding["check"] for finding in manifest["doctor"]}
    (attempt,) = manifest["attempts"]
    assert attempt["attempt"] == 1
    written_s = (outcome.folder / "manifest.json").stat().st_mtime
    assert 0 <= written_s - attempt["unix_s"] < LIMIT_S


def _check_boot(folder: Path, rank: dict[str, Any]) -> None:
    """The parts of a rank's boot, in its log and in the metrics, are its boot's wall clock."""
    events = read_jsonl(folder / f"rank_{rank['rank']}.log")
    logged = [event for event in events if event["event"] == "boot"]
    boot = rank["boot"]
    assert [event["name"] for event in logged] == [part["name"] for part in boot]
    for before, after in itertools.pairwise(logged):
        assert after["start_s"] == pytest.approx(before["end_s"], abs=2e-6)
    names = {part["name"] for part in boot}
    assert {"process", "imports", "mpi", "build", "read weights", "wait"} <= names
    assert rank["rank"] != 0 or "tokenizer" in names  # elsewhere it is nothing, or a moment
    # From the process's start, as the kernel tells it, until it has said that it is ready.
    wall_s = logged[-1]["end_s"] - boot[0]["start_s"]
    assert sum(part["seconds"] for part in boot) == pytest.approx(wall_s, abs=1e-4)
    assert _ready_s(folder, rank["rank"]) >= -1e-5
    (read,) = (part for part in boot if part["name"] == "read weights")
    assert read["bytes"] == rank["loaded_bytes"] > 0
    own_s = sum(part["seconds"] for part in boot if part["name"] != "wait")
    assert 0 < rank["load_s"] < own_s


def _ready_s(folder: Path, rank: int) -> float:
    """How long after the end of its boot a rank has said that it is ready."""
    events = read_jsonl(folder / f"rank_{rank}.log")
    (ready,) = (event for event in events if event["event"] == "ready")
    ended_s = max(event["end_s"] for event in events if event["event"] == "boot")
    return float(ready["t_s"] - ended_s)


def test_the_timeline_keeps_the_rules_of_its_format(on_two_ranks: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    words = ["logs", "timeline", str(on_two_ranks.folder), "-o", str(path)]
    outcome = execute(mpipipe(0, *words), on_two_ranks.folder)
    assert outcome.exit_code == 0, outcome.stderr
    document = json.loads(path.read_text())
    assert faults(document) == []
    arrows = [event for event in document["traceEvents"] if event["ph"] in "sf"]
    kinds = {(event["ph"], event["name"], event["pid"]) for event in arrows}
    assert {("s", "DecodeScheduled", 0), ("f", "DecodeScheduled", 1)} <= kinds
    assert {("s", "StepTimes", 1), ("f", "StepTimes", 0)} <= kinds
    sent_us = {event["id"]: event["ts"] for event in arrows if event["ph"] == "s"}
    came_us = {event["id"]: event["ts"] for event in arrows if event["ph"] == "f"}
    # On one clock: a message does not come before it was sent, but for the clocks' error.
    assert min(came_us[number] - sent_us[number] for number in sent_us) > -1000


PARTS = ("compute_s", "wait_s", "transfer_s", "send_s", "idle_s", "overhead_s")


def test_the_metrics_and_the_lines_about_the_run_add_up(
    on_two_ranks: Outcome, repeated: Outcome
) -> None:
    outcome, folder = on_two_ranks, on_two_ranks.folder
    metrics = outcome.json("metrics.json")
    assert metrics["requests"]["num_completed"] == 3
    assert (metrics["schema"], metrics["state"], metrics["attempt"]) == (1, "done", 1)
    assert metrics["run"] == outcome.json("manifest.json")["run"]
    (attempt,) = metrics["attempts"]
    assert attempt["wall_s"] == metrics["total"]["wall_s"] == metrics["phases"]["wall_s"]
    assert attempt["num_output_tokens"] == metrics["requests"]["num_output_tokens"]
    assert (
        min(metrics["time"][f"{name}_s"] for name in ("preprocessing", "io_read", "io_write")) > 0
    )
    assert "slowest boot  rank " in outcome.stdout
    head_s = metrics["ranks"][0]["stage"]["overall"]["wall_s"]
    assert head_s <= metrics["phases"]["generate_s"], "its stage serves within the phase"
    for rank in metrics["ranks"]:
        _check_boot(folder, rank)
        # At once: 0.3 ms later, if no other process has the core, as may be in one of the runs.
        runs = (folder, repeated.folder)
        assert min(_ready_s(each, rank["rank"]) for each in runs) < 0.5
        stage = rank["stage"]
        overall = stage["overall"]
        assert sum(overall[name] for name in PARTS) == pytest.approx(overall["wall_s"], abs=1e-6)
        check_wall_clock(folder, rank["rank"], overall["wall_s"])
        _check_steps(folder, rank["rank"], stage)
        _check_samples(folder, rank["rank"], stage, outcome)
    first, last = (rank["stage"] for rank in metrics["ranks"])
    assert (first["bytes_out"], last["bytes_out"]) == (last["bytes_in"], first["bytes_in"])
    _check_requests(folder, outcome)
    clocks = read_jsonl(folder / "clock.jsonl")
    assert {(line["of_rank"], line["offset_s"], line["error_s"]) for line in clocks} == {
        (0, 0.0, 0.0), (1, 0.0, 0.0),
    }, "ranks of one host read one clock"  # fmt: skip
    assert len(clocks) == 4, "at the start and at the end"


def _identities(folder: Path, lines: list[dict[str, Any]], rank: int) -> None:
    run_id = json.loads((folder / "manifest.json").read_text())["run"]
    names = ("run", "attempt", "job", "replica", "rank", "stage")
    assert {tuple(line[name] for name in names) for line in lines} == {
        (run_id, 1, None, 0, rank, rank)
    }


def _check_steps(folder: Path, rank: int, stage: dict[str, Any]) -> None:
    """The lines of a rank's steps, against the sums of its stage."""
    steps = read_jsonl(folder / f"steps_rank_{rank}.jsonl")
    _identities(folder, steps, rank)
    assert [line["step"] for line in steps] == list(range(stage["num_steps"]))
    assert {line["phase"] for line in steps} <= {"prefill", "decode", "mixed", "verify"}
    for line in steps:
        parts_s = sum(line[name] for name in PARTS)
        assert parts_s == pytest.approx(line["t_s"] - line["start_s"], abs=1e-8)
        assert line["num_rows"] <= line["num_tokens"]
    for name in ("bytes_out", "num_tokens"):
        assert sum(line[name] for line in steps) == stage[name]
    for name in ("compute_s", "transfer_s", "send_s"):
        total_s = sum(line[name] for line in steps)
        assert total_s == pytest.approx(stage["overall"][name], abs=1e-6)
    assert all(later["start_s"] == earlier["t_s"] for earlier, later in itertools.pairwise(steps))
    # They begin with the call, before the rank says so, not with what came first to be computed.
    events = read_jsonl(folder / f"rank_{rank}.log")
    (generating,) = (event for event in events if event["event"] == "generating")
    assert steps[0]["start_s"] <= generating["t_s"] + 1e-6


def _check_samples(folder: Path, rank: int, stage: dict[str, Any], outcome: Outcome) -> None:
    """The time series of a rank: growing counters, up to what the run did."""
    samples = read_jsonl(folder / f"samples_rank_{rank}.jsonl")
    _identities(folder, samples, rank)
    assert len(samples) >= 2
    for name in ("t_s", "num_steps", "io_write_bytes", "net_rx_bytes"):
        values = [line[name] for line in samples]
        assert values == sorted(values), name
    last = samples[-1]
    assert last["num_steps"] == stage["num_steps"]
    assert last["rss_bytes"] > 1 << 20
    assert any(line["cpu_percent"] for line in samples)  # the last may cover a moment only
    assert last["gpu"] is None
    counts = ("num_output_tokens", "num_running", "num_waiting", "kv_pages_used", "num_kv_pages")
    num_tokens = sum(record["num_output_tokens"] for record in outcome.completions())
    told = (num_tokens, 0, 0, 0, 64) if rank == 0 else (None,) * 5
    assert tuple(last[name] for name in counts) == told


def _check_requests(folder: Path, outcome: Outcome) -> None:
    """The line of each request, against its completion."""
    requests = read_jsonl(folder / "requests.jsonl")
    _identities(folder, requests, 0)
    completions = {record["id"]: record for record in outcome.completions()}
    assert {line["id"] for line in requests} == set(completions)
    gaps_s: list[float] = []
    for line in requests:
        completion = completions[line["id"]]
        for name in ("num_prompt_tokens", "num_output_tokens", "finish_reason"):
            assert line[name] == completion[name]
        for name in ("queue_s", "ttft_s", "latency_s"):
            assert line[name] == pytest.approx(completion[name], abs=1e-5)
        times_s = line["token_s"]
        assert len(times_s) == line["num_output_tokens"]
        assert line["arrived_s"] <= line["admitted_s"] <= line["first_token_s"] == times_s[0]
        assert times_s[-1] <= line["finished_s"] == line["t_s"]
        gaps_s += [later - earlier for earlier, later in itertools.pairwise(times_s)]
    p50_s = sorted(gaps_s)[len(gaps_s) // 2 - 1 + len(gaps_s) % 2]
    assert outcome.json("metrics.json")["itl_p50_s"] == pytest.approx(p50_s, rel=0.0051)


def test_logs_and_profiles_are_json_of_their_rank_and_log_probabilities_reach_the_records(
    repeated: Outcome,
) -> None:
    outcome = repeated
    record = outcome.completions()[0]
    assert len(record["logprobs"]) == record["num_output_tokens"]
    first = record["logprobs"][0]
    assert first["token_id"] == record["token_ids"][0]
    assert len(first["top"]) == 3
    assert first["logprob"] == first["top"][0]["logprob"] <= 0
    manifest = outcome.json("manifest.json")
    for rank in (0, 1):
        profile = outcome.json(f"torch_rank_{rank}.json")["traceEvents"]
        names = {event["name"] for event in profile if event.get("ph") == "X"}
        steps = {int(name.split()[2]) for name in names if " step " in name}
        assert steps == {2, 3, 4}
        kind = "send hidden to rank 1" if rank == 0 else "wait: receive hidden from rank 0"
        assert kind in names
        assert any(name.startswith("aten::") for name in names), "what the steps compute"
        events = read_jsonl(outcome.folder / f"rank_{rank}.log")
        assert {event["rank"] for event in events} == {event["stage"] for event in events} == {rank}
        assert {(event["run"], event["attempt"], event["job"]) for event in events} == {
            (manifest["run"], 1, None)
        }
        assert {"handshake", "ready"} <= {event["event"] for event in events}
        (ready,) = (event for event in events if event["event"] == "ready")
        assert (ready["form"], ready["num_graphs"], ready["graph_unsupported_reason"]) == (
            "packed",
            0,
            "",
        )
        assert ready["form_reason"]


@pytest.fixture(scope="module")
def sampled_job(many_prompts: Path) -> list[str]:
    return [f"prompts.path={many_prompts}", "generation.max_new_tokens=24", *SAMPLED]


@pytest.fixture(scope="module")
def sampled_alone(
    sampled_job: list[str], tiny_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    outcome = run(0, tiny_config, tmp_path_factory.mktemp("plain") / "run", *sampled_job)
    assert outcome.exit_code == 0, outcome.stderr
    return outcome


@pytest.mark.parametrize(
    ("num_ranks", "words"),
    [
        (3, ["memory.num_kv_pages=14", "memory.page_size_tokens=8"]),
        (
            2,
            [
                "pipeline.num_slots=4",
                "pipeline.max_sequences_per_slot=3",
                "pipeline.max_tokens_per_step=8",
            ],
        ),
        (
            2,
            [
                "pipeline.num_slots=1",
                "memory.kv_cache=contiguous",
                "pipeline.attention=reference",
            ],
        ),
    ],
    ids=["preemption", "four-slots-small-chunks", "one-slot-oracles"],
)
def test_sampled_tokens_do_not_depend_on_how_they_are_computed(
    num_ranks: int,
    words: list[str],
    tiny_config: Path,
    sampled_job: list[str],
    sampled_alone: Outcome,
    tmp_path: Path,
) -> None:
    other = run(num_ranks, tiny_config, tmp_path / "other", *sampled_job, *words)
    assert other.exit_code == 0, other.stderr
    assert tokens(other.completions()) == tokens(sampled_alone.completions())
    preempted = other.json("metrics.json")["num_preemptions"]
    assert (preempted > 0) == any("num_kv_pages" in word for word in words)


def test_the_library_example_runs_on_two_ranks(tiny_model: Path) -> None:
    example = ROOT / "launch" / "library_example.py"
    command = [*mpiexec(2), *warm_python(), str(example), str(tiny_model)]
    outcome = execute(command, ROOT)
    assert outcome.exit_code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert sum(line.startswith("sync") for line in lines) == 3
    assert sum(line.startswith("async") for line in lines) == 2


def test_the_older_configuration_with_its_deepspeed_file_runs(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = {
        "model_path": str(tiny_model),
        "prompts": ["a first prompt", "a second one"],
        "max_new_tokens": 4,
        "do_sample": False,
        "local_files_only": True,
    }
    path = tmp_path / "exp_config.json"
    path.write_text(json.dumps(config))
    (tmp_path / "ds_config.json").write_text(json.dumps({"pipeline": {"stages": 2}}))
    outcome = run(2, path, tmp_path / "two")
    assert outcome.exit_code == 0, outcome.stderr
    assert [record["num_output_tokens"] for record in outcome.completions()] == [4, 4]
    contradiction = run(1, path, tmp_path / "one")
    assert contradiction.exit_code == 2
    assert "ds_config.json expects 2 pipeline stages" in contradiction.stderr


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_step_that_fails_on_one_rank_ends_all_ranks_with_its_error(
    failing_rank: int, tiny_config: Path, tmp_path: Path
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(
        "import sys\n"
        "from mpi4py import MPI\n"
        "from mpipipe.errors import NumericsError\n"
        "from mpipipe.stage.engine import StageEngine\n"
        "def fail(self, step, hidden):\n"
        "    raise NumericsError('the logits are no numbers')\n"
        f"if MPI.COMM_WORLD.rank == {failing_rank}:\n"
        "    StageEngine.prefill = fail\n"
        "from mpipipe.cli.main import main\n"
        "main()\n"
    )
    command = [*mpiexec(2), *warm_python(), str(script), "run", str(tiny_config)]
    outcome = execute([*command, f"output.dir={tmp_path / 'run'}"], tmp_path / "run")
    assert outcome.exit_code != 0
    assert "the logits are no numbers" in outcome.stderr
    assert f"rank {failing_rank}" in outcome.stderr
    assert "Traceback" not in outcome.stderr
