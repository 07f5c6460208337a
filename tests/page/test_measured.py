"""A real small experiment, reported as a user would: what the runs write is what the page reads."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mpipipe.experiments.folder import ExperimentFolder
from tests.e2e.conftest import execute, tiny_model
from tests.page.browser import visit

__all__ = ["tiny_model"]

MPIPIPE = [sys.executable, "-m", "mpipipe"]
MEASURED = {  # each of these comes from another part of a run's files
    "wall_clock_s", "throughput_tokens_per_s", "cpu_percent", "io_s", "communication_s",
    "preprocessing_s", "generate_s", "bubble_percent", "ttft_p50_s", "itl_p50_ms", "itl_p95_ms",
    "memory_gib",
}  # fmt: skip


@pytest.fixture(scope="session")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batch experiment on two stages: a launch to warm up and two that are measured."""
    folder = tmp_path_factory.mktemp("measured")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"id": "{n}", "prompt": "{n} is"}}\n' for n in range(8)))
    words = [
        "model.dtype=float32", "generation.max_new_tokens=110", "log.sample_interval_s=0.2",
        "pipeline.threads_per_rank=1", "generation.ignore_eos=true",
    ]  # fmt: skip
    options = ["--stages=2", "--batch=2,8", "--repeat=1", f"--out={folder / 'batch'}"]
    command = [*MPIPIPE, "bench", "batch", str(tiny_model), str(prompts), *words, *options]
    done = execute(command, folder)
    assert done.exit_code == 0, done.stdout + done.stderr
    reported = execute([*MPIPIPE, "report", str(folder / "batch")], folder)
    assert reported.exit_code == 0, reported.stdout + reported.stderr
    return folder / "batch"


def test_every_column_of_a_real_experiment_has_a_figure(measured: Path) -> None:
    rows = json.loads((measured / "report.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["batch_2", "batch_8"]
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
            assert told_s == pytest.approx(generate_s, rel=0.15, abs=0.1)
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
