"""`status.json` in the run folder: what the head is doing, for whoever looks from elsewhere.

Replaced whole at every change of state and every few seconds while tokens are made. Not here: who
reads it (`cli.status`). Invariant: it never ends a run, not even on a full disk.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpipipe._version import __version__
from mpipipe.errors import EXIT_REQUEUE, MpipipeError, OutputError
from mpipipe.runtime.output import write_whole
from mpipipe.topology.slurm import read_job

__all__ = ["STATUS_FILE", "UPDATE_INTERVAL_S", "ProgressFile", "RunState", "told_at_the_end"]

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

    @property
    def state(self) -> RunState | None:
        """What was told last."""
        value = self._values["state"]
        return None if value is None else RunState(value)


@contextmanager
def told_at_the_end(progress: ProgressFile) -> Iterator[ProgressFile]:
    """What ends the block early is told in the file, and goes on its way."""
    try:
        yield progress
    except BaseException as raised:
        error = _cause(raised)
        stopped = isinstance(error, MpipipeError) and error.exit_code == EXIT_REQUEUE
        text = str(error) if isinstance(error, MpipipeError) else f"{type(error).__name__}: {error}"
        progress.write(RunState.STOPPED if stopped else RunState.FAILED, error=text)
        raise


def _cause(raised: BaseException) -> BaseException:
    """The user's error inside the group of a task group, or inside `AgreedError`."""
    while isinstance(raised, BaseExceptionGroup):
        raised = raised.exceptions[0]
    inner = getattr(raised, "error", None)
    return inner if isinstance(inner, MpipipeError) else raised


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
