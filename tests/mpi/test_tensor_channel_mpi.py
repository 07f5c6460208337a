"""The tensor channel's contract over MPI, plain and staged, on however many ranks there are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from mpi4py import MPI

from mpipipe.data_plane.channel import EdgeKind, TensorChannel
from mpipipe.data_plane.mpi import open_mpi_channel
from mpipipe.data_plane.staged import StagedChannel
from mpipipe.progress import ProgressEngine, new_event_loop
from tests.contract.slow_staging import SlowStaging
from tests.contract.tensor_channel_suite import Body, End, Spmd, TensorChannelSuite

LIMIT_S = 40


def open_staged_channel(engine: ProgressEngine) -> StagedChannel:
    """What GPUs use, over a device that is the CPU."""
    below = open_mpi_channel(engine)
    channel = StagedChannel(
        below,
        engine,
        SlowStaging(),
        world_size=below.world_size,
        is_staged=lambda tensor: True,
    )
    channel.start()
    return channel


async def _with_channel(
    body: Body, open_channel: Callable[[ProgressEngine], TensorChannel]
) -> None:
    engine = ProgressEngine()
    engine.share_cores(num_ranks=2, num_cores=1)
    channel = open_channel(engine)
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(engine.run())
        await body(End(channel, MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()))
        await channel.aclose()
        running.cancel()


@pytest.fixture(params=[open_mpi_channel, open_staged_channel], ids=["mpi", "staged"])
def spmd(request: pytest.FixtureRequest) -> Spmd:
    def run(body: Body) -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_with_channel(body, request.param))

    return run


class TestMpiTensorChannel(TensorChannelSuite):
    def test_a_tensor_of_more_than_2_gib_is_refused(self, spmd: Spmd) -> None:
        async def body(end: End) -> None:
            if end.world_size == 1:
                return
            huge = torch.empty(2**31, dtype=torch.uint8)  # never touched, so never backed by memory
            with pytest.raises(ValueError, match="2147483648 bytes are more than"):
                end.channel.send(huge, destination=end.next, kind=EdgeKind.HIDDEN)

        spmd(body)

    def test_closing_finishes_what_was_sent(self, spmd: Spmd) -> None:
        async def body(end: End) -> None:
            buffer = torch.zeros(1_000_000)
            receive = end.channel.receive(buffer, source=end.previous, kind=EdgeKind.HIDDEN)
            send = end.channel.send(
                torch.ones(1_000_000), destination=end.next, kind=EdgeKind.HIDDEN
            )
            if end.rank == 0:
                await receive.wait()
                await end.channel.aclose()  # with its own send perhaps under way
            else:
                await receive.wait()
            await send.wait()
            assert torch.equal(buffer, torch.ones(1_000_000))

        spmd(body)
