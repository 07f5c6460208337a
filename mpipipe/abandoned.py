"""Work in threads that was given up and may never end, e.g. on a GPU that waits for a lost rank.

What such work uses is not to be closed, and the process ends without waiting for its threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["abandon", "ends_within", "is_abandoned_work_running"]

_checks: list[Callable[[], bool]] = []


def abandon(is_running: Callable[[], bool]) -> None:
    """Note work that was given up; `is_running` tells whether its thread still does it."""
    _checks.append(is_running)


def ends_within(limit_s: float, work: Callable[[], None], name: str) -> bool:
    """Do `work` in a thread called `name`; False: it goes on after `limit_s`, and is given up."""
    ending = threading.Thread(target=work, name=name, daemon=True)
    ending.start()
    ending.join(limit_s)
    if ending.is_alive():
        abandon(ending.is_alive)
        return False
    return True


def is_abandoned_work_running() -> bool:
    """Whether a thread of this process still does what is no longer wanted."""
    return any(is_running() for is_running in _checks)
