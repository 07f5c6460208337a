"""A real small experiment, as a user runs and reports it: what the runs write is what is read.

One experiment for its launches, its records, going on with it, the best batch, and its page.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mpipipe.config.load import load_config
from mpipipe.errors import EXIT_CONFIG, EXIT_OK, EXIT_PROMPTS
from mpipipe.experiments.folder import ExperimentFolder
from tests.e2e.conftest import TEST_LIMIT_S, Outcome, execute, tiny_model
from tests.page.browser import visit

__all__ = ["tiny_model"]

pytestmark = pytest.mark.timeout(TEST_LIMIT_S)  # a launch has a limit of its own

MPIPIPE = [sys.executable, "-m", "mpipipe"]
MEASURED = {  # each of these comes from another part of a run's files
    "wall_clock_s", "throughput_tokens_per_s", "cpu_percent", "io_s", "communication_s",
    "preprocessing_s", "generate_s", "bubble_percent", "ttft_p50_s", "itl_p50_ms", "itl_p95_ms",
    "memory_gib",
}  # fmt: skip


CASES = ("batch_2", "batch_8")
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 16, 100


def bench(model: Path, folder: Path, *words: str) -> Outcome:
    """The batch experiment on two stages: a launch to warm up and two that are measured."""
    options = [
        "--stages=2", "--batch=2,8", "--repeat=1", f"--prompts={NUM_PROMPTS}",
        f"--prompt-tokens={PROMPT_TOKENS}", f"--out={folder}",
    ]  # fmt: skip
    settings = [
        "model.dtype=float32", f"generation.max_new_tokens={NEW_TOKENS}",
        "log.sample_interval_s=0.2", "pipeline.threads_per_rank=1", "generation.ignore_eos=true",
    ]  # fmt: skip
    command = [*MPIPIPE, "bench", "batch", str(model), *settings, *options, *words]
    return execute(command, folder)


@pytest.fixture(scope="session")
def begun(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The experiment, all of it."""
    outcome = bench(tiny_model, tmp_path_factory.mktemp("measured") / "batch")
    assert outcome.exit_code == EXIT_OK, outcome.stdout + outcome.stderr
    return outcome


@pytest.fixture(scope="session")
def measured(begun: Outcome) -> Path:
    """Its folder, with the report."""
    reported = execute([*MPIPIPE, "report", str(begun.folder)], begun.folder)
    assert reported.exit_code == EXIT_OK, reported.stdout + reported.stderr
    return begun.folder


def test_a_batch_experiment_from_launches_to_the_best_configuration(
    begun: Outcome, measured: Path, tiny_model: Path
) -> None:
    assert "2 of 2 launches are missing" in begun.stdout
    assert "warm-up, not measured" in begun.stdout
    records = ExperimentFolder(measured).records()
    assert [record.order for record in records] == [0, 1]
    assert {record.case.name for record in records} == set(CASES)
    for record in records:
        assert (record.outcome, record.num_places, len(record.hosts)) == (
            "ok",
            record.case.batch,
            2,
        )
        assert record.metrics is not None
        assert record.metrics["requests"]["num_output_tokens"] == NUM_PROMPTS * NEW_TOKENS
        assert record.metrics["requests"]["num_prompt_tokens"] == NUM_PROMPTS * PROMPT_TOKENS
        assert record.ceiling is not None
        assert record.command[-1] == "output.resume=false"
    # Greedy in float32: neither the batch nor chance decides the tokens.
    assert len({record.tokens_hash for record in records}) == 1

    best = load_config(measured / "best.toml").config
    assert best.pipeline.num_stages == best.pipeline.num_slots == 2
    assert best.pipeline.max_sequences_per_slot in {1, 4}
    assert (best.model.path, best.generation.max_new_tokens) == (str(tiny_model), NEW_TOKENS)


def test_an_experiment_is_gone_on_with_and_not_mixed_with_another(
    measured: Path, tiny_model: Path
) -> None:
    folder, records = measured, measured / "records"
    before = {path.name: path.read_bytes() for path in records.iterdir()}
    again = bench(tiny_model, folder, "--json")
    assert again.exit_code == EXIT_OK, again.stderr
    assert "0 of 2 launches are missing" in again.stderr
    verdict = json.loads(again.stdout)
    assert [case["case"]["name"] for case in verdict["cases"]] == list(CASES)
    assert verdict["largest_safe_batch"] == 8
    assert {path.name: path.read_bytes() for path in records.iterdir()} == before

    changed = bench(tiny_model, folder, "generation.max_new_tokens=9")
    assert changed.exit_code == EXIT_CONFIG
    assert f"generation.max_new_tokens: {NEW_TOKENS} → 9" in changed.stderr

    (records / "batch_2_r1.json").unlink()
    missing = bench(tiny_model, folder, "--table")
    (records / "batch_2_r1.json").write_bytes(before["batch_2_r1.json"])
    assert missing.exit_code == EXIT_PROMPTS
    assert "1 of 2 launches are missing" in missing.stdout


def test_every_column_of_a_real_experiment_has_a_figure(measured: Path) -> None:
    rows = json.loads((measured / "report.json").read_text())["rows"]
    assert [row["case"] for row in rows] == list(CASES)
    for row in rows:
        found = {key for key, spread in row["figures"].items() if spread is not None}
        assert found >= MEASURED
    records = {record.case.name: record for record in ExperimentFolder(measured).records()}
    for row in rows:
        speed = records[row["case"]].tokens_per_s
        assert row["figures"]["throughput_tokens_per_s"]["median"] == pytest.approx(speed)
        parts = row["stage_parts_s"]
        generate_s = row["figures"]["generate_s"]["median"]
        for stage in parts:  # all of the time is told, but for the files read before
            told_s = sum(seconds for part, seconds in stage.items() if part != "I/O")
            assert told_s == pytest.approx(generate_s, rel=0.15, abs=0.3)
            assert stage["compute"] > 0


def test_the_page_of_a_real_experiment_has_every_plot(measured: Path, tmp_path: Path) -> None:
    seen = visit(measured / "report.html", tmp_path)
    assert (seen.console, seen.requests) == ([], [])
    assert re.findall(r"<svg[^>]*>\s*<title>(.*?)</title>", seen.dom) == [
        "Throughput over batch size",
        "Latency over batch size",
        "Where the time of each stage went",
        "Tokens per second over time",
        "Pipeline occupancy over time",
        "Steps in the pipeline",
    ]


def test_a_run_of_the_experiment_has_its_own_page(measured: Path, tmp_path: Path) -> None:
    run = measured / "runs" / "batch_8_r1"
    reported = execute([*MPIPIPE, "report", str(run), "--out", str(tmp_path)], tmp_path)
    assert reported.exit_code == 0, reported.stdout + reported.stderr
    document: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    assert document["run"] == metrics["run"]
    found = {key for key, value in document["figures"].items() if value is not None}
    assert found >= MEASURED
    text = (tmp_path / "report.md").read_text()
    # A part of less than a millisecond, as tokenising these prompts may be, has no row.
    for words in ("**What held it up:**", "| imports |", "# on 2 ranks"):
        assert words in text
