"""Time as a dependency: the real monotonic clock, and a scripted one for tests."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "MonotonicClock", "ScriptedClock"]


class Clock(Protocol):
    """Anything that tells monotonic seconds."""

    def now_s(self) -> float:
        """Seconds since an arbitrary origin; never goes back."""
        ...


class MonotonicClock:
    """`time.perf_counter`: comparable between processes of one host on Linux."""

    def now_s(self) -> float:
        """Seconds since boot, nanosecond resolution."""
        return time.perf_counter()


class ScriptedClock:
    """A clock that moves only when told to; tests own its time."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        """The scripted time in seconds."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move time forward by `seconds`; raises ValueError for a negative step."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back ({seconds} s)")
        self._now_s += seconds
