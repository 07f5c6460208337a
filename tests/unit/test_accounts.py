"""What Slurm counted of a run's jobs: read from sacct's text, asked for again after the end."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from mpipipe.cli import report
from mpipipe.errors import OutputError
from mpipipe.run_folder.accounts import follow_up_accounts, read_accounts
from mpipipe.topology.slurm_account import ACCOUNT_FORMAT, account_of, all_ended

HEADER = "JobID|State|ExitCode|Elapsed|NNodes|NTasks|AllocTRES|MaxRSS|AveCPU|MaxDiskRead"
WITHIN = f"""{HEADER}
7|RUNNING|0:0|00:01:00|2||cpu=4|||
7.batch|RUNNING|0:0|00:01:00|1|1|cpu=2|||
7.0|COMPLETED|0:0|00:00:50|2|2|cpu=4|1500K|00:00:40|2.50M
"""
AFTER = f"""{HEADER}
7|REQUEUED|0:0|00:01:10|2||cpu=4|||
7.batch|CANCELLED|0:15|00:01:10|1|1|cpu=2|900K|00:00.250|0
7.0|COMPLETED|0:0|00:00:50|2|2|cpu=4|1500K|00:00:40|2.50M
7|CANCELLED by 1000|0:0|1-00:00:05|2||cpu=4|||
7.0|FAILED|6:0|00:00:09|2|2|cpu=4|2G|00:07.500|
"""


class Slurm:
    """Answers sacct, and counts how often it is asked."""

    def __init__(self, answer: str | None) -> None:
        self.answer = answer
        self.commands: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.answer is None:
            raise FileNotFoundError("sacct")
        return subprocess.CompletedProcess(command, 0, self.answer, "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sacct_7.txt").write_text(WITHIN)
    (tmp_path / "metrics.json").write_text('{"wall_s": 50.0, "slurm": null}\n')
    return tmp_path


def slurm_of(folder: Path) -> object:
    return json.loads((folder / "metrics.json").read_text())["slurm"]


def test_each_attempt_of_a_job_has_the_figures_of_its_own_steps() -> None:
    first, second = account_of(AFTER) or ()
    assert (first.job, first.state, first.elapsed_s, first.num_nodes) == ("7", "REQUEUED", 70.0, 2)
    assert (first.max_rss_bytes, first.ave_cpu_s) == (1500 << 10, 40.0)
    assert first.max_disk_read_bytes == round(2.5 * (1 << 20))
    assert first.energy_j is None
    assert first.max_disk_write_bytes is None
    assert (second.state, second.elapsed_s) == ("CANCELLED", 86405.0)
    assert (second.max_rss_bytes, second.ave_cpu_s) == (2 << 30, 7.5)
    assert second.max_disk_read_bytes is None


def test_what_has_not_ended_is_no_figure_yet() -> None:
    assert account_of(WITHIN) == ()
    assert not all_ended(WITHIN)
    assert all_ended(AFTER)
    assert not all_ended(HEADER)


@pytest.mark.parametrize("text", ["", "JobId=7 JobName=x\n   UserId=root(0)\n", "\n\n"])
def test_another_text_is_no_account(text: str) -> None:
    assert account_of(text) is None
    assert not all_ended(text)


def test_after_the_end_the_file_and_the_metrics_are_completed(folder: Path) -> None:
    slurm = Slurm(AFTER)
    follow_up_accounts(folder, slurm)
    assert (folder / "sacct_7.txt").read_text() == AFTER
    accounts = slurm_of(folder)
    assert accounts == read_accounts(folder)
    assert isinstance(accounts, list)
    assert [attempt["state"] for attempt in accounts] == ["REQUEUED", "CANCELLED"]
    (command,) = slurm.commands
    assert "--jobs=7" in command
    assert f"--format={HEADER.replace('|', ',')}" in command, "the site's own columns"
    follow_up_accounts(folder, slurm)
    assert len(slurm.commands) == 1, "an ended job has its last word"


@pytest.mark.parametrize("answer", [None, "", WITHIN], ids=["no sacct", "forgotten", "running"])
def test_without_a_final_answer_nothing_is_changed(folder: Path, answer: str | None) -> None:
    follow_up_accounts(folder, Slurm(answer))
    assert (folder / "sacct_7.txt").read_text() == WITHIN
    assert slurm_of(folder) is None


def test_a_job_that_goes_on_in_the_folder_keeps_its_metrics_to_itself(folder: Path) -> None:
    (folder / "sacct_6.txt").write_text(AFTER.replace("\n7", "\n6"))
    follow_up_accounts(folder, Slurm(WITHIN))
    assert slurm_of(folder) is None


def test_a_file_that_scontrol_wrote_is_asked_for_with_our_columns(folder: Path) -> None:
    (folder / "sacct_7.txt").write_text("JobId=7 JobName=x\n")
    slurm = Slurm(AFTER)
    follow_up_accounts(folder, slurm)
    assert f"--format={ACCOUNT_FORMAT}" in slurm.commands[0]
    assert slurm_of(folder) == read_accounts(folder)


def test_a_report_asks_again_before_it_reads_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def make(made_of: Path, **_: object) -> None:
        assert asked == [made_of]
        raise OutputError("nothing to report")

    monkeypatch.setattr(report, "follow_up_accounts", asked.append)
    monkeypatch.setattr(report, "make_report", make)
    with pytest.raises(OutputError, match="nothing to report"):
        report.report_command(folder, out=None, against=None, hypotheses=False)


def test_a_run_without_metrics_or_job_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    (folder / "metrics.json").unlink()
    follow_up_accounts(folder, Slurm(AFTER))
    assert [path.name for path in folder.iterdir()] == ["sacct_7.txt"]
    (folder / "sacct_7.txt").unlink()
    slurm = Slurm(AFTER)
    follow_up_accounts(folder, slurm)
    assert not slurm.commands
    assert read_accounts(folder) is None
