"""A blocking call that is given up keeps no caller waiting."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mpipipe.data_plane.daemon_call import call_in_daemon

_SAFETY_S = 60.0  # after which a test that would hang fails instead


def test_the_outcome_is_what_the_call_returns_or_raises() -> None:
    def fail() -> None:
        raise LookupError("there is none")

    async def session() -> None:
        assert await call_in_daemon(lambda: 7, "seven") == 7
        with pytest.raises(LookupError, match="there is none"):
            await call_in_daemon(fail, "failing")

    asyncio.run(session())


def test_a_call_that_never_returns_keeps_neither_its_caller_nor_the_event_loop() -> None:
    released = threading.Event()
    safety = threading.Timer(_SAFETY_S, released.set)
    safety.start()

    async def session() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await call_in_daemon(released.wait, "blocked")

    asyncio.run(session())
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "blocked")
    assert thread.daemon
    assert not released.is_set()
    safety.cancel()
    released.set()
    thread.join(_SAFETY_S)  # what it returns now has no reader, and disturbs none
    assert not thread.is_alive()
