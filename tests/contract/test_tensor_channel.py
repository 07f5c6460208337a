"""The tensor channel's contract over the loopback, with 1, 2 and 4 virtual ranks."""

from __future__ import annotations

import asyncio

import pytest

from mpipipe.data_plane.loopback import open_loopback_channels
from mpipipe.progress import new_event_loop
from tests.contract.tensor_channel_suite import Body, End, Spmd, TensorChannelSuite

LIMIT_S = 30


async def _on_all_ranks(world_size: int, body: Body) -> None:
    channels = open_loopback_channels(world_size)
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(
            *(body(End(channel, rank, world_size)) for rank, channel in enumerate(channels))
        )
    for channel in channels:
        await channel.aclose()


@pytest.fixture(params=[1, 2, 4], ids="{} ranks".format)
def spmd(request: pytest.FixtureRequest) -> Spmd:
    def run(body: Body) -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_on_all_ranks(request.param, body))

    return run


class TestLoopbackChannel(TensorChannelSuite):
    pass
