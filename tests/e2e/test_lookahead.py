"""Launch-ahead on real ranks, without a GPU: the completions of a plain run, and honest metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Outcome, check_wall_clock, execute, mpipipe, run

AHEAD = ["pipeline.lookahead=1", "pipeline.device=cpu"]
LINES: list[dict[str, Any]] = [
    {"id": "greedy", "prompt": "many words " * 3},
    {"id": "drawn", "prompt": "some words", "temperature": 1.3, "seed": 5},
    {"id": "filtered", "prompt": "words " * 5, "temperature": 1.5, "top_k": 40, "top_p": 0.9},
    {"id": "min-p", "prompt": "a", "temperature": 1.1, "min_p": 0.02, "max_new_tokens": 31},
    {"id": "penalised", "prompt": "again again", "repetition_penalty": 1.5},
    {"id": "both", "prompt": "x " * 8, "temperature": 0.9, "repetition_penalty": 0.7},
    {"id": "counted", "prompt": "again", "frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"id": "counted-drawn", "prompt": "a word", "temperature": 0.8, "frequency_penalty": -0.6},
    {"id": "one", "prompt": "only one token", "max_new_tokens": 1},
    {"id": "two", "prompt": "only two tokens", "max_new_tokens": 2, "temperature": 1.0},
    {"id": "long", "prompt": "a long prompt " * 6, "max_new_tokens": 24},
    {"id": "too-long", "prompt": "far too long " * 20},
    {"id": "empty", "prompt": ""},
    {"id": "wrong", "prompt": 7},
    {"id": "stopped", "prompt": "many words " * 3, "stop": ["?"]},
]
JOB = ["generation.max_new_tokens=24", "generation.num_logprobs=2", "memory.page_size_tokens=8"]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ahead") / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + "{no json\n")
    return path


@pytest.fixture(scope="module")
def config(tiny_model: Path, prompt_file: Path) -> Path:
    path = prompt_file.with_name("ahead.toml")
    path.write_text(f'model.path = "{tiny_model}"\nprompts.path = "{prompt_file}"\n')
    return path


@pytest.fixture(scope="module")
def plain(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(0, config, tmp_path_factory.mktemp("plain") / "run", *JOB)


def kept(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must not depend on how it was computed: all but times and the last bits."""
    result = []
    for record in records:
        fields = {name: value for name, value in record.items() if not name.endswith("_s")}
        del fields["crc32"]  # of the times, too
        if (logprobs := fields.pop("logprobs", None)) is not None:
            fields["chosen"] = [entry["token_id"] for entry in logprobs]
            fields["logprobs"] = [
                round(value, 3)
                for entry in logprobs
                for value in (entry["logprob"], *(top["logprob"] for top in entry["top"]))
            ]
        result.append(fields)
    return result


def check_same(outcome: Outcome, plain: Outcome) -> None:
    assert outcome.exit_code == plain.exit_code, outcome.stderr
    ours, theirs = kept(outcome.completions()), kept(plain.completions())
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.pop("logprobs", None) == pytest.approx(other.pop("logprobs", None), abs=2e-3)
        assert mine == other


def check_metrics(outcome: Outcome, num_ranks: int) -> None:
    """Every rank has booked all of its time, and nothing else."""
    metrics = outcome.json("metrics.json")
    assert len(metrics["ranks"]) == num_ranks
    head_s = metrics["ranks"][0]["stage"]["overall"]["wall_s"]
    assert head_s <= metrics["phases"]["generate_s"], "its stage serves within the phase"
    for rank in metrics["ranks"]:
        overall = rank["stage"]["overall"]
        names = ("compute_s", "wait_s", "transfer_s", "send_s", "idle_s", "overhead_s")
        booked_s = sum(overall[name] for name in names)
        assert booked_s == pytest.approx(overall["wall_s"], abs=1e-6)
        check_wall_clock(outcome.folder, rank["rank"], booked_s)
        assert rank["cpu_us_per_step"] is None, "on a CPU computing is the host's time"


@pytest.mark.parametrize(
    ("num_ranks", "words"),
    [
        (0, []),
        (
            2,
            [
                "pipeline.prefill=mixed",
                "memory.num_kv_pages=16",
                "memory.kv_host_bytes=16MiB",
                "pipeline.max_sequences_per_slot=6",
            ],
        ),
        (3, ["pipeline.max_sequences_per_slot=2", "pipeline.max_tokens_per_step=16"]),
    ],
    ids=["one-rank", "mixed-moved-pages", "three-ranks"],
)
def test_completions_are_those_of_a_plain_run(
    num_ranks: int, words: list[str], config: Path, plain: Outcome, tmp_path: Path
) -> None:
    outcome = run(num_ranks, config, tmp_path / "run", *JOB, *AHEAD, *words)
    check_same(outcome, plain)
    check_metrics(outcome, max(1, num_ranks))
    plan = outcome.json("manifest.json")["plan"]
    assert plan["lookahead"] == 1
    needs = "DRAW|FILTERS|SEEN|COUNTS"
    assert plan["sampling"] == {"needs": needs, "logprobs": True, "plain": False}
    assert plan["prefill"] == ("mixed" if "pipeline.prefill=mixed" in words else "phases")
    preempted = outcome.json("metrics.json")["num_preemptions"]
    assert (preempted > 0) == any("num_kv_pages" in word for word in words)
    if preempted:  # all of them by pages that went to host memory
        assert outcome.json("metrics.json")["num_saved"] == preempted
        assert plan["num_host_pages"] > 0
        for rank in outcome.json("metrics.json")["ranks"]:
            assert rank["page_moves"]["saved_bytes"] >= rank["page_moves"]["restored_bytes"] > 0


def test_the_prompts_reach_what_they_are_there_for(plain: Outcome) -> None:
    """Else the comparisons above would compare nothing."""
    records = {record["id"]: record for record in plain.completions()}
    assert len(records) == len(LINES) + 1
    failed = {name for name, record in records.items() if record["finish_reason"] == "error"}
    assert {"too-long", "empty", "wrong"} < failed
    assert len(failed) == 4
    assert len(records["two"]["token_ids"]) == 2
    assert len(records["long"]["token_ids"]) == 24


def test_stop_strings_end_a_completion_although_more_tokens_are_in_flight(
    config: Path, plain: Outcome, tmp_path: Path
) -> None:
    text = {r["id"]: r for r in plain.completions()}["greedy"]["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    words = [*JOB, f"generation.stop={json.dumps([stop])}"]
    outcome = run(0, config, tmp_path / "run", *words, *AHEAD)
    assert outcome.exit_code == plain.exit_code, outcome.stderr
    found = {r["id"]: r for r in outcome.completions()}
    assert found["greedy"]["finish_reason"] == "stop"
    for record in plain.completions():
        stopped = found[record["id"]]
        own = record["id"] == "stopped"  # it has a stop string of its own
        if own or stop not in record["text"]:
            assert stopped["text"] == record["text"]
            assert stopped["finish_reason"] == record["finish_reason"]
        else:
            assert stopped["text"] == record["text"][: record["text"].index(stop)]
            assert stopped["finish_reason"] == "stop"
            ids = stopped["token_ids"]
            assert ids == record["token_ids"][: len(ids)]


def test_a_gpu_that_was_asked_for_and_is_not_there_ends_the_run_before_it_loads(
    config: Path, tmp_path: Path
) -> None:
    words = [f"output.dir={tmp_path / 'run'}", "pipeline.device=cuda"]
    command = mpipipe(0, "run", str(config), *words)
    outcome = execute(command, tmp_path / "run", CUDA_VISIBLE_DEVICES="")
    assert outcome.exit_code == 5, outcome.stderr
    assert outcome.stderr.count("error:") == 1
    assert 'pipeline.device = "cuda", but rank 0' in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not outcome.folder.exists()  # nor claims a folder
