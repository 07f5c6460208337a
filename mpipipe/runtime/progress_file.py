"""`status.json` in the run folder: what the head is doing, for those who look from elsewhere.

Replaced whole at every change of state and every few seconds while tokens are made. Not here: who
reads it (`cli.status`). Invariant: it never ends a run, not even on a full disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpipipe._version import __version__
from mpipipe.errors import (
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    MpipipeError,
    OutputError,
    PeerLostError,
)
from mpipipe.runtime.output import json_bytes, write_whole
from mpipipe.topology.slurm import read_job

__all__ = [
    "STATUS_FILE",
    "UPDATE_INTERVAL_S",
    "ProgressFile",
    "RunState",
    "fail_for_lost_head",
    "sound_values",
    "tell_end",
]

STATUS_FILE = "status.json"
# Seconds; a few hundred bytes on a shared file system.
UPDATE_INTERVAL_S = 5.0


class RunState(str, enum.Enum):
    """What a run is doing."""

    BOOTING = "booting"  # planning, importing
    LOADING = "loading"
    GENERATING = "generating"
    STOPPING = "stopping"  # told to stop, steps in flight come back
    DONE = "done"  # every prompt has its record
    STOPPED = "stopped"  # it can go on later
    FAILED = "failed"


_LIMIT = 1e15  # of counts and seconds alike


def _is_count(value: object) -> bool:
    return type(value) is int and abs(value) < _LIMIT


def _is_number(value: object) -> bool:
    return _is_count(value) or (isinstance(value, float) and abs(value) < _LIMIT)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _is_state(value: object) -> bool:
    return value in [state.value for state in RunState]


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_CHECKS: dict[str, Callable[[object], bool]] = {
    "state": _is_state,
    "hosts": _is_list_of_texts,
    **dict.fromkeys(("mpipipe", "job_id", "stop_reason", "error"), _is_text),
    **dict.fromkeys(("started_at", "updated_at"), _is_time),
    **dict.fromkeys(("num_restarts", "num_prompts", "num_kept", "num_completed"), _is_count),
    **dict.fromkeys(("num_failed", "num_running", "num_unfinished", "exit_code"), _is_count),
    "num_output_tokens": _is_count,
    **dict.fromkeys(("update_interval_s", "tokens_per_s", "generating_s"), _is_number),
    "stops_in_s": _is_number,
}


def sound_values(document: object) -> Mapping[str, Any]:
    """What a status file says, as far as it can be used: fields of other types are left out.

    So its reader may rely on the types that `ProgressFile` writes, on times that have a zone, and
    on a state that comes with its `updated_at`; numbers are finite. Empty: it is no object.
    """
    if not isinstance(document, dict):
        return {}
    sound = {
        name: value
        for name, value in document.items()
        if name not in _CHECKS or _CHECKS[name](value)  # others are of another version: not read
    }
    if "updated_at" not in sound:
        sound.pop("state", None)
    return sound


_ENDED = {RunState.DONE.value, RunState.STOPPED.value, RunState.FAILED.value}


class ProgressFile:
    """The status of one run.

    Args:
        folder: the run folder; None: this rank is not the head and writes nothing.
        now: the wall clock.
        hosts: of the ranks, in their order.
    """

    def __init__(
        self,
        folder: Path | None,
        hosts: Sequence[str] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._path = None if folder is None else folder / STATUS_FILE
        self._now = now
        job = read_job(os.environ)
        self._values: dict[str, Any] = {
            "state": None,
            "mpipipe": __version__,
            "started_at": _iso(now()),
            "hosts": list(hosts),
            "job_id": job.label if job is not None else None,
            "num_restarts": job.num_restarts if job is not None else 0,
            "update_interval_s": UPDATE_INTERVAL_S,
        }

    def write(self, state: RunState, **values: object) -> None:
        """Tell `state`, and `values` from now on."""
        self._values.update(values)
        self._values.update(state=state.value, updated_at=_iso(self._now()))
        if self._path is None:
            return
        with contextlib.suppress(OutputError):  # not durable: no disk's pace for the loop
            write_whole(self._path, json_bytes(self._values), durable=False)

    def failed(self, error: BaseException) -> None:
        """Tell that `error` has ended the run early; one that has told its end keeps that."""
        if self.state in {RunState.DONE, RunState.STOPPED}:
            return
        if isinstance(error, MpipipeError):
            stopped, text = error.exit_code in {EXIT_REQUEUE, EXIT_INTERRUPTED}, str(error)
        elif isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
            stopped, text = False, "interrupted"
        else:
            stopped, text = False, f"{type(error).__name__}: {error}"
        self.write(RunState.STOPPED if stopped else RunState.FAILED, error=text)

    @property
    def state(self) -> RunState | None:
        """What was told last."""
        value = self._values["state"]
        return None if value is None else RunState(value)


def fail_for_lost_head(folder: Path, error: BaseException) -> None:
    """Tell in the head's place that its loss has ended the run, on the one rank that tells it."""
    if not isinstance(error, PeerLostError) or error.lost != 0 or error.told_by is not None:
        return
    tell_end(folder, RunState.FAILED, str(error))


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def tell_end(folder: Path, state: RunState, error: str) -> None:
    """Tell how the run in `folder` ended, for ranks that cannot any more; an end told stays."""
    path = folder / STATUS_FILE
    with contextlib.suppress(OSError, ValueError, OutputError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("state") not in _ENDED:
            values.update(state=state.value, error=error, updated_at=_iso(datetime.now(UTC)))
            write_whole(path, json_bytes(values), durable=False)
