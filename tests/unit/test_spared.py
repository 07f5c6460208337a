"""Shared prefixes and drafts are shown alike wherever a run is shown, and only where they apply."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpipipe.cli.main import app
from mpipipe.metrics.drafts import DraftUse
from mpipipe.metrics.spared import SparedWork
from mpipipe.report.make import make_report
from tests.unit.written_run import WrittenRun

COUNTS = {"num_shared_tokens": 65_536, "drafts": {"num_drafted": 200, "num_accepted": 120}}
ACCEPTED = "120 of 200 tokens accepted (60%)"


def written(folder: Path, **counts: object) -> Path:
    """A run with 480 output tokens."""
    run = WrittenRun(folder)
    run.write()
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["requests"]["num_output_tokens"] = 480
    path.write_text(json.dumps({**metrics, **counts}))
    return folder


def shown(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def page(folder: Path) -> str:
    return make_report(folder).files["report.html"].decode()


def test_boot_events_that_come_in_parts_are_summed_in_the_report(tmp_path: Path) -> None:
    WrittenRun(tmp_path).write()
    path = tmp_path / "metrics.json"
    metrics = json.loads(path.read_text())
    parts = [("imports", 1.5), ("mpi", 0.25), ("imports", 2.25)]
    boot = [{"name": name, "seconds": seconds} for name, seconds in parts]
    metrics["ranks"] = [{**rank, "rank": 7, "boot": boot} for rank in metrics["ranks"][:1]]
    path.write_text(json.dumps(metrics))
    told = make_report(tmp_path).files["report.md"].decode()
    assert "| Event | rank 7 (s) |" in told
    assert "| imports | 3.75 |" in told


def test_tokens_per_step_are_those_of_steps_that_gave_any() -> None:
    assert SparedWork(0, DraftUse(200, 120, 90), 480).tokens_per_step == pytest.approx(4 / 3)
    assert SparedWork(num_output_tokens=480).tokens_per_step == 1.0
    assert SparedWork(0, DraftUse(8, 5, 0), 5).tokens_per_step is None
    assert SparedWork(num_output_tokens=480).words() == {}


def test_the_summary_of_logs_shows_them_where_they_apply(tmp_path: Path) -> None:
    told = shown("logs", "summary", written(tmp_path / "with", **COUNTS))
    assert "shared    65,536 prompt tokens not computed\n" in told
    assert f"drafts    {ACCEPTED} · 1.33 tokens a step\n" in told
    spared = json.loads(shown("logs", "summary", tmp_path / "with", "--json"))["spared"]
    assert spared["num_shared_tokens"] == 65_536
    assert spared["tokens_per_step"] == pytest.approx(4 / 3)
    plain = shown("logs", "summary", written(tmp_path / "plain"))
    assert "shared" not in plain
    assert "drafts" not in plain


def test_of_a_stopped_run_no_tokens_a_step_are_told(tmp_path: Path) -> None:
    """Its drafts are those of unfinished prompts, too: 120 accepted, of 60 tokens or of more."""
    assert SparedWork.of_run(
        0, DraftUse(200, 120, 90), num_output_tokens=480, num_unfinished=0
    ) == SparedWork(0, DraftUse(200, 120, 90), 480)
    folder = written(tmp_path / "stopped", **COUNTS)
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["requests"] |= {"num_output_tokens": 130, "num_unfinished": 4}
    path.write_text(json.dumps(metrics))
    told = shown("logs", "summary", folder)
    assert f"drafts    {ACCEPTED}" in told
    assert "tokens a step" not in told  # it was 13.00


@pytest.mark.parametrize("odd", [{"drafts": [1]}, {"drafts": {"num_drafted": "8"}, "requests": 3}])
def test_odd_counts_are_left_out(tmp_path: Path, odd: dict[str, object]) -> None:
    assert "drafts" not in shown("logs", "summary", written(tmp_path / "odd", **odd))


def test_the_report_shows_them_where_they_apply(tmp_path: Path) -> None:
    folder = written(tmp_path / "with", **COUNTS)
    with_both = page(folder)
    assert "Shared prefixes" in with_both
    assert "65,536" in with_both
    assert "120 of 200" in with_both
    assert "drafted tokens accepted: 1.33 tokens a step" in with_both
    document = json.loads(make_report(folder).files["report.json"])
    assert "65536" in json.dumps(document)
    plain = page(written(tmp_path / "plain"))
    assert "Shared prefixes" not in plain
    assert "Drafts" not in plain


def test_the_status_shows_them_while_the_run_goes_on(tmp_path: Path) -> None:
    values = {
        "state": "generating", "updated_at": "2026-11-22T12:00:00+00:00", "num_prompts": 9,
        "hosts": ["n1"], "num_output_tokens": 480, "tokens_per_s": 5.0,
    }  # fmt: skip
    path = tmp_path / "status.json"
    path.write_text(json.dumps(values))
    plain = shown("status", tmp_path)
    assert "shared" not in plain
    assert "drafts" not in plain
    counts = {"num_shared_tokens": 65_536, "num_drafted": 200, "num_accepted": 120}
    path.write_text(json.dumps({**values, **counts}))
    told = shown("status", tmp_path).splitlines()
    assert "shared   65,536 prompt tokens not computed" in told
    assert f"drafts   {ACCEPTED}, 1.33 tokens a step" in told
