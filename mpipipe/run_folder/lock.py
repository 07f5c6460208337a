"""One writer in a run folder: two would mix their completions, or replace each other's.

A lock of the kernel, which ends with its process however that ends. File systems without locks
(Lustre, as many sites mount it) are left with a look at `status.json`. Invariant: an earlier
attempt of the same Slurm job is never in the way. Slurm has ended it, or has lost its node: then a
file server may keep the lock for a minute longer, and a node that is cut off from Slurm alone may
write a prompt a second time, of which `journal.merge` takes the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mpipipe.errors import OutputError
from mpipipe.run_folder.status_file import STATUS_FILE, RunState, read_status_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from mpipipe.topology.slurm import SlurmJob

__all__ = ["FolderLock", "last_status", "lock_file", "lock_folder"]

_LOCK_FILE = ".lock"
_BUSY = {RunState.GENERATING.value, RunState.STOPPING.value}
_FRESH_S = 30.0  # a run that generates writes every 5 s; a shared file system may show it late


class FolderLock:
    """A lock that is held until `close`, or by the process until it ends."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self._path = path
        self._descriptor = descriptor  # None: nothing is locked

    def tell(self, holder: str) -> None:
        """Write into the file who holds it, for those who find it locked."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, holder.encode(), 0)

    def close(self) -> None:
        """Let others in; the file may stay behind where the file system is lost."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                os.close(descriptor)


def lock_folder(
    folder: Path,
    job: SlurmJob | None,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    take: Callable[[int, int], object] = fcntl.flock,
) -> FolderLock:
    """Keep other runs out of `folder`, which is made where it is missing.

    A folder that cannot be written is not locked: `prepare_run_folder` says why.

    Raises:
        OutputError: another run is writing there.
    """
    lock, held = lock_file(folder / _LOCK_FILE, take=take)
    if not held:
        values = last_status(folder)
        if not _is_ended_attempt(values, job) and (held is False or _is_fresh(values, now())):
            raise _occupied(folder, values)
    return lock


def lock_file(
    path: Path, *, take: Callable[[int, int], object] = fcntl.flock
) -> tuple[FolderLock, bool | None]:
    """A lock on `path`, which is made where it is missing, and whether it was to be had.

    False: another process holds it. None: this file system has no locks. Where no file can be
    made, nothing is locked, and it counts as had.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return FolderLock(path, None), True
        held = _take(descriptor, take)
        if held and _is_at(path, descriptor):
            return FolderLock(path, descriptor), True
        os.close(descriptor)
        if not held:
            return FolderLock(path, None), held
        # Its holder has removed it meanwhile: another may lock the next.


def last_status(folder: Path) -> Mapping[str, Any]:
    """What the run in `folder` told last (`status_file`); empty: nothing that can be read."""
    with contextlib.suppress(OutputError):
        told = read_status_file(folder / STATUS_FILE)
        return {} if told is None else told.values
    return {}


def _take(descriptor: int, take: Callable[[int, int], object]) -> bool | None:
    """Whether the lock is ours; None: this file system has none."""
    try:
        take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_ended_attempt(values: Mapping[str, Any], job: SlurmJob | None) -> bool:
    return (
        job is not None
        and values.get("job_id") == job.label
        and values.get("num_restarts", 0) < job.num_restarts
    )


def _is_fresh(values: Mapping[str, Any], now: datetime) -> bool:
    if values.get("state") not in _BUSY or "updated_at" not in values:
        return False
    return (now - datetime.fromisoformat(values["updated_at"])).total_seconds() < _FRESH_S


def _occupied(folder: Path, values: Mapping[str, Any]) -> OutputError:
    of_job = f" of job {values['job_id']}" if values.get("job_id") else ""
    return OutputError(
        f"another run{of_job} is writing to output.dir = {folder}, and two would mix their "
        "completions: choose another folder, or wait until it has ended (`mpipipe status` shows "
        f"it; one that was killed is forgotten after {_FRESH_S:g} s)"
    )
