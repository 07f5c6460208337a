"""`status.json` as the run writes it, and what `mpipipe status` makes of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mpipipe.cli.status import status_command
from mpipipe.errors import ConfigError, OutputError, StoppedError
from mpipipe.run_folder import status_file
from mpipipe.run_folder.status import RunStatus, check_status, duration, find_runs, read_status
from mpipipe.run_folder.status_file import ProgressFile, RunState, tell_end
from mpipipe.topology.slurm import AccountedJob, QueuedJob

NOW = datetime(2020, 11, 22, 12, 0, tzinfo=UTC)
PENDING = QueuedJob("7", "7", "PENDING", "Priority", "2026-11-22T13:00:00", "1:00:00", "", "/w")
RUNNING = QueuedJob("7", "7", "RUNNING", "None", "2020-11-20T11:00:00", "30:00", "n[1-2]", "/w")
AGAIN = dataclasses.replace(RUNNING, start="2020-11-25T11:00:00")  # after it said something
SINCE = dataclasses.replace(RUNNING, start=(NOW - timedelta(minutes=1)).isoformat())
STILL = AccountedJob("7", "7", "RUNNING", "0:0", "00:05:00", "Unknown", "/w")
KILLED = AccountedJob("7", "7", "OUT_OF_MEMORY", "0:125", "00:05:00", "x", "/w")


def told(state: str, seconds_ago: float = 1.0, **more: object) -> dict[str, Any]:
    then = NOW - timedelta(seconds=seconds_ago)
    return {"state": state, "updated_at": then.isoformat(), "update_interval_s": 5.0, **more}


# ---- written -------------------------------------------------------------------------------------


def test_what_was_told_once_stays_until_it_is_told_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    progress = ProgressFile(tmp_path, ["a", "b"], lambda: NOW)
    progress.write(RunState.LOADING, num_prompts=3)
    progress.write(RunState.GENERATING, num_completed=1)
    values = json.loads((tmp_path / "status.json").read_text())
    assert values["state"] == "generating"
    assert (values["num_prompts"], values["num_completed"]) == (3, 1)
    assert (values["job_id"], values["num_restarts"]) == ("12", 1)
    assert values["hosts"] == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_other_ranks_write_nothing_and_a_lost_folder_ends_no_run(tmp_path: Path) -> None:
    ProgressFile(None).write(RunState.LOADING)
    ProgressFile(tmp_path / "gone").write(RunState.LOADING)


@pytest.mark.parametrize(
    ("error", "state", "text"),
    [
        (ConfigError("no such setting"), "failed", "no such setting"),
        (StoppedError("SIGTERM"), "stopped", "SIGTERM"),
        (KeyError("bug"), "failed", "KeyError: 'bug'"),
        (asyncio.CancelledError(), "failed", "interrupted"),
    ],
)
def test_what_ends_a_run_is_told(
    tmp_path: Path, error: BaseException, state: str, text: str
) -> None:
    ProgressFile(tmp_path).failed(error)
    values = json.loads((tmp_path / "status.json").read_text())
    assert (values["state"], values["error"]) == (state, text)


def test_what_fails_after_the_end_of_a_run_is_not_its_end(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path)
    progress.write(RunState.DONE)
    progress.failed(KeyError("while the ranks left"))
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize("content", [b'{"state": []}', b"[" * 100_000, b"[]", b"\xff", b"{"])
def test_an_end_that_is_told_for_others_meets_odd_content(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(content)
    tell_end(tmp_path, RunState.FAILED, "rank 0 was killed")
    values = read_status_or_nothing(tmp_path)
    assert values.get("state") == ("failed" if content.startswith(b'{"') else None)


def read_status_or_nothing(folder: Path) -> Mapping[str, Any]:
    try:
        return read_status(folder).values
    except OutputError:
        return {}


def test_counts_that_come_late_do_not_hide_the_end_of_a_run(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path)
    progress.failed(ConfigError("disk full"))
    progress.write(RunState.GENERATING, num_completed=3)  # posted before, to another thread
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_the_end_of_a_run_does_not_wait_for_a_write_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, answers = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        begun.set()
        assert answers.wait(20), "the end of the run waits for the file system"

    monkeypatch.setattr(status_file, "write_whole", hang)
    monkeypatch.setattr(status_file, "_PATIENCE_S", 0.0)
    progress = ProgressFile(tmp_path)
    writing = threading.Thread(target=progress.write, args=(RunState.GENERATING,))
    writing.start()
    assert begun.wait(20)
    progress.failed(ConfigError("rank 1 is lost"))
    answers.set()
    writing.join(20)


# ---- judged --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "queued", "accounted", "verdict"),
    [
        (told("generating"), [RUNNING], [], "generating"),
        (told("stopping", stop_reason="SIGTERM"), [RUNNING], [], "stopping (SIGTERM)"),
        (told("loading", 300), [RUNNING], [], "loading"),
        (told("loading", 300), [], [KILLED], "ended while loading; the job is OUT_OF_MEMORY, exit"),
        (told("generating", 3), [], [KILLED], "ended while generating; the job is OUT_OF_MEMORY"),
        (told("loading", 300), [], [STILL], "loading"),
        (told("stopped", 9999, stop_reason="SIGTERM"), [], [], "stopped (SIGTERM), can go on"),
        (told("stopped", 9999), [RUNNING], [], "stopped, can go on; the job is still RUNNING"),
        (told("stopped", 9999), [AGAIN], [], "starting again (the job is RUNNING since 2020-11-25"),
        (told("generating", 9999), [AGAIN], [], "starting again"),
        (told("stopped", 9999), [PENDING], [], "queued again (Priority, expected to start"),
        (told("done", 9999), [], [], "done"),
        (told("done", 9999, num_failed=2), [], [], "done, 2 prompts became error records"),
        (told("failed", 9999, error="no space"), [], [], "failed: no space"),
        ({}, [PENDING], [], "queued (Priority, expected to start 2026-11-22T13:00:00)"),
        ({}, [SINCE], [], "starting (the job is RUNNING; its run has written nothing yet)"),
        ({}, [dataclasses.replace(SINCE, state="CONFIGURING")], [], "starting"),
        ({}, [RUNNING], [], "the job is RUNNING since 2020-11-20T11:00:00, but no run of it is"),
        ({}, [dataclasses.replace(SINCE, state="COMPLETING")], [], "the job is COMPLETING since"),
        ({}, [], [STILL], "starting; the job is RUNNING"),
        ({}, [], [KILLED], "ended before the run began; the job is OUT_OF_MEMORY"),
        ({}, [], [], "unknown"),
    ],
)
def test_the_file_and_slurm_together_tell_the_state(
    values: Mapping[str, Any],
    queued: Sequence[QueuedJob],
    accounted: Sequence[AccountedJob],
    verdict: str,
) -> None:
    status = RunStatus(Path("run"), values)
    assert check_status(status, queued, accounted, NOW).startswith(verdict)


@pytest.mark.parametrize(("state", "silent_s"), [("generating", 31), ("loading", 901)])
def test_a_run_that_says_nothing_any_more_is_told(state: str, silent_s: float) -> None:
    verdict = check_status(RunStatus(Path("run"), told(state, silent_s)), [RUNNING], [], NOW)
    assert verdict.startswith("no sign of life since 2020-11-22 11:")
    assert f"when it was {state}" in verdict
    assert verdict.endswith("; the job is RUNNING")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (119, "119 s"), (700, "12 min"), (7200, "2 h 00 min"), (11100, "3 h 05 min")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- found ---------------------------------------------------------------------------------------


def write(folder: Path, at_s: float = 0.0, **values: object) -> Path:
    folder.mkdir(parents=True)
    path = folder / "status.json"
    path.write_text(json.dumps({**told("done"), **values}))
    os.utime(path, (at_s, at_s))
    return folder


def test_a_run_is_found_at_in_and_below_a_folder(tmp_path: Path) -> None:
    job = write(tmp_path / "jobs" / "demo-12" / "outputs", 2.0)
    assert find_runs(job) == find_runs(job.parent) == [job]
    newer = write(tmp_path / "jobs" / "demo-9", 3.0)
    assert find_runs(tmp_path / "jobs") == [job, newer]
    assert find_runs(tmp_path) == []


def test_the_job_of_a_run_is_told_or_in_the_name_of_its_folder(tmp_path: Path) -> None:
    assert RunStatus(tmp_path / "x", {"job_id": "5_1"}).job_id == "5_1"
    assert RunStatus(tmp_path / "demo-12_3" / "outputs", {}).job_id == "12_3"
    assert RunStatus(tmp_path / "demo-12.2", {}).job_id == "12"
    assert RunStatus(Path("/a/b"), {}).job_id is None


def test_a_status_file_that_is_none_is_told(tmp_path: Path) -> None:
    assert read_status(tmp_path).values == {}
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(OutputError, match=r"status\.json cannot be read"):
        read_status(tmp_path)


# ---- printed -------------------------------------------------------------------------------------


def slurm(**answers: str) -> Any:
    def run(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        answer = answers.get(command[0])
        return subprocess.CompletedProcess(command, answer is None, answer or "", "")

    return run


def test_a_running_job_is_shown_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPIPIPE_SCRATCH", str(tmp_path))
    counts: dict[str, Any] = {
        "num_prompts": 100, "num_kept": 10, "num_completed": 30, "num_failed": 0,
        "num_output_tokens": 3000, "tokens_per_s": 50.0, "generating_s": 60.0,
        "hosts": ["n1", "n2"], "job_id": "7", "stops_in_s": 1800,
    }  # fmt: skip
    now = datetime.now(UTC).isoformat()
    write(tmp_path / "demo-7" / "outputs", state="generating", updated_at=now, **counts)
    squeue = "7|7|RUNNING|None|2020-11-22T11:00:00|30:00|n[1-2]|/w\n"
    assert status_command("7", as_json=False, run=slurm(squeue=squeue)) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"run      {tmp_path}/demo-7/outputs",
        "state    generating",
        "prompts  40 of 100, 10 of them in earlier attempts",
        "speed    50.0 tokens/s, about 2 min to go",
        "time     stops in 30 min to keep the wall time",
        "hosts    2 ranks on n1 n2",
        "job      7 RUNNING n[1-2], 30:00 left",
    ]


def test_a_single_rank_is_not_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", state="done", num_prompts=4, hosts=["n1"])
    assert status_command(str(tmp_path / "run"), as_json=False, run=slurm()) == 0
    assert "hosts    1 rank on n1" in capsys.readouterr().out.splitlines()


def test_a_run_of_several_replicas_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = ["n1", "n1", "n2", "n2"]
    counts: dict[str, Any] = {"num_prompts": 4, "hosts": hosts, "num_replicas": 2}
    write(tmp_path / "run", state="done", **counts)
    assert status_command(str(tmp_path / "run"), as_json=False, run=slurm()) == 0
    assert "hosts    4 ranks in 2 replicas on n1 n2" in capsys.readouterr().out.splitlines()


def test_a_run_folder_of_any_name_is_found_by_the_job_that_it_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine", job_id="7")
    write(tmp_path / "demo-5" / "outputs", job_id="7")  # which has gone on with job 5
    write(tmp_path / "other", job_id="77")
    (tmp_path / "web").mkdir()
    (tmp_path / "web/status.json").write_text("another program's")
    assert status_command("7", as_json=True, run=slurm()) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["folder"] for run in document["runs"]] == [
        str(tmp_path / "demo-5" / "outputs"),
        str(tmp_path / "mine"),
    ]


def test_a_queued_job_has_no_run_yet(capsys: pytest.CaptureFixture[str]) -> None:
    squeue = "7|7|PENDING|Resources|N/A|30:00||/nowhere\n"
    assert status_command("7", as_json=False, run=slurm(squeue=squeue)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["state    queued (Resources)", "job      7 PENDING (Resources)"]


def test_each_task_of_an_array_is_judged_by_its_own_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPIPIPE_SCRATCH", str(tmp_path))
    for task in (0, 1):
        old: dict[str, Any] = {
            "state": "generating",
            "updated_at": NOW.isoformat(),
            "job_id": f"7_{task}",
        }
        write(tmp_path / f"demo-7_{task}" / "outputs", **old)
    sacct = "7_0|8|TIMEOUT|0:0|1|x|/w\n7_1|7|NODE_FAIL|0:0|1|x|/w\n"
    assert status_command("7", as_json=True, run=slurm(sacct=sacct)) == 0
    document = json.loads(capsys.readouterr().out)
    verdicts = [run["verdict"] for run in document["runs"]]
    assert "TIMEOUT" in verdicts[0]
    assert "NODE_FAIL" in verdicts[1]
    assert [job["state"] for job in document["jobs"]] == ["TIMEOUT", "NODE_FAIL"]


def test_a_run_that_another_job_goes_on_with_is_judged_by_that_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPIPIPE_SCRATCH", str(tmp_path))
    now = datetime.now(UTC).isoformat()
    write(tmp_path / "demo-7" / "outputs", state="generating", updated_at=now, job_id="9")

    def run(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        running = command[0] == "squeue" and "9" in command
        answers = {
            "squeue": "9|9|RUNNING|None|2020-11-22T11:00:00|30:00|n1|/w\n" if running else ""
        }
        if "7" in command:
            answers["sacct"] = "7|7|FAILED|6:0|1|x|/w\n"
        answer: subprocess.CompletedProcess[str] = slurm(**answers)(command, limit_s)
        return answer

    assert status_command("7", as_json=True, run=run) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["verdict"] for run in document["runs"]] == ["generating"]
    assert [job["state"] for job in document["jobs"]] == ["RUNNING", "FAILED"]


@pytest.mark.parametrize("name", ["7", "no/such/folder", "."])
def test_what_cannot_be_found_is_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MPIPIPE_SCRATCH", raising=False)
    monkeypatch.delenv("SCRATCH", raising=False)
    with pytest.raises(OutputError):
        status_command(name, as_json=False, run=slurm())


TASK = """\
JobId=782 ArrayJobId=779 ArrayTaskId=1 JobName=a b UserId=root(0) JobState=FAILED Reason=None \
NumNodes=2 CPUs/Task=2 TimeLimit=00:20:00 Command=/tmp/j.sh 3 StdErr=/tmp/my logs/jj-779_1.log \
StdIn=/dev/null StdOut=/tmp/my logs/jj-779_1.log Power=
"""


def test_a_task_of_an_array_is_found_by_the_number_that_slurm_gave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPIPIPE_SCRATCH", str(tmp_path))
    for task in (1, 2):
        write(tmp_path / f"demo-779_{task}" / "outputs", state="failed", error="no space")
    answers = slurm(sacct="779_1|782|FAILED|2:0|00:05|x|/w\n", scontrol=TASK)
    assert status_command("782", as_json=False, run=answers) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"run      {tmp_path}/demo-779_1/outputs",
        "state    failed: no space",
        "log      /tmp/my logs/jj-779_1.log",
        "job      779_1 FAILED after 00:05, exit code 2:0",
    ]


def test_a_job_that_ended_before_its_run_tells_why_and_where_its_log_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = "mpipipe: error: old\nmpipipe: error: there is no model folder /m\nsrun: error: n1\n"
    (tmp_path / "mpipipe-7.log").write_text(said)
    answers = slurm(sacct=f"7|7|FAILED|3:0|00:05|x|{tmp_path}\n")
    assert status_command("7", as_json=False, run=answers) == 0
    why = "the job is FAILED, exit code 3:0 (sacct): model folder"
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"state    ended before the run began; {why}",
        "error    there is no model folder /m",
        f"log      {tmp_path}/mpipipe-7.log",
    ]


def test_the_command_for_going_on_repeats_what_the_job_was_given(tmp_path: Path) -> None:
    run = write(tmp_path / "demo-7" / "outputs", state="stopped")
    (run.parent / "job.env").touch()
    (run.parent / "scontrol.txt").write_text(TASK)
    verdict = check_status(read_status(run), [], [], NOW)
    options = "--time=00:20:00 --gres=none launch/submit.sbatch"
    assert verdict == f"stopped, can go on: sbatch {options} {run.parent}"
