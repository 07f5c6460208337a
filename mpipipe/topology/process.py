"""This process as the kernel keeps it: how long ago it was started.

Reads /proc, below a root folder that tests choose. Linux only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from mpipipe.topology.host import read_text

__all__ = ["process_age_s"]

_ROOT = Path("/")
_START_FIELD = 22 - 3  # of /proc/<pid>/stat, counted from the field behind the name


def process_age_s(
    root: Path = _ROOT,
    *,
    since_boot_s: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
) -> float | None:
    """Seconds since this process was started (not: since its `exec`), to 10 ms; None: not told.

    `since_boot_s` is the clock that the kernel counts from, time of suspension included.
    """
    fields = read_text(root / "proc/self/stat").rpartition(")")[2].split()
    if len(fields) <= _START_FIELD or not fields[_START_FIELD].isdigit():
        return None
    started_s = int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, since_boot_s() - started_s)
