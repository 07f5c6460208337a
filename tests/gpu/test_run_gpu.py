"""`mpipipe run` on one GPU and on two: every way to compute a step gives the model's tokens.

    python -m pytest tests/gpu -m gpu -n 6

Each run is a process of its own under a hard limit. Greedy tokens are compared with transformers'
up to rounding ties (`runs.check_greedy`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mpipipe.errors import EXIT_REQUEUE
from mpipipe.models.attention.select import available_backends
from tests.e2e.conftest import Outcome
from tests.e2e.test_stop import stop_when
from tests.gpu.runs import RunModel, check_greedy, check_logprobs, gpu_run, launch, save_run_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TEXTS = [
    "a word",
    "many words " * 4,
    "x",
    "some more words " * 6,
    "The end is near.",
    "1 2 3 4 5 6",
]
GREEDY: list[dict[str, Any]] = [
    {"id": f"greedy-{n}", "prompt": text, "max_new_tokens": 24 + 5 * n}
    for n, text in enumerate(TEXTS)
]
SAMPLED: list[dict[str, Any]] = [
    {"id": "drawn", "prompt": TEXTS[1], "temperature": 1.0, "seed": 5},
    {"id": "filtered", "prompt": TEXTS[3], "temperature": 1.3, "top_k": 40, "top_p": 0.9},
    {"id": "min-p", "prompt": TEXTS[0], "temperature": 1.1, "min_p": 0.02},
    {"id": "penalised", "prompt": TEXTS[4], "repetition_penalty": 1.5},
    {"id": "both", "prompt": TEXTS[5], "temperature": 0.9, "repetition_penalty": 0.7},
    {"id": "counted", "prompt": TEXTS[1], "frequency_penalty": 0.8, "presence_penalty": 0.4},
]
LINES = [*GREEDY, *SAMPLED]
JOB = ["generation.max_new_tokens=40", "generation.ignore_eos=true", "generation.num_logprobs=2"]
SHARED = "pipeline.share_gpus=true"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunModel]:
    @cache
    def make(name: str) -> RunModel:
        return save_run_model(name, tmp_path_factory.mktemp(name))

    return make


def records_of(outcome: Outcome) -> dict[str, dict[str, Any]]:
    assert outcome.exit_code == 0, outcome.stderr[-3000:]
    return {record["id"]: record for record in outcome.completions()}


def plan_of(outcome: Outcome) -> dict[str, Any]:
    plan: dict[str, Any] = outcome.json("manifest.json")["plan"]
    return plan


def check_run(model: RunModel, outcome: Outcome) -> None:
    """All of `LINES` are complete, and right where there is something to compare with."""
    records = records_of(outcome)
    assert list(records) == [line["id"] for line in LINES]
    for line in LINES:
        record = records[line["id"]]
        assert record["finish_reason"] == "length"
        assert record["num_output_tokens"] == line.get("max_new_tokens", 40)
        check_logprobs(model, line["prompt"], record)
        if line in GREEDY:
            check_greedy(model, line["prompt"], record)


def check_accounts(outcome: Outcome, num_ranks: int) -> None:
    """Every rank's parts add up to the wall clock within 1 % (and 20 ms of messages)."""
    metrics = outcome.json("metrics.json")
    assert len(metrics["ranks"]) == num_ranks
    generate_s = metrics["phases"]["generate_s"]
    for rank in metrics["ranks"]:
        overall = rank["stage"]["overall"]
        names = ("compute_s", "wait_s", "transfer_s", "send_s", "idle_s", "overhead_s")
        booked_s = sum(overall[name] for name in names)
        assert abs(booked_s - generate_s) <= 0.01 * generate_s + 0.02
        assert rank["cpu_us_per_step"] > 0
        assert rank["gpu_peak_bytes"] > 0


# ---- one GPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-head_dim-100", "opt", "qwen3"])
def test_graphs_give_the_models_tokens(
    name: str, saved: Callable[[str], RunModel], tmp_path: Path
) -> None:
    model = saved(name)
    outcome = gpu_run(model, LINES, tmp_path / "run", 0, *JOB)
    check_run(model, outcome)
    check_accounts(outcome, 1)
    plan = plan_of(outcome)
    assert (plan["cuda_graphs"], plan["lookahead"], plan["dtype"]) == (True, 1, "bfloat16")


@pytest.mark.parametrize(
    "words",
    [
        ["memory.cuda_graphs=false"],
        ["pipeline.attention=sdpa"],
        ["pipeline.attention=reference"],
        ["pipeline.attention=flashinfer"],
        ["pipeline.attention=varlen"],
        ["pipeline.prefill=mixed", "pipeline.max_tokens_per_step=32"],
        ["pipeline.max_sequences_per_slot=3", "pipeline.num_slots=2"],
    ],
    ids=lambda words: words[0],
)
def test_every_way_to_compute_gives_the_models_tokens(
    words: list[str], saved: Callable[[str], RunModel], tmp_path: Path
) -> None:
    backend = words[0].removeprefix("pipeline.attention=")
    if backend != words[0] and backend not in available_backends():
        pytest.skip(f"{backend} is not installed here")
    model = saved("llama")
    check_run(model, gpu_run(model, LINES, tmp_path / "run", 0, *JOB, *words))


def test_the_same_seed_gives_the_same_completions(
    saved: Callable[[str], RunModel], tmp_path: Path
) -> None:
    model = saved("llama")
    first, second = (
        records_of(gpu_run(model, LINES, tmp_path / name, 0, *JOB)) for name in ("one", "two")
    )
    for name, record in first.items():
        assert second[name]["token_ids"] == record["token_ids"]
        assert second[name]["logprobs"] == record["logprobs"]
    third = records_of(gpu_run(model, LINES, tmp_path / "three", 0, *JOB, "generation.seed=9"))
    changed = [name for name in first if third[name]["token_ids"] != first[name]["token_ids"]]
    assert {"filtered", "min-p", "both"} <= set(changed)
    assert not any(name.startswith("greedy") for name in changed)


def test_preemption_and_stop_strings_with_steps_in_flight(
    saved: Callable[[str], RunModel], tmp_path: Path
) -> None:
    model = saved("llama")
    free = records_of(gpu_run(model, GREEDY, tmp_path / "free", 0, *JOB))
    stops = {}
    for name, record in free.items():
        text = record["text"]
        stops[name] = text[len(text) // 2 :][:2]
    lines = [{**line, "stop": [stops[line["id"]]]} for line in GREEDY]
    few = ["memory.num_kv_pages=10", "memory.page_size_tokens=16"]
    outcome = gpu_run(model, GREEDY, tmp_path / "few", 0, *JOB, *few)
    assert outcome.json("metrics.json")["num_preemptions"] > 0
    for line in GREEDY:
        check_greedy(model, line["prompt"], records_of(outcome)[line["id"]])
    records = records_of(gpu_run(model, lines, tmp_path / "stopped", 0, *JOB, *few))
    for line in lines:
        record, stop = records[line["id"]], stops[line["id"]]
        check_greedy(model, line["prompt"], record)
        assert stop not in record["text"]
        # Another batch may round a tie the other way, and then the stop string need not come.
        same = free[line["id"]]["token_ids"][: len(record["token_ids"])] == record["token_ids"]
        if same:
            assert record["finish_reason"] == "stop"
            assert free[line["id"]]["text"].startswith(record["text"] + stop)
    assert any(record["finish_reason"] == "stop" for record in records.values())


# ---- several ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_ranks", "words"),
    [
        (2, []),
        (2, ["memory.cuda_graphs=false", "pipeline.prefill=mixed"]),
        (2, [SHARED]),
        (3, [SHARED, "pipeline.max_sequences_per_slot=4"]),
        (2, [SHARED, "pipeline.attention=sdpa"]),
    ],
    ids=["nccl", "nccl-eager-mixed", "shared-2", "shared-3", "shared-sdpa"],
)
def test_ranks_together_give_the_models_tokens(
    num_ranks: int, words: list[str], saved: Callable[[str], RunModel], tmp_path: Path
) -> None:
    shares = SHARED in words
    if not shares and torch.cuda.device_count() < num_ranks:
        pytest.skip(f"NCCL needs {num_ranks} GPUs")
    model = saved("llama")
    environment = {"CUDA_VISIBLE_DEVICES": _one_gpu()} if shares else {}
    outcome = gpu_run(model, LINES, tmp_path / "run", num_ranks, *JOB, *words, **environment)
    check_run(model, outcome)
    check_accounts(outcome, num_ranks)
    assert plan_of(outcome)["transport"] == ("mpi" if shares else "nccl")


@pytest.mark.parametrize(
    ("num_ranks", "words", "transport"),
    [
        (2, [SHARED], "loopback"),
        (4, [SHARED], "mpi"),
        (2, [], "loopback"),
        (4, [], "nccl"),
    ],
    ids=str,
)
def test_two_replicas_give_the_models_tokens(
    num_ranks: int,
    words: list[str],
    transport: str,
    saved: Callable[[str], RunModel],
    tmp_path: Path,
) -> None:
    if not words and torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    model = saved("llama")
    environment = {"CUDA_VISIBLE_DEVICES": _one_gpu()} if words else {}
    job = [*JOB, *words, "pipeline.replicas=2"]
    outcome = gpu_run(model, LINES, tmp_path / "run", num_ranks, *job, **environment)
    check_run(model, outcome)
    check_accounts(outcome, num_ranks)
    assert (plan_of(outcome)["transport"], plan_of(outcome)["num_replicas"]) == (transport, 2)
    assert all(r["num_completed"] > 0 for r in outcome.json("metrics.json")["replicas"])


LANES = "pipeline.tensor_parallel=2"


@pytest.mark.parametrize(
    ("name", "num_ranks", "words"),
    [
        ("llama", 2, []),
        ("llama-tied", 2, []),
        ("qwen2", 2, []),
        ("qwen3", 2, ["memory.cuda_graphs=false", "pipeline.prefill=mixed"]),
        ("opt", 2, []),
        ("gemma2", 2, []),
        ("llama", 2, ["pipeline.max_sequences_per_slot=3", "pipeline.num_slots=2"]),
        ("llama", 4, []),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_lanes_of_a_stage_together_give_the_models_tokens(
    name: str, num_ranks: int, words: list[str], saved: Callable[[str], RunModel], tmp_path: Path
) -> None:
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    model = saved(name)
    outcome = gpu_run(model, LINES, tmp_path / "run", num_ranks, *JOB, LANES, *words)
    check_run(model, outcome)
    check_accounts(outcome, num_ranks)
    plan = plan_of(outcome)
    assert plan["transport"] == "nccl"
    assert len(plan["stages"]) == num_ranks // 2
    alone = [rank["weight_bytes"] for rank in outcome.json("metrics.json")["ranks"]]
    # The lanes of a stage hold equally much, but for biases that one lane adds.
    assert alone[0] == pytest.approx(alone[1], rel=0.01)


def _one_gpu() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


# ---- errors --------------------------------------------------------------------------------------


def test_without_a_visible_gpu_the_run_ends_before_it_loads(
    saved: Callable[[str], RunModel], tmp_path: Path
) -> None:
    outcome = gpu_run(saved("llama"), GREEDY, tmp_path / "run", 0, CUDA_VISIBLE_DEVICES="")
    assert outcome.exit_code == 5, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert 'pipeline.device = "cuda", but rank 0' in outcome.stderr
    log = (outcome.folder / "rank_0.log").read_text() if outcome.folder.exists() else ""
    assert '"ready"' not in log


def test_too_little_memory_for_a_step_is_told_before_the_first_prompt(
    saved: Callable[[str], RunModel], tmp_path: Path
) -> None:
    script = tmp_path / "little_memory.py"
    script.write_text(
        "import torch\n"
        "from mpipipe.runtime import stage_worker\n"
        "open_engine = stage_worker.open_engine\n"
        "def open_small(*args, **kwargs):\n"
        "    engine = open_engine(*args, **kwargs)\n"
        "    torch.cuda.empty_cache()\n"
        "    total = torch.cuda.get_device_properties(0).total_memory\n"
        "    allowed = torch.cuda.memory_reserved() + (8 << 20)\n"
        "    torch.cuda.set_per_process_memory_fraction(allowed / total)\n"
        "    return engine\n"
        "stage_worker.open_engine = open_small\n"
        "from mpipipe.cli.main import main\n"
        "main()\n"
    )
    model = saved("llama")
    prompts, config = tmp_path / "prompts.jsonl", tmp_path / "run.toml"
    prompts.write_text(json.dumps(GREEDY[0]) + "\n")
    config.write_text(f'model.path = "{model.folder}"\nprompts.path = "{prompts}"\n')
    words = [f"output.dir={tmp_path / 'out'}", "pipeline.device=cuda"]
    large = "pipeline.max_tokens_per_step=16384"
    outcome = launch([str(script), "run", str(config), *words, large], tmp_path / "out", 0)
    assert outcome.exit_code == 5, outcome.stderr
    assert "too little memory for a step of 16384 tokens" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_run_over_nccl_that_is_told_to_stop_goes_on_where_it_was(
    saved: Callable[[str], RunModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A cold cache: the compiler takes the handler of SIGUSR1 for itself.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cold"))
    model, folder, num_prompts = saved("llama"), tmp_path / "out", 3000
    prompts, config = tmp_path / "many.jsonl", tmp_path / "run.toml"
    texts = {f"p{number}": f"prompt number {number}" for number in range(num_prompts)}
    lines = [{"id": name, "prompt": text} for name, text in texts.items()]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.write_text(f'model.path = "{model.folder}"\nprompts.path = "{prompts}"\n')
    # Few at a time: with all at once everything is done within two seconds.
    job = ["generation.max_new_tokens=60", "pipeline.max_sequences_per_slot=8"]
    job += ["pipeline.device=cuda", "generation.ignore_eos=true"]
    written = folder / "completions_rank_0.jsonl"

    def has_some() -> bool:
        return written.exists() and written.stat().st_size > 0

    def head(_: int) -> int:
        return int(json.loads((folder / "manifest.json").read_text())["hosts"][0]["pid"])

    stopped = stop_when(has_some, head, config, folder, *job)
    assert stopped.exit_code == EXIT_REQUEUE, stopped.stderr
    early = {record["id"]: record["text"] for record in stopped.completions()}
    assert 0 < len(early) < num_prompts
    arguments = ["-m", "mpipipe", "run", str(config), f"output.dir={folder}", *job]
    resumed = launch([*arguments, "output.resume=true"], folder, 2)
    assert resumed.exit_code == 0, resumed.stderr
    records = resumed.completions()
    assert [record["id"] for record in records] == list(texts)
    assert early.items() <= {record["id"]: record["text"] for record in records}.items()
    for record in (records[0], records[-1]):
        check_greedy(model, texts[record["id"]], record)
