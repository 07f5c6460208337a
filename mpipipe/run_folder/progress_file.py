"""`status.json` in the run folder: what the head is doing, for those who look from elsewhere.

Replaced whole at every change of state and every few seconds while tokens are made. `status_values`
reads it. Invariant: it never ends a run, not even on a full disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import os
import threading
from collections.abc import Callable, Sequence
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
from mpipipe.run_folder.files import json_bytes, write_whole
from mpipipe.topology.slurm import read_job

__all__ = [
    "STATUS_FILE",
    "UPDATE_INTERVAL_S",
    "ProgressFile",
    "RunState",
    "fail_for_lost_head",
    "tell_end",
]

STATUS_FILE = "status.json"
# Seconds; a few hundred bytes on a shared file system.
UPDATE_INTERVAL_S = 5.0
_PATIENCE_S = 2.0  # the end of a run waits no longer for a file system that does not answer


class RunState(str, enum.Enum):
    """What a run is doing."""

    BOOTING = "booting"  # planning, importing
    LOADING = "loading"
    GENERATING = "generating"
    STOPPING = "stopping"  # told to stop, steps in flight come back
    DONE = "done"  # every prompt has its record
    STOPPED = "stopped"  # it can go on later
    FAILED = "failed"


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
        self._lock = threading.Lock()

    def write(self, state: RunState, **values: object) -> None:
        """Tell `state`, and `values` from now on; from any thread. What comes after an end is late.

        It gives up where an earlier one still waits for a file system that does not answer.
        """
        if not self._lock.acquire(timeout=_PATIENCE_S):
            return
        try:
            if self._values["state"] in _ENDED:
                return
            self._values.update(values)
            self._values.update(state=state.value, updated_at=_iso(self._now()))
            if self._path is not None:
                with contextlib.suppress(OutputError):  # not durable: no disk's pace
                    write_whole(self._path, json_bytes(self._values), durable=False)
        finally:
            self._lock.release()

    def failed(self, error: BaseException) -> None:
        """Tell that `error` has ended the run early; one that has told its end keeps that."""
        if isinstance(error, MpipipeError):
            stopped, text = error.exit_code in {EXIT_REQUEUE, EXIT_INTERRUPTED}, str(error)
        elif isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
            stopped, text = False, "interrupted"
        else:
            stopped, text = False, f"{type(error).__name__}: {error}"
        self.write(RunState.STOPPED if stopped else RunState.FAILED, error=text)


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
    with contextlib.suppress(OSError, ValueError, RecursionError, OutputError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and str(values.get("state")) not in _ENDED:
            values.update(state=state.value, error=error, updated_at=_iso(datetime.now(UTC)))
            write_whole(path, json_bytes(values), durable=False)
