"""`mpipipe status`: how far a run is, from a login node; needs neither torch nor MPI."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpipipe.errors import EXIT_OK, OutputError
from mpipipe.metrics.drafts import DraftUse
from mpipipe.metrics.spared import SparedWork
from mpipipe.report.numbers import count
from mpipipe.run_folder.accounts import follow_up_accounts
from mpipipe.run_folder.status import (
    RunStatus,
    check_status,
    duration,
    find_runs,
    job_folders,
    last_error,
    log_of,
    read_status,
)
from mpipipe.run_folder.status_file import RunState
from mpipipe.topology.command import Runner, run_child
from mpipipe.topology.slurm import (
    AccountedJob,
    QueuedJob,
    accounted_jobs,
    is_job_id,
    queued_jobs,
)

__all__ = ["status_command"]

_TOLD = {RunState.DONE.value, RunState.STOPPED.value, RunState.FAILED.value}


def status_command(run_or_job: str, *, as_json: bool, run: Runner = run_child) -> int:
    """Print how a run, or the runs of a job, stand; returns the exit code.

    Args:
        run_or_job: a run folder, the folder of a job, or the id of a Slurm job or array task.
        as_json: print a JSON object with `runs` and `jobs` instead.
        run: asks squeue and sacct, where these exist.

    Raises:
        OutputError: there is neither such a folder nor such a job.
    """
    try:
        seen = _look(Path(run_or_job), run_or_job, run)
    except OSError as error:
        raise OutputError(
            f"{run_or_job} cannot be looked at ({error}): give a run folder, or the id of a job"
        ) from error
    for status in seen.runs:
        follow_up_accounts(status.folder, run)
    if as_json:
        print(json.dumps(_document(seen), indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(seen)))
    return EXIT_OK


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    """Runs, each with the name of its log, and what Slurm says of their jobs."""

    runs: Sequence[RunStatus]
    logs: Sequence[str | None]  # without a run: one, of the job
    queued: Sequence[QueuedJob]
    accounted: Sequence[AccountedJob]


def _look(folder: Path, name: str, run: Runner) -> _Seen:
    if not folder.is_dir() and is_job_id(name):
        return _look_for_job(name, run)
    if not folder.is_dir():
        raise OutputError(f"there is no folder {folder}: give a run folder, or the id of a job")
    status = read_status((find_runs(folder)[-1:] or [folder])[0])
    job_id = status.job_id
    if not status.values and job_id is None:
        raise OutputError(
            f"{folder} holds no run (no status.json, and none right below it): give the run "
            "folder, which `mpipipe run` prints at its end"
        )
    queued, accounted = _ask(job_id, run) if job_id is not None else ((), ())
    log = log_of(status.folder, job_id, [*queued, *accounted], run)
    return _Seen([status], [log], queued, accounted)


def _look_for_job(job_id: str, run: Runner) -> _Seen:
    queued, accounted = _ask(job_id, run)
    jobs: list[QueuedJob | AccountedJob] = [*queued, *accounted]
    # The task of an array has a number of its own; its folder is named `<array>_<task>`.
    names = dict.fromkeys([job_id, *(job.label for job in jobs if job.raw_id == job_id)])
    roots = _roots(jobs)
    found = dict.fromkeys(path for name in names for path in job_folders(name, roots))
    runs = [read_status(path) for path in found]
    # Another job may have gone on in the folder.
    known = {*names, *(job.label for job in jobs)}
    for other in sorted({status.job_id for status in runs if status.job_id} - known):
        others = _ask(other, run)
        queued, accounted = queued + others[0], accounted + others[1]
    if not (runs or queued or accounted):
        raise OutputError(
            f"there is no job {job_id} in the queue or in the accounting, and no folder of "
            "it here: give the run folder, or set MPIPIPE_SCRATCH to where job folders are"
        )
    jobs = [*queued, *accounted]
    if runs:
        logs = [log_of(status.folder, status.job_id, jobs, run) for status in runs]
    else:
        logs = [log_of(Path(), list(names)[-1], jobs, run)]
    return _Seen(runs, logs, queued, accounted)


def _ask(job_id: str, run: Runner) -> tuple[tuple[QueuedJob, ...], tuple[AccountedJob, ...]]:
    queued = queued_jobs(job_id, run)
    return queued, () if queued else accounted_jobs(job_id, run)


def _roots(jobs: Sequence[QueuedJob | AccountedJob]) -> list[Path]:
    """Where job folders may be: as launch/site.env has it, below the job's folder and this one."""
    roots = [Path(os.environ[name]) for name in ("MPIPIPE_SCRATCH",) if os.environ.get(name)]
    places = [Path(job.work_dir) for job in jobs if os.path.isdir(job.work_dir)]
    places += [Path(os.environ[name]) for name in ("SCRATCH",) if os.environ.get(name)]
    for place in (*places, Path()):
        roots += [place / "mpipipe-jobs", place / "runs", place]
    return roots


def _verdict(status: RunStatus, seen: _Seen) -> str:
    """The verdict on one run; of an array's tasks only its own counts."""
    own_queued = [job for job in seen.queued if status.job_id in {None, job.label}]
    own_accounted = [job for job in seen.accounted if status.job_id in {None, job.label}]
    return check_status(status, own_queued, own_accounted, datetime.now(UTC))


def _document(seen: _Seen) -> dict[str, Any]:
    jobs: list[QueuedJob | AccountedJob] = [*seen.queued, *seen.accounted]
    return {
        "runs": [
            {
                "folder": str(status.folder),
                "verdict": _verdict(status, seen),
                "log": log,
                "status": dict(status.values),
                "left_out": list(status.left_out),
            }
            for status, log in zip(seen.runs, seen.logs, strict=False)
        ],
        "jobs": [dataclasses.asdict(job) for job in jobs],
    }


def _lines(seen: _Seen) -> list[str]:
    lines: list[str] = []
    # A job that has no run yet is judged as one that said nothing.
    for status, log in zip(seen.runs or [RunStatus(Path(), {})], seen.logs, strict=True):
        facts = {"run": str(status.folder)} if seen.runs else {}
        facts |= {"state": _verdict(status, seen), **_progress(status.values)}
        if status.left_out:
            facts["note"] = f"status.json has odd values, left out: {', '.join(status.left_out)}"
        # A job that ended before its run could tell why: its log may.
        if log and not seen.queued and status.values.get("state") not in _TOLD:
            facts |= {"error": error} if (error := last_error(log)) else {}
        facts |= {"log": log} if log else {}
        lines += ["", *(f"{label:<9}{value}" for label, value in facts.items())]
    for job in seen.queued:
        left = f", {job.time_left} left" if job.state == "RUNNING" else ""
        lines.append(f"job      {job.label} {job.state} {job.nodes or f'({job.reason})'}{left}")
    lines += [
        f"job      {job.label} {job.state} after {job.elapsed}, exit code {job.exit_code}"
        for job in seen.accounted
    ]
    return lines[1:]


def _spared(values: Mapping[str, Any]) -> SparedWork:
    drafts = DraftUse(values.get("num_drafted", 0), values.get("num_accepted", 0))
    return SparedWork(
        values.get("num_shared_tokens", 0), drafts, values.get("num_output_tokens", 0)
    )


def _progress(values: Mapping[str, Any]) -> dict[str, str]:
    """What the run counted, by label."""
    if "num_prompts" not in values:
        return {}
    total, kept = values["num_prompts"], values.get("num_kept", 0)
    completed, failed = values.get("num_completed", 0), values.get("num_failed", 0)
    done = kept + completed + failed
    prompts = f"{done:,} of {total:,}"
    prompts += f", {kept:,} of them in earlier attempts" if kept else ""
    prompts += f", {failed:,} failed" if failed else ""
    facts = {"prompts": prompts}
    if values.get("num_output_tokens"):
        speed = f"{values.get('tokens_per_s', 0.0):,.1f} tokens/s"
        elapsed_s = values.get("generating_s", 0.0)
        if values.get("state") == "generating" and completed and total > done:
            left_s = (total - done) * elapsed_s / completed
            speed += f", about {duration(left_s)} to go"
        facts["speed"] = speed
    facts |= {label: ", ".join(words) for label, words in _spared(values).words().items()}
    if values.get("stops_in_s") is not None and values.get("state") == "generating":
        facts["time"] = f"stops in {duration(values['stops_in_s'])} to keep the wall time"
    hosts, num_replicas = dict.fromkeys(values.get("hosts", ())), values.get("num_replicas", 1)
    ranks = count(len(values.get("hosts", ())), "rank")
    ranks += f" in {num_replicas} replicas" if num_replicas > 1 else ""
    return {**facts, "hosts": f"{ranks} on {' '.join(hosts)}"}
