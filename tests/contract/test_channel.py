"""The control channel's contract over memory, with 1, 2 and 4 virtual ranks."""

from __future__ import annotations

import asyncio

import pytest

from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.progress import ProgressEngine, new_event_loop
from tests.contract.channel_suite import Body, ChannelSuite, Spmd

LIMIT_S = 30


async def _on_all_ranks(world_size: int, body: Body) -> None:
    engine = ProgressEngine()
    channels = open_memory_channels(world_size, engine)
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(engine.run())
        await asyncio.gather(*map(body, channels))
        for channel in channels:
            await channel.aclose()
        running.cancel()


@pytest.fixture(params=[1, 2, 4], ids="{} ranks".format)
def spmd(request: pytest.FixtureRequest) -> Spmd:
    def run(body: Body) -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_on_all_ranks(request.param, body))

    return run


class TestMemoryChannel(ChannelSuite):
    def test_abort_leaves_the_process_with_the_code_and_closes_all_ranks(self) -> None:
        channels = open_memory_channels(2, ProgressEngine())
        with pytest.raises(SystemExit) as left:
            channels[1].abort(6)
        assert left.value.code == 6
        with pytest.raises(Exception, match="after closing"):
            channels[0].send_nowait(1, b"late")
