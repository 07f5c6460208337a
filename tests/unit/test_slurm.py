from __future__ import annotations

import subprocess
from collections.abc import Sequence

import pytest

from mpipipe.topology.command import run_child
from mpipipe.topology.slurm import (
    AccountedJob,
    QueuedJob,
    accounted_jobs,
    ask_job_record,
    idle_nodes,
    is_job_id,
    launch_warnings,
    parse_duration_s,
    queued_jobs,
    read_job,
    wall_time_left_s,
)


class Answers:
    """Slurm's programs: what each prints; one that has no answer fails, or is missing."""

    def __init__(self, missing: bool = False, **answers: str) -> None:
        self.answers, self.missing = answers, missing
        self.asked: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        self.asked.append(command)
        if self.missing:
            raise FileNotFoundError(command[0])
        answer = self.answers.get(command[0])
        return subprocess.CompletedProcess(command, answer is None, answer or "", "")


def test_outside_of_slurm_there_is_no_job() -> None:
    assert read_job({"HOME": "/"}) is None


def test_a_job_is_named_as_its_user_sees_it() -> None:
    job = read_job({"SLURM_JOB_ID": "17"})
    assert job is not None
    assert (job.label, job.num_restarts, job.end_time_s) == ("17", 0, None)
    task = read_job(
        {
            "SLURM_JOB_ID": "19",
            "SLURM_ARRAY_JOB_ID": "17",
            "SLURM_ARRAY_TASK_ID": "2",
            "SLURM_RESTART_COUNT": "3",
            "SLURM_JOB_END_TIME": "1700000000",
        }
    )
    assert task is not None
    assert (task.label, task.num_restarts) == ("17_2", 3)
    assert task.end_time_s == 1_700_000_000


def test_the_last_task_of_an_array_which_has_the_arrays_id_asks_for_itself_only() -> None:
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    job, slurm = read_job({"SLURM_JOB_ID": "17", **array}), Answers(squeue="1:30\n")
    assert job is not None
    assert wall_time_left_s(job, 0.0, slurm) == 90.0
    assert [command[3] for command in slurm.asked] == ["17_3"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:41", 41),
        ("12:05", 725),
        ("1:00:00", 3600),
        ("2-03:04:05", 183_845),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_durations_are_read_as_slurm_writes_them(text: str, seconds: float | None) -> None:
    assert parse_duration_s(text) == seconds


def test_the_wall_time_left_comes_from_the_environment_or_the_queue() -> None:
    job = read_job({"SLURM_JOB_ID": "17"})
    known = read_job({"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": "1000"})
    assert job is not None
    assert known is not None
    silent = Answers()
    assert wall_time_left_s(known, 940.0, silent) == 60.0
    assert wall_time_left_s(known, 1001.0, silent) == 0.0
    assert silent.asked == []
    assert wall_time_left_s(job, 940.0, Answers(squeue="1:30\n")) == 90.0
    assert wall_time_left_s(job, 940.0, Answers(squeue="UNLIMITED\n")) is None
    assert wall_time_left_s(job, 940.0, silent) is None
    assert wall_time_left_s(job, 940.0, Answers(missing=True)) is None  # in a container


def test_jobs_in_the_queue_are_read() -> None:
    answer = "17|17|PENDING|Resources|2026-11-22T05:00:00|1:00:00||/home/a|b\n"
    (job,) = queued_jobs("17", Answers(squeue=answer))
    start = "2026-11-22T05:00:00"
    assert job == QueuedJob("17", "17", "PENDING", "Resources", start, "1:00:00", "", "/home/a|b")
    assert queued_jobs("17", Answers()) == ()  # squeue fails on an id that it does not know
    assert queued_jobs("17", Answers(missing=True)) == ()


def test_jobs_in_the_accounting_are_read() -> None:
    answer = (
        "17_1|18|COMPLETED|0:0|00:01:00|2026-11-22T05:00:00|/home\n"
        "17_2|17|FAILED|5:0|00:00:09|x|/h\n"
    )
    first, second = accounted_jobs("17", Answers(sacct=answer))
    assert first == AccountedJob(
        "17_1", "18", "COMPLETED", "0:0", "00:01:00", "2026-11-22T05:00:00", "/home"
    )
    assert (second.label, second.exit_code) == ("17_2", "5:0")


@pytest.mark.parametrize(
    ("text", "holds"), [("17", True), ("17_2", True), ("runs/17", False), ("", False), ("x", False)]
)
def test_ids_of_jobs_are_told_from_folders(text: str, holds: bool) -> None:
    assert is_job_id(text) is holds


def test_what_slurm_says_of_the_tasks_of_an_array_is_no_record_of_one_job() -> None:
    one = "JobId=17 ArrayJobId=17 StdOut=/h/a_1.log Power=\n"
    assert ask_job_record("17_1", Answers(scontrol=one))["StdOut"] == "/h/a_1.log"
    assert ask_job_record("17", Answers(scontrol=one * 2)) == {}
    assert ask_job_record("17", Answers()) == {}
    assert ask_job_record("17", Answers(missing=True)) == {}


@pytest.mark.parametrize(
    ("num_nodes", "num_ranks", "num_idle"), [("2", 1, 1), ("2", 2, 0), ("2", 8, 0), ("", 1, 0)]
)
def test_nodes_that_get_no_rank_are_counted(num_nodes: str, num_ranks: int, num_idle: int) -> None:
    assert idle_nodes({"SLURM_JOB_NUM_NODES": num_nodes}, num_ranks) == num_idle


def test_a_run_that_leaves_nodes_idle_is_warned() -> None:
    (warning,) = launch_warnings({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, 1)
    assert warning.startswith("1 of the job's nodes gets no rank")
    assert launch_warnings({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, 2) == []
    assert launch_warnings({"SLURM_JOB_NUM_NODES": "2"}, 1) == [], "no job"


def test_output_of_any_bytes_is_read() -> None:
    result = run_child(("printf", r"a\377b"), 10.0)
    assert result.stdout == "a\N{REPLACEMENT CHARACTER}b"
