"""Work in threads that was given up and may never end, e.g. on a GPU that waits for a lost rank.

What such work uses is not to be closed, and the process ends without waiting for its threads.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["abandon", "is_abandoned_work_running"]

_checks: list[Callable[[], bool]] = []


def abandon(is_running: Callable[[], bool]) -> None:
    """Note work that was given up; `is_running` tells whether its thread still does it."""
    _checks.append(is_running)


def is_abandoned_work_running() -> bool:
    """Whether a thread of this process still does what is no longer wanted."""
    return any(is_running() for is_running in _checks)
