"""The stream of a CPU: one thread that computes while the event loop goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from mpipipe.clock import ScriptedClock
from mpipipe.progress import ProgressEngine
from mpipipe.stage.cpu_stream import CpuStream

LIMIT_S = 60
T = TypeVar("T")


def computed(
    work: Callable[[], T], *, clock: ScriptedClock | None = None, num_threads: int = 1
) -> tuple[T, float | None]:
    """What `work` returns on a stream, and the stream's `compute_s` behind it."""

    async def session() -> tuple[T, float | None]:
        device = torch.device("cpu")
        stream = CpuStream(device, clock or ScriptedClock(), progress, num_threads=num_threads)
        try:
            async with asyncio.timeout(LIMIT_S):
                return await stream.compute(work), stream.compute_s
        finally:
            stream.close()

    progress = ProgressEngine()
    return asyncio.run(session())


def test_work_is_computed_in_a_thread_with_the_threads_of_the_plan() -> None:
    own = threading.get_ident()
    (ident, num_threads), _ = computed(
        lambda: (threading.get_ident(), torch.get_num_threads()), num_threads=3
    )
    assert ident != own
    assert num_threads == 3


def test_the_thread_takes_its_own_time() -> None:
    clock = ScriptedClock()
    assert computed(lambda: clock.advance(2.5), clock=clock) == (None, 2.5)


def test_an_error_comes_back_to_who_awaits_the_work() -> None:
    def fail() -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        computed(fail)


def test_polling_pauses_while_the_thread_computes_and_the_loop_goes_on() -> None:
    """Spinning would take the core from the thread."""

    async def session() -> None:
        progress, going = ProgressEngine(), threading.Event()
        stream = CpuStream(torch.device("cpu"), ScriptedClock(), progress)
        progress.wake()
        assert progress.next_pause_s() == 0
        computing = asyncio.ensure_future(stream.compute(lambda: going.wait(LIMIT_S)))
        await asyncio.sleep(0)
        assert progress.next_pause_s() > 0
        going.set()
        assert await computing
        assert progress.next_pause_s() == 0
        stream.close()

    asyncio.run(session())
