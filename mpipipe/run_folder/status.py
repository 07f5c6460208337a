"""How a run stands, seen from outside: its `status.json`, and what Slurm says of its job.

For `mpipipe status`, on a login node: neither torch nor MPI. A run is found and its state told
here; `cli.status` prints it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mpipipe.errors import OutputError
from mpipipe.run_folder.status_file import STATUS_FILE, RunState, read_status_file
from mpipipe.run_folder.workspace import OUTPUT_FOLDER, how_to_go_on, recorded_job
from mpipipe.topology.command import Runner
from mpipipe.topology.slurm import AccountedJob, QueuedJob, ask_job_record, meaning_of_end

__all__ = [
    "RunStatus",
    "check_status",
    "duration",
    "find_runs",
    "job_folders",
    "last_error",
    "log_of",
    "read_status",
]

_LIVE = {RunState.BOOTING.value, RunState.LOADING.value}
_STARTING = {"RUNNING", "CONFIGURING"}
_BUSY = {RunState.GENERATING.value, RunState.STOPPING.value}
# A run that makes tokens writes every few seconds; a shared file system may show it late. One that
# imports and loads says nothing meanwhile, for minutes when the file system is busy.
_STALE_INTERVALS = 6
_STALE_LOADING_S = 900.0
Job = QueuedJob | AccountedJob
_ERROR = "mpipipe: error: "
_LOG_TAIL_BYTES = 1 << 18
_JOB_SUFFIX = re.compile(r"-(\d+(?:_\d+)?)(?:\.\d+)?$")  # .2: the second run of a job


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run: where it is, what it said last; `values` is empty before it said anything."""

    folder: Path
    values: Mapping[str, Any]
    left_out: tuple[str, ...] = ()  # names of values that were of no use

    @property
    def job_id(self) -> str | None:
        """The Slurm job of the run: as it says, or as its folder is named."""
        told = self.values.get("job_id")
        if told is not None:
            return str(told)
        for name in (self.folder.name, self.folder.parent.name):
            if found := _JOB_SUFFIX.search(name):
                return found[1]
        return None


def read_status(folder: Path) -> RunStatus:
    """What the run in `folder` said last.

    Raises:
        OutputError: there is a status file that cannot be read.
    """
    told = read_status_file(folder / STATUS_FILE)
    return RunStatus(folder, {}) if told is None else RunStatus(folder, told.values, told.left_out)


def find_runs(folder: Path) -> list[Path]:
    """The run folders at `folder`: itself, its `outputs`, or those right below it; newest last."""
    for place in (folder, folder / OUTPUT_FOLDER):
        if (place / STATUS_FILE).exists():
            return [place]
    found = [*folder.glob(f"*/{STATUS_FILE}"), *folder.glob(f"*/{OUTPUT_FOLDER}/{STATUS_FILE}")]
    return [path.parent for path in sorted(found, key=_changed_s)]


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # gone since it was listed
        return 0.0


def job_folders(job_id: str, roots: Sequence[Path]) -> list[Path]:
    """The run folders of a job, or of an array's tasks, right below any of `roots`.

    By their names, as the launch scripts give them, or by what their status files say.
    """
    named: dict[Path, None] = {}
    for root in dict.fromkeys(root.resolve() for root in roots):
        for folder in sorted(
            path for end in ("", ".*", "_*") for path in root.glob(f"*-{job_id}{end}")
        ):
            if folder.is_dir():
                named.update(dict.fromkeys(find_runs(folder) or [folder]))
        told_of = [*root.glob(f"*/{STATUS_FILE}"), *root.glob(f"*/{OUTPUT_FOLDER}/{STATUS_FILE}")]
        for path in sorted(told_of):
            told = ""
            with contextlib.suppress(OutputError):  # not a run's, or damaged
                told = read_status(path.parent).job_id or ""
            if told == job_id or told.startswith(f"{job_id}_"):
                named[path.parent] = None
    return list(named)


def log_of(folder: Path, job_id: str | None, jobs: Sequence[Job], run: Runner) -> str | None:
    """The log of a job: as its folder or Slurm tells it, or by the name that submit.sbatch gives.

    Slurm forgets a job some minutes after its end.
    """
    if log := recorded_job(folder).get("StdOut"):
        return log
    if job_id is not None and (log := ask_job_record(job_id, run).get("StdOut")):
        return log
    for job in jobs:
        log_path = Path(job.work_dir) / f"mpipipe-{job.raw_id}.log"
        if job_id in {job.label, job.raw_id} and log_path.is_file():
            return str(log_path)
    return None


def last_error(log: str) -> str | None:
    """The last error that mpipipe printed into a job's log; None: none, or it cannot be read."""
    try:
        with Path(log).open("rb") as file:
            file.seek(-min(_LOG_TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
            lines = file.read().decode("utf-8", "replace").splitlines()
    except (OSError, ValueError):
        return None
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    if not errors:
        return None
    return "".join(letter if letter.isprintable() else " " for letter in errors[-1])


def check_status(
    status: RunStatus,
    queued: Sequence[QueuedJob],
    accounted: Sequence[AccountedJob],
    now: datetime,
) -> str:
    """The state of one run in a few words, as its file and Slurm together tell it."""
    values = status.values
    job = queued[0] if queued else None
    state = values.get("state")
    if job is not None and job.state == "PENDING":
        return _waiting(job, begun=state is not None)
    if state is None:
        return _without_a_word(job, accounted, now)
    if job is not None and _has_begun_again(values, job):
        return f"starting again (the job is {job.state} since {job.start}; before it was {state})"
    if state in _LIVE | _BUSY:
        return _unended(values, job, accounted, now)
    return _ended(status, job)


def _unended(
    values: Mapping[str, Any],
    job: QueuedJob | None,
    accounted: Sequence[AccountedJob],
    now: datetime,
) -> str:
    """Of a run that said nothing of its end."""
    state = values["state"]
    if job is None and accounted and accounted[-1].has_ended:
        return f"ended while {state}{_how_it_ended(None, accounted)}"
    if "updated_at" not in values:
        return f"{state}{_reason(values)}"
    silent_s = (now - datetime.fromisoformat(values["updated_at"])).total_seconds()
    limit_s = _STALE_INTERVALS * float(values.get("update_interval_s", 5.0))
    if silent_s > (limit_s if state in _BUSY else _STALE_LOADING_S):
        return f"{_silent(values, silent_s)}{_how_it_ended(job, accounted)}"
    return f"{state}{_reason(values)}"


def _has_begun_again(values: Mapping[str, Any], job: QueuedJob) -> bool:
    """Whether Slurm has started the job since the run said something last."""
    begun = _begun(job)
    if begun is None or "updated_at" not in values:
        return False
    return datetime.fromisoformat(values["updated_at"]) < begun


def _begun(job: QueuedJob) -> datetime | None:
    try:
        return datetime.fromisoformat(job.start).astimezone()  # the time of the cluster, as ours
    except (ValueError, OverflowError, OSError):  # "N/A"; a year that is none
        return None


def _ended(status: RunStatus, job: QueuedJob | None) -> str:
    values = status.values
    if values["state"] == RunState.FAILED.value:
        return f"failed: {values.get('error', 'see the logs')}"
    if values["state"] == RunState.STOPPED.value:
        if job is not None:
            return f"stopped{_reason(values)}, can go on; the job is still {job.state}"
        return f"stopped{_reason(values)}, can go on: {how_to_go_on(status.folder)}"
    failed = values.get("num_failed", 0)
    return "done" + (f", {failed:,} prompts became error records" if failed else "")


def _waiting(job: QueuedJob, *, begun: bool) -> str:
    start = "" if job.start in {"N/A", ""} else f", expected to start {job.start}"
    return f"queued{' again' if begun else ''} ({job.reason}{start})"


def _without_a_word(job: QueuedJob | None, accounted: Sequence[AccountedJob], now: datetime) -> str:
    if job is not None:
        begun = _begun(job)
        silent_s = 0.0 if begun is None else (now - begun).total_seconds()
        if job.state in _STARTING and silent_s < _STALE_LOADING_S:
            return f"starting (the job is {job.state}; its run has written nothing yet)"
        return (
            f"the job is {job.state} since {job.start}, but no run of it is here: see its log; if "
            "its folder is elsewhere, set MPIPIPE_SCRATCH or give the folder"
        )
    if accounted:
        began = "ended before the run began" if accounted[-1].has_ended else "starting"
        return f"{began}{_how_it_ended(None, accounted)}"
    return "unknown: nothing was written, and no such job is known"


def _silent(values: Mapping[str, Any], silent_s: float) -> str:
    since = values["updated_at"].replace("T", " ")
    return f"no sign of life since {since} ({duration(silent_s)}), when it was {values['state']}"


def _how_it_ended(job: QueuedJob | None, accounted: Sequence[AccountedJob]) -> str:
    if job is not None:
        return f"; the job is {job.state}"
    if accounted:
        last = accounted[-1]
        meaning = meaning_of_end(last.state, last.exit_code)
        told = f"; the job is {last.state}, exit code {last.exit_code} (sacct)"
        return f"{told}: {meaning}" if meaning else told
    return ""


def _reason(values: Mapping[str, Any]) -> str:
    reason = values.get("stop_reason")
    return f" ({reason})" if reason else ""


def duration(seconds: float) -> str:
    """Seconds for people: `40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
