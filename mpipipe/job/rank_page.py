"""What a rank lets its supervisor know: a page of memory that both have, written without a call.

Not here: what the supervisor makes of it (`runtime.supervisor`).
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
from pathlib import Path

__all__ = ["RankPage", "RankPhase", "open_rank_page"]

_MAX_PATH_BYTES = 4096


class RankPhase(enum.IntEnum):
    """How far a rank is."""

    BOOTING = 0  # nothing is lost when it is killed
    RUNNING = 1
    ENDED = 2  # its exit code is decided


class RankPage(ctypes.Structure):
    """The page; made by `open_rank_page`. Assigning a field tells it."""

    # -1: not known yet. Steps count from 0; the limit is in seconds.
    stage: int
    step: int
    phase: int
    exit_code: int
    silence_limit_s: float
    folder: bytes

    _fields_ = (
        ("stage", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("phase", ctypes.c_int64),
        ("exit_code", ctypes.c_int64),
        ("silence_limit_s", ctypes.c_double),
        ("folder", ctypes.c_char * _MAX_PATH_BYTES),
    )

    def opened(self, folder: Path, stage: int) -> None:
        """This rank computes `stage`, and the run folder is known."""
        path = os.fsencode(folder)
        self.folder = path if len(path) < _MAX_PATH_BYTES else b""
        self.stage = stage

    def ended(self, exit_code: int) -> None:
        """The exit code is decided."""
        self.exit_code = exit_code
        self.phase = RankPhase.ENDED

    @property
    def run_folder(self) -> Path | None:
        """The run folder; None: not known yet."""
        return Path(os.fsdecode(self.folder)) if self.folder else None


def open_rank_page() -> RankPage:
    """A page that this process and those that it forks share."""
    page = RankPage.from_buffer(mmap.mmap(-1, ctypes.sizeof(RankPage)))
    page.stage = page.step = -1
    page.silence_limit_s = 10.0
    return page
