"""The tensor channel's contract over the loopback, plain and staged, with 1, 2 and 4 ranks."""

from __future__ import annotations

import asyncio

import pytest
import torch

from mpipipe.data_plane.channel import EdgeKind, PendingTransfer
from mpipipe.data_plane.loopback import LoopbackChannel, open_loopback_channels
from mpipipe.data_plane.staged import StagedChannel
from mpipipe.errors import ChannelClosedError, PeerLostError
from mpipipe.progress import ProgressEngine, new_event_loop
from tests.contract.slow_staging import SlowStaging
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


def open_staged(
    world_size: int, engine: ProgressEngine, staging: SlowStaging
) -> list[StagedChannel]:
    channels = [
        StagedChannel(below, engine, staging, world_size=world_size, is_staged=lambda tensor: True)
        for below in open_loopback_channels(world_size)
    ]
    for channel in channels:
        channel.start()
    return channels


async def _on_all_staged_ranks(world_size: int, body: Body) -> None:
    engine = ProgressEngine()
    channels = open_staged(world_size, engine, SlowStaging())
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(engine.run())
        await asyncio.gather(
            *(body(End(channel, rank, world_size)) for rank, channel in enumerate(channels))
        )
        for channel in channels:
            await channel.aclose()
        running.cancel()


@pytest.fixture(params=[1, 2, 4], ids="{} ranks".format)
def world_size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


class TestLoopbackChannel(TensorChannelSuite):
    @pytest.fixture
    def spmd(self, world_size: int) -> Spmd:
        def run(body: Body) -> None:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(_on_all_ranks(world_size, body))

        return run


class TestStagedChannel(TensorChannelSuite):
    @pytest.fixture
    def spmd(self, world_size: int) -> Spmd:
        def run(body: Body) -> None:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(_on_all_staged_ranks(world_size, body))

        return run

    def test_a_sent_tensor_may_be_overwritten_at_once(self, spmd: Spmd) -> None:
        async def body(end: End) -> None:
            tensor, buffers = torch.zeros(50), [torch.zeros(50) for _ in range(20)]
            for number in range(20):
                tensor.fill_(number)
                await end.channel.send(tensor, destination=end.next, kind=EdgeKind.IDS).wait()
            receives = [
                end.channel.receive(buffer, source=end.previous, kind=EdgeKind.IDS)
                for buffer in buffers
            ]
            for number, receive in enumerate(receives):
                await receive.wait()
                assert torch.equal(buffers[number], torch.full((50,), float(number)))

        spmd(body)


def test_host_buffers_are_used_again() -> None:
    staging = SlowStaging()

    async def steps() -> None:
        engine = ProgressEngine()
        sender, receiver = open_staged(2, engine, staging)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            for number in range(50):
                buffer = torch.zeros(number + 1)
                receive = receiver.receive(buffer, source=0, kind=EdgeKind.HIDDEN)
                sender.send(torch.ones(number + 1), destination=1, kind=EdgeKind.HIDDEN)
                await receive.wait()
            running.cancel()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(steps())
    assert staging.num_allocated <= 4


def test_cpu_tensors_pass_a_staged_channel_as_they_are() -> None:
    staging = SlowStaging()

    async def step() -> None:
        below = open_loopback_channels(2)
        engine = ProgressEngine()
        sender, receiver = (StagedChannel(end, engine, staging, world_size=2) for end in below)
        buffer = torch.zeros(3)
        send = sender.send(torch.ones(3), destination=1, kind=EdgeKind.HIDDEN)
        await receiver.receive(buffer, source=0, kind=EdgeKind.HIDDEN).wait()
        await send.wait()
        assert torch.equal(buffer, torch.ones(3))

    asyncio.run(step())
    assert staging.num_allocated == 0


class BrokenChannel(LoopbackChannel):
    """Takes sends and loses them."""

    def send(self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind) -> PendingTransfer:
        transfer = PendingTransfer("send", tensor.nbytes)
        transfer.finish(PeerLostError("rank 1 died"))
        return transfer


def test_a_send_that_fails_after_its_wait_ends_the_engine() -> None:
    async def step() -> None:
        engine = ProgressEngine()
        below = BrokenChannel(0, 2, {})
        channel = StagedChannel(
            below, engine, SlowStaging(), world_size=2, is_staged=lambda tensor: True
        )
        channel.start()
        await channel.send(torch.ones(3), destination=1, kind=EdgeKind.HIDDEN).wait()
        await engine.run()

    with pytest.raises(PeerLostError, match="rank 1 died"):
        asyncio.run(step())


def test_a_receive_in_stream_order_waits_for_the_bytes_only() -> None:
    async def step() -> None:
        engine = ProgressEngine()
        sender, receiver = open_staged(2, engine, SlowStaging())
        buffer = torch.zeros(3)
        receive = receiver.receive(buffer, source=0, kind=EdgeKind.HIDDEN)
        await sender.send(torch.ones(3), destination=1, kind=EdgeKind.HIDDEN).wait()
        engine.poll()
        assert torch.equal(buffer, torch.zeros(3))  # the copy to the host is not done
        for _ in range(5):
            engine.poll()
        await receive.wait()
        assert torch.equal(buffer, torch.ones(3))
        await receiver.aclose()
        with pytest.raises(ChannelClosedError):
            receiver.receive(buffer, source=0, kind=EdgeKind.HIDDEN)

    asyncio.run(step())
