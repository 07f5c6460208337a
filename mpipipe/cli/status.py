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
from mpipipe.runtime.run_status import (
    RunStatus,
    duration,
    find_runs,
    job_folders,
    judge,
    read_status,
)
from mpipipe.topology.command import Runner, run_child
from mpipipe.topology.slurm import (
    AccountedJob,
    QueuedJob,
    accounted_jobs,
    is_job_id,
    queued_jobs,
)

__all__ = ["status_command"]


def status_command(run_or_job: str, *, as_json: bool, run: Runner = run_child) -> int:
    """Print how a run, or the runs of a job, stand; returns the exit code.

    Args:
        run_or_job: a run folder, the folder of a job, or the id of a Slurm job or array task.
        as_json: print a JSON object with `runs` and `jobs` instead.
        run: asks squeue and sacct, where these exist.

    Raises:
        OutputError: there is neither such a folder nor such a job.
    """
    folder = Path(run_or_job)
    if not folder.is_dir() and is_job_id(run_or_job):
        queued, accounted = _ask(run_or_job, run)
        found = job_folders(run_or_job, _roots([*queued, *accounted]))
        runs = [read_status(path) for path in found]
        # Another job may have gone on in the folder.
        known = {run_or_job} | {job.label for job in queued} | {job.label for job in accounted}
        for other in sorted({status.job_id for status in runs if status.job_id} - known):
            others = _ask(other, run)
            queued, accounted = queued + others[0], accounted + others[1]
        if not (runs or queued or accounted):
            raise OutputError(
                f"there is no job {run_or_job} in the queue or in the accounting, and no folder of "
                "it here: give the run folder, or set MPIPIPE_SCRATCH to where job folders are"
            )
    elif folder.is_dir():
        runs = [read_status(path) for path in find_runs(folder)[-1:] or [folder]]
        job_id = runs[0].job_id
        if not runs[0].values and job_id is None:
            raise OutputError(
                f"{folder} holds no run (no status.json, and none right below it): give the run "
                "folder, which `mpipipe run` prints at its end"
            )
        queued, accounted = _ask(job_id, run) if job_id is not None else ((), ())
    else:
        raise OutputError(f"there is no folder {folder}: give a run folder, or the id of a job")
    if as_json:
        print(json.dumps(_document(runs, queued, accounted), indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(runs, queued, accounted)))
    return EXIT_OK


def _ask(job_id: str, run: Runner) -> tuple[tuple[QueuedJob, ...], tuple[AccountedJob, ...]]:
    queued = queued_jobs(job_id, run)
    return queued, () if queued else accounted_jobs(job_id, run)


def _roots(jobs: Sequence[QueuedJob | AccountedJob]) -> list[Path]:
    """Where job folders may be: as launch/site.env has it, below the job's folder and this one."""
    roots = [Path(os.environ[name]) for name in ("MPIPIPE_SCRATCH",) if os.environ.get(name)]
    places = [Path(job.work_dir) for job in jobs if job.work_dir]
    places += [Path(os.environ[name]) for name in ("SCRATCH",) if os.environ.get(name)]
    for place in (*places, Path()):
        roots += [place / "mpipipe-jobs", place / "runs", place]
    return roots


def _judged(
    status: RunStatus, queued: Sequence[QueuedJob], accounted: Sequence[AccountedJob]
) -> str:
    """The verdict on one run; of an array's tasks only its own counts."""
    own_queued = [job for job in queued if status.job_id in {None, job.label}]
    own_accounted = [job for job in accounted if status.job_id in {None, job.label}]
    return judge(status, own_queued, own_accounted, datetime.now(UTC))


def _document(
    runs: Sequence[RunStatus], queued: Sequence[QueuedJob], accounted: Sequence[AccountedJob]
) -> dict[str, Any]:
    jobs: list[QueuedJob | AccountedJob] = [*queued, *accounted]
    return {
        "runs": [
            {
                "folder": str(status.folder),
                "verdict": _judged(status, queued, accounted),
                "status": dict(status.values),
            }
            for status in runs
        ],
        "jobs": [dataclasses.asdict(job) for job in jobs],
    }


def _lines(
    runs: Sequence[RunStatus], queued: Sequence[QueuedJob], accounted: Sequence[AccountedJob]
) -> list[str]:
    lines: list[str] = []
    for status in runs:
        facts = {
            "run": str(status.folder),
            "state": _judged(status, queued, accounted),
            **_progress(status.values),
        }
        lines += ["", *(f"{label:<9}{value}" for label, value in facts.items())]
    if not runs:
        lines += [
            "",
            f"state    {judge(RunStatus(Path(), {}), queued, accounted, datetime.now(UTC))}",
        ]
    for job in queued:
        left = f", {job.time_left} left" if job.state == "RUNNING" else ""
        lines.append(f"job      {job.label} {job.state} {job.nodes or f'({job.reason})'}{left}")
    lines += [
        f"job      {job.label} {job.state} after {job.elapsed}, exit code {job.exit_code}"
        for job in accounted
    ]
    return lines[1:]


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
        speed = f"{values['tokens_per_s']:,.1f} tokens/s"
        elapsed_s = values.get("generating_s", 0.0)
        if values.get("state") == "generating" and completed and total > done:
            left_s = (total - done) * elapsed_s / completed
            speed += f", about {duration(left_s)} to go"
        facts["speed"] = speed
    if values.get("stops_in_s") is not None and values.get("state") == "generating":
        facts["time"] = f"stops in {duration(values['stops_in_s'])} to keep the wall time"
    hosts = dict.fromkeys(values.get("hosts", ()))
    return {**facts, "hosts": f"{len(values.get('hosts', ()))} ranks on {' '.join(hosts)}"}
