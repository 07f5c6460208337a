"""A mailbox wakes its reader, and loses nothing."""

from __future__ import annotations

import asyncio

import pytest

from mpipipe.control_plane.mailbox import Mailbox
from mpipipe.errors import ChannelClosedError


def test_a_cancelled_get_loses_nothing() -> None:
    async def main() -> None:
        mailbox: Mailbox[str] = Mailbox("test")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await mailbox.get()
        mailbox.put("first")
        mailbox.put("second")
        assert await mailbox.get() == "first"
        assert mailbox.get_nowait() == "second"
        assert mailbox.get_nowait() is None

    asyncio.run(main())


def test_closing_wakes_the_reader_after_the_items_that_are_left() -> None:
    async def main() -> None:
        mailbox: Mailbox[str] = Mailbox("the mailbox of tests")

        async def read() -> None:
            assert await mailbox.get() == "last"
            with pytest.raises(ChannelClosedError, match="the mailbox of tests was read after"):
                await mailbox.get()

        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            await asyncio.sleep(0)  # the reader waits
            mailbox.put("last")
            await asyncio.sleep(0)
            mailbox.close()
        mailbox.put("late")  # dropped
        with pytest.raises(ChannelClosedError):
            mailbox.get_nowait()

    asyncio.run(main())
