"""`status.json` in the run folder: what the head is doing, for whoever looks from elsewhere.

Replaced whole at every change of state and every few seconds while tokens are made. Not here: who
reads it (`cli.status`). Invariant: it never ends a run, not even on a full disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpipipe._version import __version__
from mpipipe.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, MpipipeError, OutputError
from mpipipe.runtime.output import write_whole
from mpipipe.topology.slurm import read_job

__all__ = ["STATUS_FILE", "UPDATE_INTERVAL_S", "ProgressFile", "RunState", "tell_end"]

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
        text = json.dumps(self._values, indent=2, ensure_ascii=False) + "\n"
        with contextlib.suppress(OutputError):
            write_whole(self._path, text.encode(), durable=False)  # no disk's pace for the loop

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


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def tell_end(folder: Path, state: RunState, error: str) -> None:
    """Tell how the run in `folder` ended, for ranks that cannot any more; an end told stays."""
    path = folder / STATUS_FILE
    with contextlib.suppress(OSError, ValueError, OutputError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("state") not in _ENDED:
            values.update(state=state.value, error=error, updated_at=_iso(datetime.now(UTC)))
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            write_whole(path, text.encode(), durable=False)
