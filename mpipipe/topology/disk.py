"""How fast the disk of a folder reads, past the page cache; measured once an hour and host.

A short file is written to the folder, without a name, and read back with `O_DIRECT`, or, where a
file system has none, after this host was told to forget it. A disk with a fast cache of its own may
show that: the file is small. The ranks of a host measure one after the other, and all but the first
take its figure, so that the figure is that of one reader alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import socket
import tempfile
import time
from pathlib import Path

__all__ = ["disk_bytes_per_s", "measure_disk"]

_BLOCK_BYTES = 8 << 20  # that offloaded weights are read by
_NUM_BLOCKS = 8
_LIMIT_S = 0.6  # of writing, and of reading
_VALID_S = 3600.0


def disk_bytes_per_s(folder: str, *, kept: Path | None = None) -> int:
    """What the disk of `folder` reads, in two digits; 0: there is no such folder, or no room.

    Takes about a second at most, and little where it was measured within the last hour.

    Args:
        folder: absolute; "": none.
        kept: where figures are kept; None: a private file among this host's temporary ones.
    """
    if not folder:
        return 0
    try:
        device = str(os.stat(folder).st_dev)
        file = _open_private(
            kept
            or Path(tempfile.gettempdir()) / f"mpipipe-disks-{os.getuid()}-{socket.gethostname()}"
        )
    except OSError:
        return 0
    try:  # around the file, too: what is left to write is written when it is closed
        with os.fdopen(file, "r+", encoding="ascii", errors="replace") as figures:
            fcntl.flock(figures, fcntl.LOCK_EX)  # until it is closed
            known = _read(figures.read())
            measured_s, rate = known.get(device, (-_VALID_S, 0))
            if not 0 <= time.time() - measured_s < _VALID_S:
                rate = _rounded(measure_disk(Path(folder)))
                known[device] = (time.time(), rate)
                figures.seek(0)
                figures.truncate()
                json.dump(known, figures)
    except OSError:
        return 0
    return rate


def measure_disk(folder: Path) -> float:
    """Bytes per second that a new file in `folder` is read with.

    Raises:
        OSError: none can be written there.
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        block, began_s = os.urandom(_BLOCK_BYTES), time.perf_counter()
        num_blocks = 0
        while num_blocks < _NUM_BLOCKS and (
            not num_blocks or time.perf_counter() - began_s < _LIMIT_S
        ):
            file.write(block)
            os.fsync(file.fileno())
            num_blocks += 1
        return _read_back(file.fileno(), num_blocks)


def _read_back(descriptor: int, num_blocks: int) -> float:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):  # a file system that has no such reads
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    num_bytes, number, began_s = 0, 0, time.perf_counter()
    with mmap.mmap(-1, _BLOCK_BYTES) as block:  # whole pages, as `O_DIRECT` asks for
        while number < num_blocks and (not number or time.perf_counter() - began_s < _LIMIT_S):
            num_bytes += os.preadv(descriptor, [block], number * _BLOCK_BYTES)
            number += 1
    return num_bytes / max(time.perf_counter() - began_s, 1e-9)


def _open_private(path: Path) -> int:
    """A descriptor of a file that only this user reads and writes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    if os.fstat(descriptor).st_uid != os.getuid():
        os.close(descriptor)
        raise PermissionError(f"{path} is another user's")
    return descriptor


def _read(text: str) -> dict[str, tuple[float, int]]:
    """By device: when it was measured, and the figure; what is broken is measured again."""
    try:
        stated = json.loads(text or "{}")
        return {str(device): (float(at_s), int(rate)) for device, (at_s, rate) in stated.items()}
    except (ValueError, TypeError, AttributeError, OverflowError):
        return {}


def _rounded(rate: float) -> int:
    """Two digits: a plan is no other one for what no measurement repeats."""
    return int(float(f"{rate:.2g}"))
