"""How ranks leave, and which error is told."""

from __future__ import annotations

import asyncio

import pytest

from mpipipe.clock import MonotonicClock
from mpipipe.errors import ChannelClosedError, MpipipeError, NumericsError
from mpipipe.runtime.launch import open_ranks


def ended_by(error: Exception) -> tuple[MpipipeError, list[BaseException]]:
    """What comes out when `error` ends a task of the ranks, and what their last words tell."""
    told: list[BaseException] = []

    async def stage() -> None:
        raise error

    async def job() -> None:
        async with open_ranks(MonotonicClock()) as ranks:
            ranks.last_words.append(told.append)
            ranks.tasks.create_task(stage())
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:  # as a mailbox says when its mesh is closed
                raise ChannelClosedError("the mailbox was read after it was closed") from None

    with pytest.raises(MpipipeError) as raised:
        asyncio.run(job())
    return raised.value, told


def test_the_first_error_is_told_and_not_what_followed_from_it() -> None:
    error = NumericsError("the model produced NaN")
    raised, told = ended_by(error)
    assert told == [error]
    assert raised is error
