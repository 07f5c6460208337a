"""How ranks leave, and which error is told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mpipipe.clock import MonotonicClock
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.errors import ChannelClosedError, MpipipeError, NumericsError
from mpipipe.progress import ProgressEngine
from mpipipe.runtime import ranks as launch
from mpipipe.runtime.ranks import open_ranks


def ended_by(error: Exception) -> tuple[MpipipeError, list[BaseException]]:
    """What comes out when `error` ends a task of the ranks, and what their last words tell."""
    told: list[BaseException] = []

    async def stage() -> None:
        raise error

    async def job() -> None:
        async with open_ranks(MonotonicClock()) as ranks:
            ranks.on_failure.append(told.append)
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


def test_the_others_do_not_wait_for_last_words_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    aborted: list[BaseException] = []

    def two_ranks(_: object, engine: ProgressEngine) -> launch._Opened:
        return launch._Opened(open_memory_channels(2, engine)[0])

    monkeypatch.setattr(launch, "_open_channel", two_ranks)
    monkeypatch.setattr(launch, "_tell_and_abort", lambda _, error, **__: aborted.append(error))
    error = NumericsError("the model produced NaN")

    async def job() -> None:
        async with open_ranks(MonotonicClock()) as ranks:
            ranks.on_failure.append(lambda _: (folder / "status.json").touch())
            raise error

    folder = Path("/no/such/folder")
    with pytest.raises(FileNotFoundError):
        asyncio.run(job())
    assert aborted == [error]
