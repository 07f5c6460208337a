"""The one thread that does a rank's blocking work, while the event loop goes on polling.

Importing torch, loading weights and capturing graphs take from seconds to minutes. The event loop
must hear the other ranks and a signal meanwhile, and MPI may be called from its thread only. One
thread for all phases, as torch keeps the current device, stream and modes per thread.

Work that was given up goes on in its thread until the process ends: the interpreter waits for it at
exit, `os._exit` does not (`launch.leave`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["PhaseThread", "is_abandoned_work_running"]

T = TypeVar("T")

_abandoned: list[Future[Any]] = []


class PhaseThread:
    """Runs one piece of work after another; the thread starts with the first."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "phase")

    def begin(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Start `work`; the future has what it returns or raises. Cancelling gives it up."""
        running = self._executor.submit(work)
        begun: asyncio.Future[T] = asyncio.wrap_future(running)

        def note(ended: asyncio.Future[T]) -> None:
            if ended.cancelled() and not running.done():
                _abandoned.append(running)

        begun.add_done_callback(note)
        return begun

    def close(self) -> None:
        """Take no more work; does not wait for what is running."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def is_abandoned_work_running() -> bool:
    """Whether a thread of this process still does what is no longer wanted."""
    return any(not work.done() for work in _abandoned)
