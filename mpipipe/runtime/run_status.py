"""How a run stands, seen from outside: its `status.json`, and what Slurm says of its job.

For `mpipipe status`, on a login node: neither torch nor MPI. Finding a run and judging it are here;
printing is not (`cli.status`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mpipipe.errors import OutputError
from mpipipe.runtime.folder_lock import last_words
from mpipipe.runtime.progress_file import STATUS_FILE, RunState
from mpipipe.runtime.workspace import OUTPUT_FOLDER, how_to_go_on
from mpipipe.topology.slurm import AccountedJob, QueuedJob

__all__ = ["RunStatus", "duration", "find_runs", "job_folders", "judge", "read_status"]

_LIVE = {RunState.BOOTING.value, RunState.LOADING.value}
_BUSY = {RunState.GENERATING.value, RunState.STOPPING.value}
# A run that makes tokens writes every few seconds; a shared file system may show it late. One that
# imports and loads says nothing meanwhile, for minutes when the file system is busy.
_STALE_INTERVALS = 6
_STALE_LOADING_S = 900.0
_JOB_SUFFIX = re.compile(r"-(\d+(?:_\d+)?)(?:\.\d+)?$")  # .2: the second run of a job


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run: where it is, what it said last; `values` is empty before it said anything."""

    folder: Path
    values: Mapping[str, Any]

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
    path = folder / STATUS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return RunStatus(folder, {})
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} cannot be read ({error}): it is replaced every few seconds, so try again; see "
            "the rank_*.log files beside it"
        ) from error
    return RunStatus(folder, values if isinstance(values, dict) else {})


def find_runs(folder: Path) -> list[Path]:
    """The run folders at `folder`: itself, its `outputs`, or those right below it; newest last."""
    for place in (folder, folder / OUTPUT_FOLDER):
        if (place / STATUS_FILE).exists():
            return [place]
    found = [*folder.glob(f"*/{STATUS_FILE}"), *folder.glob(f"*/{OUTPUT_FOLDER}/{STATUS_FILE}")]
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)]


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
            told = RunStatus(path.parent, last_words(path.parent)).job_id or ""
            if told == job_id or told.startswith(f"{job_id}_"):
                named[path.parent] = None
    return list(named)


def judge(
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
        return _without_a_word(job, accounted)
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
    silent_s = (now - datetime.fromisoformat(values["updated_at"])).total_seconds()
    limit_s = _STALE_INTERVALS * float(values.get("update_interval_s", 5.0))
    if silent_s > (limit_s if state in _BUSY else _STALE_LOADING_S):
        return f"{_silent(values, silent_s)}{_how_it_ended(job, accounted)}"
    return f"{state}{_reason(values)}"


def _has_begun_again(values: Mapping[str, Any], job: QueuedJob) -> bool:
    """Whether Slurm has started the job since the run said something last."""
    try:
        begun = datetime.fromisoformat(job.start).astimezone()  # the time of the cluster, as ours
    except ValueError:  # "N/A"
        return False
    return datetime.fromisoformat(values["updated_at"]) < begun


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


def _without_a_word(job: QueuedJob | None, accounted: Sequence[AccountedJob]) -> str:
    if job is not None:
        return f"the job is {job.state}; no run of it is here: not begun, or in another folder"
    if accounted:
        return f"ended before the run began{_how_it_ended(None, accounted)}"
    return "unknown: nothing was written, and no such job is known"


def _silent(values: Mapping[str, Any], silent_s: float) -> str:
    since = values["updated_at"].replace("T", " ")
    return f"no sign of life since {since} ({duration(silent_s)}), when it was {values['state']}"


def _how_it_ended(job: QueuedJob | None, accounted: Sequence[AccountedJob]) -> str:
    if job is not None:
        return f"; the job is {job.state}"
    if accounted:
        last = accounted[-1]
        return f"; the job is {last.state}, exit code {last.exit_code} (sacct)"
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
