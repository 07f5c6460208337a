"""`status.json` in the run folder: what the head is doing, written for others, and read again.

Replaced whole at every change of state and every few seconds while tokens are made. Invariant:
writing it never ends a run, not even on a full disk.

Read as from a stranger: any bytes give values of the right types. The file lies on a shared file
system for all to see: a torn, exchanged or hand-made one must not end `mpipipe status`, or a run
that checks who is in its folder, in a traceback. What is missing or of another type is left out,
and named.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpipipe._version import __version__
from mpipipe.errors import (
    MpipipeError,
    OutputError,
    PeerLostError,
    is_stop,
)
from mpipipe.run_folder.files import json_bytes, write_whole
from mpipipe.topology.slurm import read_job

__all__ = [
    "STATUS_FILE",
    "UPDATE_INTERVAL_S",
    "ProgressFile",
    "RunState",
    "StatusValues",
    "fail_for_lost_head",
    "parse_status",
    "read_status_file",
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
            text = str(error)
        elif isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
            text = "interrupted"
        else:
            text = f"{type(error).__name__}: {error}"
        self.write(RunState.STOPPED if is_stop(error) else RunState.FAILED, error=text)


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


_MAX_BYTES = 1 << 20  # a thousand hosts are some 20 KiB
_MAX_COUNT = 1e15
_MAX_TEXT = 4000
_MAX_HOSTS = 100_000


@dataclass(frozen=True, slots=True)
class StatusValues:
    """Checked values by name, and the names of those that were left out."""

    values: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def read_status_file(path: Path) -> StatusValues | None:
    """The checked values of a status file; None: there is none.

    Raises:
        OutputError: it cannot be read, or is no JSON object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        return parse_status(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} cannot be read ({error}): a run replaces it every few seconds, so try again; "
            "else see the rank_*.log files beside it"
        ) from error


def parse_status(content: bytes) -> StatusValues:
    """The checked values of what a status file holds.

    Raises:
        ValueError: it is no JSON object, or much too large.
    """
    if len(content) > _MAX_BYTES:
        raise ValueError("it is larger than 1 MiB")
    try:
        document = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    if not isinstance(document, dict):
        text = f"a JSON object was expected, not {type(document).__name__}"
        raise ValueError(text)  # noqa: TRY004 - of the file's content, as for the other faults
    values: dict[str, Any] = {}
    left_out: list[str] = []
    for name, told in document.items():
        if told is not None and (name in _CHECKS or name.isidentifier()):
            if (value := _CHECKS.get(name, _scalar)(told)) is not None:
                values[name] = value
            elif name in _CHECKS:
                left_out.append(name)
    return StatusValues(values, tuple(left_out))


def _text(value: object) -> str | None:
    """A text that a terminal can show."""
    if not isinstance(value, str):
        return None
    valid = value[:_MAX_TEXT].encode("utf-8", "replace").decode("utf-8")
    return "".join(letter if letter.isprintable() else " " for letter in valid)


def _state(value: object) -> str | None:
    known = {state.value for state in RunState}
    return value if isinstance(value, str) and value in known else None


def _count(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value <= _MAX_COUNT else None  # type: ignore[operator,return-value]


def _number(value: object) -> float | None:
    """Seconds or a rate."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= _MAX_COUNT and math.isfinite(value) else None


def _time(value: object) -> str | None:
    """A point in time with its zone, as ISO 8601, that can be compared with others."""
    try:
        then = datetime.fromisoformat(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return then.isoformat() if then.tzinfo is not None and 1970 < then.year < 9000 else None


def _job(value: object) -> str | None:
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    return _text(str(number) if number is not None and 0 <= number <= _MAX_COUNT else value)


def _scalar(value: object) -> str | float | None:
    """Of a name that is not known here: another version's."""
    return value if isinstance(value, bool) else _text(value) or _count(value) or _number(value)


def _hosts(value: object) -> list[str] | None:
    if not isinstance(value, list) or len(value) > _MAX_HOSTS:
        return None
    names = [name for host in value if (name := _text(host)) is not None]
    return names if len(names) == len(value) else None


# What ProgressFile writes.
_CHECKS: Mapping[str, Callable[[object], Any]] = {
    "state": _state,
    "mpipipe": _text,
    "started_at": _time,
    "updated_at": _time,
    "update_interval_s": _number,
    "hosts": _hosts,
    "job_id": _job,
    "num_restarts": _count,
    "num_prompts": _count,
    "num_kept": _count,
    "num_completed": _count,
    "num_failed": _count,
    "num_running": _count,
    "num_replicas": _count,
    "num_unfinished": _count,
    "num_output_tokens": _count,
    "num_shared_tokens": _count,
    "num_drafted": _count,
    "num_accepted": _count,
    "tokens_per_s": _number,
    "generating_s": _number,
    "stops_in_s": _number,
    "stop_reason": _text,
    "error": _text,
    "exit_code": _count,
}
