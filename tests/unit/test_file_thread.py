"""Files are written in order, beside an event loop that never waits for one."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from mpipipe.clock import ScriptedClock
from mpipipe.errors import OutputError
from mpipipe.run_folder.file_thread import FileThread


def test_work_is_done_in_order_while_the_loop_goes_on() -> None:
    done: list[int] = []
    answered = threading.Event()

    def stall() -> None:
        assert answered.wait(20), "the event loop waits for the files"
        done.append(0)

    async def write() -> None:
        files = FileThread()
        files.post(stall)
        for number in range(1, 4):
            files.post(partial(done.append, number))
        assert done == []
        await asyncio.sleep(0)
        answered.set()
        assert await files.run(lambda: list(done)) == [0, 1, 2, 3]
        files.close()

    asyncio.run(write())


def test_the_time_of_all_work_is_counted_also_of_work_that_fails() -> None:
    clock = ScriptedClock()

    def fail() -> None:
        clock.advance(0.5)
        raise OutputError("disk full")

    async def write() -> None:
        files = FileThread(clock)
        files.post(partial(clock.advance, 2.0))
        await files.run(partial(clock.advance, 1.0))
        assert files.busy_s == 3.0
        clock.advance(9.0)  # the thread waits
        with pytest.raises(OutputError):
            await files.run(fail)
        assert files.busy_s == 3.5
        files.close()

    asyncio.run(write())


def test_the_first_error_is_told_to_every_later_caller_and_the_rest_is_still_tried() -> None:
    done: list[str] = []

    def fail(text: str) -> None:
        raise OutputError(text)

    async def write() -> None:
        files = FileThread()
        posted = threading.Event()

        def fail_then() -> None:
            posted.wait(20)
            fail("disk full")

        files.post(fail_then)
        files.post(lambda: done.append("after"))
        posted.set()
        with pytest.raises(OutputError, match="disk full"):
            await files.run(lambda: done.append("awaited"))
        assert done == ["after", "awaited"]
        with pytest.raises(OutputError, match="disk full"):
            files.post(lambda: done.append("never"))
        with pytest.raises(OutputError, match="its own"):
            await files.run(lambda: fail("its own"))
        assert done == ["after", "awaited"]
        files.close()

    asyncio.run(write())
