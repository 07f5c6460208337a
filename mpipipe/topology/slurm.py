"""What Slurm says of a job: its name, how much time is left, whether it waits, how it ended.

The environment tells most; `squeue`, `sacct` and `scontrol` are asked for the rest, through a
`Runner`, and may not exist (a container, another cluster). `launcher` tells of ranks, `mpi_library`
of MPI. What the end of a job means to a user, and the options of sbatch that it had, follow purely
from these fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mpipipe.errors import (
    EXIT_BUG,
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_PEER_LOST,
    EXIT_PROMPTS,
    EXIT_REQUEUE,
)
from mpipipe.topology.command import Runner, output_of, run_child

__all__ = [
    "AccountedJob",
    "QueuedJob",
    "SlurmJob",
    "accounted_jobs",
    "ask_job_record",
    "idle_nodes",
    "is_job_id",
    "job_record",
    "launch_warnings",
    "meaning_of_end",
    "parse_duration_s",
    "queued_jobs",
    "read_job",
    "sbatch_options",
    "wall_time_left_s",
]

# slurmctld answers in milliseconds; a busy one in seconds; a dead one is not waited for.
_ASK_LIMIT_S = 5.0
_JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")
# `scontrol show job`: a value may hold spaces (a command, a log's name), up to the next key.
_FIELD = re.compile(r"(?:^|\s)([A-Z][\w:/]*)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)", re.DOTALL)
_DURATION = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")
_QUEUE_FORMAT = "%i|%A|%T|%r|%S|%L|%N|%Z"
_ACCOUNT_FORMAT = "JobID,JobIDRaw,State,ExitCode,Elapsed,End,WorkDir"


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """The job that this process is part of."""

    # The id, or `<array>_<task>`: what users see, and what Slurm's programs take. SLURM_JOB_ID will
    # not do: that of an array's last task is the array's, and names all of its tasks.
    label: str
    num_restarts: int  # how often Slurm has requeued it
    end_time_s: float | None  # Unix time; None: the environment does not say


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job in the queue: waiting, running or ending."""

    label: str
    raw_id: str  # of an array's task, the number that Slurm gave it; else the label
    state: str  # PENDING, RUNNING, COMPLETING …
    reason: str  # why it waits; "None" when it does not
    start: str  # when it started, or is expected to; "N/A": unknown
    time_left: str  # as Slurm writes it
    nodes: str
    work_dir: str


@dataclass(frozen=True, slots=True)
class AccountedJob:
    """A job as the accounting keeps it."""

    label: str
    raw_id: str  # as of QueuedJob
    state: str
    exit_code: str  # code:signal
    elapsed: str
    end: str
    work_dir: str

    @property
    def has_ended(self) -> bool:
        """Whether it is over; sacct knows of running and waiting jobs, too."""
        return self.state not in {"PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "RESIZING"}


def read_job(environ: Mapping[str, str]) -> SlurmJob | None:
    """The job of this process; None outside of Slurm."""
    job_id = environ.get("SLURM_JOB_ID", "")
    if not job_id.isdigit():
        return None
    array, task = environ.get("SLURM_ARRAY_JOB_ID", ""), environ.get("SLURM_ARRAY_TASK_ID", "")
    end_time = environ.get("SLURM_JOB_END_TIME", "")  # since Slurm 22.05, in batch jobs
    restarts = environ.get("SLURM_RESTART_COUNT", "")  # absent the first time
    return SlurmJob(
        label=f"{array}_{task}" if array and task else job_id,
        num_restarts=int(restarts) if restarts.isdigit() else 0,
        end_time_s=float(end_time) if end_time.isdigit() else None,
    )


def wall_time_left_s(job: SlurmJob, now_unix_s: float, run: Runner = run_child) -> float | None:
    """Seconds until Slurm ends `job`; None: no limit, or it is not known."""
    if job.end_time_s is not None:
        return max(0.0, job.end_time_s - now_unix_s)
    answer = output_of(run, ("squeue", "-h", "-j", job.label, "-o", "%L"), _ASK_LIMIT_S)
    return None if answer is None else parse_duration_s(answer.strip())


def parse_duration_s(text: str) -> float | None:
    """Seconds of `D-HH:MM:SS`, `HH:MM:SS` or `MM:SS`; None for anything else (UNLIMITED)."""
    found = _DURATION.fullmatch(text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def is_job_id(text: str) -> bool:
    """Whether `text` is the id of a job, or of one task of an array."""
    return _JOB_ID.fullmatch(text) is not None


def queued_jobs(job_id: str, run: Runner = run_child) -> tuple[QueuedJob, ...]:
    """What the queue holds under `job_id`: one job, the tasks of an array, or nothing."""
    command = ("squeue", "-h", "-j", job_id, "-o", _QUEUE_FORMAT)
    answer = output_of(run, command, _ASK_LIMIT_S)  # an old id is an error of squeue
    fields = (line.split("|", 7) for line in (answer or "").splitlines())
    return tuple(QueuedJob(*values) for values in fields if len(values) == 8)


def accounted_jobs(job_id: str, run: Runner = run_child) -> tuple[AccountedJob, ...]:
    """What the accounting knows of `job_id`, of its last attempt: one job, or an array's tasks."""
    command = ("sacct", "-n", "-X", "-P", "-j", job_id, "-o", _ACCOUNT_FORMAT)
    answer = output_of(run, command, _ASK_LIMIT_S)
    fields = (line.split("|", 6) for line in (answer or "").splitlines())
    return tuple(AccountedJob(*values) for values in fields if len(values) == 7)


def job_record(text: str) -> dict[str, str]:
    """The fields of one job in what `scontrol show job` printed, such as StdOut and TimeLimit."""
    return {key: value for key, value in _FIELD.findall(text) if value != "(null)"}


def ask_job_record(job_id: str, run: Runner = run_child) -> dict[str, str]:
    """What slurmctld says of `job_id`; empty: it has forgotten the job, some minutes after its end.

    Of an array's id, whose tasks are several jobs: empty.
    """
    command = ("scontrol", "--oneliner", "show", "job", job_id)
    answer = (output_of(run, command, _ASK_LIMIT_S) or "").strip()
    return job_record(answer) if answer and "\n" not in answer else {}


def idle_nodes(environ: Mapping[str, str], num_ranks: int) -> int:
    """How many nodes of the job get no rank, as in `salloc --nodes=2`, then `srun --ntasks=1`."""
    num_nodes = environ.get("SLURM_JOB_NUM_NODES", "")
    return max(0, int(num_nodes) - num_ranks) if num_nodes.isdecimal() else 0


def launch_warnings(environ: Mapping[str, str], num_ranks: int) -> list[str]:
    """What is odd about how the job was started, a sentence each."""
    num_idle = idle_nodes(environ, num_ranks) if read_job(environ) is not None else 0
    if not num_idle:
        return []
    verb = "get" if num_idle > 1 else "gets"
    remedy = "ask for fewer nodes (--nodes=), or for tasks on each (--ntasks-per-node=1)"
    return [f"{num_idle} of the job's nodes {verb} no rank: {remedy}"]


# ---- what the end of a job means; its options of sbatch ------------------------------------------

_STATES = {
    "OUT_OF_MEMORY": "the job's memory limit was reached: ask for more with --mem=",
    "TIMEOUT": "the wall time was over: ask for more with --time=",
    "DEADLINE": "the job's deadline was reached",
    "NODE_FAIL": "a node of the job failed",
    "BOOT_FAIL": "a node of the job did not start",
    "PREEMPTED": "another job took its place",
    "CANCELLED": "it was ended from outside (scancel, or an administrator)",
    "REVOKED": "another cluster started it",
}
_CODES = {
    EXIT_BUG: "unexpected: a bug of mpipipe, or a command that failed before it",
    EXIT_CONFIG: "configuration, plan or output folder",
    EXIT_CHECKPOINT: "model folder",
    EXIT_PROMPTS: "some prompts became error records",
    EXIT_ENVIRONMENT: "MPI, ranks, memory or devices",
    EXIT_PEER_LOST: "a rank was lost",
    EXIT_REQUEUE: "told to stop, can go on",
    EXIT_INTERRUPTED: "interrupted",
    126: "a command could not be started",
    127: "a command was not found",
}
_SIGNALS = {9: "SIGKILL, often for lack of memory", 15: "SIGTERM", 10: "SIGUSR1", 11: "SIGSEGV"}
# What launch/submit.sbatch asks for: options that say the same need not be repeated.
_DEFAULTS = {
    "--nodes": "2",
    "--ntasks-per-node": "1",
    "--gres": "gpu:1",
    "--cpus-per-task": "2",
    "--time": "01:00:00",
}
_FIELDS = {
    "--account": "Account",
    "--partition": "Partition",
    "--nodes": "NumNodes",
    "--cpus-per-task": "CPUs/Task",
    "--time": "TimeLimit",
}
_MEMORY = {"--mem": "MinMemoryNode", "--mem-per-cpu": "MinMemoryCPU"}
_PLAIN = re.compile(r"[\w.,:/=+@%-]+")


def meaning_of_end(state: str, exit_code: str) -> str:
    """Why a job ended, from the accounting's State and ExitCode; "" where they say nothing more."""
    word = state.partition(" ")[0]  # CANCELLED by 1000
    if word in _STATES:
        return _STATES[word]
    code, _, number = exit_code.partition(":")
    if not (code.isdecimal() and number.isdecimal() and len(code) < 4 and len(number) < 4):
        return ""
    # A shell tells the signal that ended its command as 128 and its number.
    told = int(number) or (int(code) - 128 if 128 < int(code) < 128 + 65 else 0)
    if told and int(code) not in _CODES:
        return f"ended by {_SIGNALS.get(told, f'signal {told}')}"
    return _CODES.get(int(code), "") if int(code) else ""


def sbatch_options(record: Mapping[str, str]) -> list[str]:
    """The options with which sbatch asks for what the job of this record was given.

    Those that launch/submit.sbatch asks for by itself are left out, and so is what the record does
    not tell for certain: constraints, reservations, dependencies.
    """
    if not {"NumNodes", "TimeLimit"} <= record.keys():
        return []
    told = {option: record[key] for option, key in _FIELDS.items() if key in record}
    if (per_node := record.get("NtasksPerN:B:S:C", "0").partition(":")[0]) not in {"0", "*"}:
        told["--ntasks-per-node"] = per_node
    told["--gres"] = _without_kind(record.get("TresPerNode", "")) or "none"
    for option, key in (("--gpus", "TresPerJob"), ("--gpus-per-task", "TresPerTask")):
        if (asked := _without_kind(record.get(key, ""))).startswith("gpu"):
            told[option] = asked.removeprefix("gpu:")
    told |= {option: record[key] for option, key in _MEMORY.items() if record.get(key, "0") != "0"}
    if record.get("QOS", "normal") != "normal":
        told["--qos"] = record["QOS"]
    return [
        f"{option}={value}"
        for option, value in told.items()
        if value != _DEFAULTS.get(option) and _PLAIN.fullmatch(value)
    ]


def _without_kind(resources: str) -> str:
    """`gpu:1` of `gres:gpu:1`, or of `gres/gpu:1`, as newer versions write it."""
    return ",".join(
        part.removeprefix("gres:").removeprefix("gres/") for part in resources.split(",")
    )
