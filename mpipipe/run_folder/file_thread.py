"""Files that are written beside the event loop, in order.

A shared file system may keep a write waiting for many seconds. The event loop must go on meanwhile:
the other ranks take a silent head for a lost one. Work that was posted is done one after another,
so a file has what was posted before; an error is raised to the next that posts or awaits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mpipipe.clock import Clock, MonotonicClock

__all__ = ["FileThread"]

T = TypeVar("T")


class FileThread:
    """Does one piece of work after another; the thread starts with the first."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._busy_s = 0.0
        self._executor = ThreadPoolExecutor(1, "files")
        self._error: Exception | None = None

    @property
    def busy_s(self) -> float:
        """Seconds that the work done so far has taken."""
        return self._busy_s

    def post(self, work: Callable[[], object]) -> None:
        """Do `work` after what was posted so far; returns at once.

        Raises:
            Exception: what earlier work raised.
        """
        self._raise()
        self._executor.submit(self._do, work)

    async def run(self, work: Callable[[], T]) -> T:
        """Do `work` after what was posted so far, whether or not that failed, and await it.

        Raises:
            Exception: what `work`, or before it work that was posted, raised.
        """
        result = await asyncio.wrap_future(self._executor.submit(lambda: self._timed(work)))
        self._raise()
        return result

    def close(self) -> None:
        """Take no more work; does not wait for what is under way."""
        self._executor.shutdown(wait=False)

    def _timed(self, work: Callable[[], T]) -> T:
        began_s = self._clock.now_s()
        try:
            return work()
        finally:
            self._busy_s += self._clock.now_s() - began_s

    def _do(self, work: Callable[[], object]) -> None:
        try:
            self._timed(work)
        except Exception as error:  # noqa: BLE001 - handed on to the thread that posts
            self._error = self._error or error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
