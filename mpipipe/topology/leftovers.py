"""Shared memory that killed ranks have left on this host: MPICH's segments, 2 MiB each launch.

MPICH removes its file when MPI ends; ranks that are killed leave it until the host restarts.
Invariant: only files of this user, old enough for every rank to have mapped its own, that no
process has mapped.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["remove_leftovers"]

_PATTERN = "mpich_shm_*"
_MIN_AGE_S = 60.0


def remove_leftovers(shared: Path, processes: Path, now_unix_s: float | None = None) -> int:
    """Remove the segments that no process uses; returns how many.

    Args:
        shared: where they are, /dev/shm.
        processes: /proc.
        now_unix_s: the wall clock; None: now.
    """
    now_s = time.time() if now_unix_s is None else now_unix_s
    try:
        old = [path for path in shared.glob(_PATTERN) if _is_old(path.lstat(), now_s)]
        mapped = "\n".join(_maps(processes)) if old else ""
        left = [path for path in old if str(path) not in mapped]
        for path in left:
            path.unlink()
    except OSError:  # another rank was faster: the next start tries again
        return 0
    return len(left)


def _is_old(status: os.stat_result, now_s: float) -> bool:
    age_s = now_s - max(status.st_mtime, status.st_ctime)
    return status.st_uid == os.getuid() and age_s >= _MIN_AGE_S


def _maps(processes: Path) -> Iterator[str]:
    for folder in processes.iterdir():
        if folder.name.isdigit():
            # One that has ended, or that may not be looked at: should it have a segment, it keeps
            # it, as removing takes only the name, which is needed in the first seconds alone.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                yield (folder / "maps").read_text(errors="replace")
