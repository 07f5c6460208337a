"""What Slurm's accounting counted of a job, from what `sacct --parsable2 --duplicates` printed.

A job that was requeued has several attempts, each with its steps. A column that was not asked for,
or that says nothing, is None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mpipipe.topology.command import Runner, output_of, run_child
from mpipipe.topology.slurm import parse_duration_s

__all__ = ["ACCOUNT_FORMAT", "AccountedAttempt", "account_of", "all_ended", "ask_account"]

# As in launch/site.env.
ACCOUNT_FORMAT = (
    "JobID,State,ExitCode,Elapsed,NNodes,NTasks,AllocTRES,MaxRSS,AveCPU,MaxDiskRead,MaxDiskWrite,"
    "ConsumedEnergyRaw,NodeList"
)
_ASK_LIMIT_S = 10.0  # slurmdbd takes longer than slurmctld
_UNENDED = {"PENDING", "RUNNING", "SUSPENDED", "RESIZING"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGTP]?)")
_FACTORS = {letter: 1 << 10 * power for power, letter in enumerate(["", *"KMGTP"])}


@dataclass(frozen=True, slots=True)
class AccountedAttempt:
    """One attempt of a job that has ended."""

    job: str
    state: str
    exit_code: str  # code:signal
    elapsed_s: float | None
    num_nodes: int | None
    max_rss_bytes: int | None  # of the task with the most
    ave_cpu_s: float | None  # CPU time of a task, on average over the tasks of the busiest step
    max_disk_read_bytes: int | None  # of the task with the most
    max_disk_write_bytes: int | None
    energy_j: float | None  # of all nodes, where the site measures it


def ask_account(job_id: str, columns: str, run: Runner = run_child) -> str:
    """What the accounting says of `job_id`; "": there is none, or it has forgotten the job."""
    command = ("sacct", "--duplicates", "--parsable2", f"--jobs={job_id}", f"--format={columns}")
    answer = output_of(run, command, _ASK_LIMIT_S) or ""
    return answer if len(answer.splitlines()) > 1 else ""


def account_of(text: str) -> tuple[AccountedAttempt, ...] | None:
    """The attempts that had ended when sacct printed `text`, oldest first; None: sacct did not.

    An attempt's line comes before those of its steps, whose ids have a dot.
    """
    header, *lines = text.splitlines() or [""]
    names = header.split("|")
    if not {"JobID", "State"} <= set(names):
        return None
    rows = [dict(zip(names, line.split("|"), strict=False)) for line in lines]
    attempts: list[tuple[dict[str, str], list[dict[str, str]]]] = []
    for row in rows:
        if "." not in row["JobID"]:
            attempts.append((row, []))
        elif attempts:
            attempts[-1][1].append(row)
    ended = [(job, steps) for job, steps in attempts if _state(job) not in _UNENDED]
    return tuple(_attempt(job, steps) for job, steps in ended)


def all_ended(text: str) -> bool:
    """Whether sacct printed `text` when the job and its steps had ended: no figure will change."""
    header, *lines = text.splitlines() or [""]
    names = header.split("|")
    rows = [dict(zip(names, line.split("|"), strict=False)) for line in lines]
    return bool(rows) and "State" in names and not any(_state(row) in _UNENDED for row in rows)


def _state(row: dict[str, str]) -> str:
    return row.get("State", "").partition(" ")[0]  # CANCELLED by 1000


def _attempt(job: dict[str, str], steps: list[dict[str, str]]) -> AccountedAttempt:
    nodes, energy = job.get("NNodes", ""), job.get("ConsumedEnergyRaw", "")
    return AccountedAttempt(
        job=job["JobID"],
        state=_state(job),
        exit_code=job.get("ExitCode", ""),
        elapsed_s=parse_duration_s(job.get("Elapsed", "")),
        num_nodes=int(nodes) if nodes.isdecimal() else None,
        max_rss_bytes=_most_bytes(steps, "MaxRSS"),
        ave_cpu_s=max((s for row in steps if (s := _cpu_s(row)) is not None), default=None),
        max_disk_read_bytes=_most_bytes(steps, "MaxDiskRead"),
        max_disk_write_bytes=_most_bytes(steps, "MaxDiskWrite"),
        energy_j=float(energy) if energy.isdecimal() and int(energy) else None,
    )


def _most_bytes(steps: list[dict[str, str]], column: str) -> int | None:
    found = [_SIZE.fullmatch(row.get(column, "")) for row in steps]
    sizes = [round(float(size[1]) * _FACTORS[size[2]]) for size in found if size]
    return max(sizes, default=None)


def _cpu_s(row: dict[str, str]) -> float | None:
    """Of `AveCPU`, which has a fraction where it is short: 00:01.250."""
    whole, _, fraction = row.get("AveCPU", "").partition(".")
    seconds = parse_duration_s(whole)
    return None if seconds is None else seconds + float(f"0.{fraction or 0}")
