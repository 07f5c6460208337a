"""A blocking call in a daemon thread, which the end of the process does not wait for.

`asyncio.to_thread` cannot be given up: a timeout ends the wait, but the thread goes on, and the end
of the event loop joins it without limit. NCCL blocks for minutes on an interface that leads
nowhere; a caller that gives it up must be able to report that and end. `nccl_groups` uses it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["call_in_daemon"]

_T = TypeVar("_T")


async def call_in_daemon(call: Callable[[], _T], name: str) -> _T:
    """What `call` returns or raises, from a daemon thread called `name`.

    Cancelled, this returns at once; the thread goes on until the call or the process ends.
    """
    outcome: Future[_T] = Future()
    outcome.set_running_or_notify_cancel()  # a cancelled wait leaves the outcome to the thread

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            outcome.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await asyncio.wrap_future(outcome)
