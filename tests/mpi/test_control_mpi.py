"""The control channel's contract, the mesh and its probe over MPI, on any number of ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from mpi4py import MPI

from mpipipe.clock import MonotonicClock
from mpipipe.control_plane.mesh import Mesh
from mpipipe.control_plane.messages import Hello, StepSampled
from mpipipe.control_plane.mpi import MpiChannel, open_mpi_control_channel
from mpipipe.control_plane.probe import format_probe, probe_control_plane
from mpipipe.errors import (
    CheckpointError,
    DeadlineError,
    EnvironmentSetupError,
    ProtocolMismatchError,
    RemoteError,
)
from mpipipe.planning.resources import RankResources
from mpipipe.progress import ProgressEngine, new_event_loop
from tests.contract.channel_suite import Body, ChannelSuite, Spmd, next_frame

LIMIT_S = 40
SOON_S = 20.0


async def _with_channel(body: Body) -> None:
    engine = ProgressEngine()
    engine.share_cores(num_ranks=2, num_cores=1)
    channel = open_mpi_control_channel(engine)
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(engine.run())
        await body(channel)
        await channel.aclose()
        running.cancel()


@pytest.fixture
def spmd() -> Spmd:
    def run(body: Body) -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_with_channel(body))

    return run


class TestMpiChannel(ChannelSuite):
    def test_it_works_on_asyncios_own_loop_too(self) -> None:
        async def body(channel: object) -> None:
            assert isinstance(channel, MpiChannel)
            channel.send_nowait((channel.rank + 1) % channel.world_size, b"hello")
            assert (await next_frame(channel))[1] == b"hello"

        asyncio.run(_with_channel(body))

    def test_closing_leaves_an_mpi_that_other_code_started(self, spmd: Spmd) -> None:
        async def body(_: object) -> None:
            pass

        spmd(body)
        assert not MPI.Is_finalized()


# ---- mesh ----------------------------------------------------------------------------------------

MeshBody = Callable[[Mesh, MpiChannel], Awaitable[None]]


@pytest.fixture
def on_mesh() -> Callable[[MeshBody], None]:
    async def main(body: MeshBody) -> None:
        engine = ProgressEngine()
        engine.share_cores(num_ranks=2, num_cores=1)
        channel = open_mpi_control_channel(engine)
        mesh = Mesh(channel, engine, MonotonicClock())
        mesh.start()
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            await body(mesh, channel)
            await mesh.aclose()
            running.cancel()

    def run(body: MeshBody) -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(main(body))

    return run


OnMesh = Callable[[MeshBody], None]


def hello(rank: int, world_size: int, config_hash: str = "same") -> Hello:
    resources = RankResources(rank, f"node{rank}", 7, "test", 2, 1 << 30)
    return Hello(rank, world_size, 1, "0.1.0", config_hash, resources)


def test_all_collectives_on_all_ranks(on_mesh: OnMesh) -> None:
    async def body(mesh: Mesh, _: MpiChannel) -> None:
        ranks = range(mesh.world_size)
        hellos = await mesh.handshake(hello(mesh.rank, mesh.world_size), SOON_S)
        assert [hello.rank for hello in hellos] == list(ranks)
        await mesh.agree("load", None, SOON_S)
        await mesh.barrier("loaded", SOON_S)
        plan = await mesh.broadcast("plan", bytes(200_000) if mesh.is_head else None, SOON_S)
        assert plan == bytes(200_000)
        parts = await mesh.gather("metrics", b"%d" % mesh.rank, SOON_S)
        assert parts == ([b"%d" % rank for rank in ranks] if mesh.is_head else None)
        await mesh.barrier("end", SOON_S)

    on_mesh(body)


def test_messages_go_from_every_rank_to_every_rank_in_order(on_mesh: OnMesh) -> None:
    async def body(mesh: Mesh, _: MpiChannel) -> None:
        mailbox = mesh.mailbox(StepSampled)
        for step in range(100):
            mesh.broadcast_message(StepSampled(step, (mesh.rank,)))
        steps: dict[int, list[int]] = {rank: [] for rank in range(mesh.world_size)}
        for _number in range(100 * mesh.world_size):
            source, message = await mailbox.get()
            assert isinstance(message, StepSampled)
            steps[source].append(message.step)
        assert all(found == list(range(100)) for found in steps.values())
        await mesh.barrier("end", SOON_S)

    on_mesh(body)


def test_a_mismatch_is_raised_on_all_ranks(on_mesh: OnMesh) -> None:
    async def body(mesh: Mesh, _: MpiChannel) -> None:
        last = mesh.world_size - 1
        mine = hello(mesh.rank, mesh.world_size, "other" if mesh.rank == last else "same")
        if mesh.world_size == 1:
            await mesh.handshake(mine, SOON_S)
            return
        with pytest.raises(ProtocolMismatchError, match=f"rank {last} on node{last} has other"):
            await mesh.handshake(mine, SOON_S)

    on_mesh(body)


def test_an_error_of_the_last_rank_reaches_all(on_mesh: OnMesh) -> None:
    async def body(mesh: Mesh, _: MpiChannel) -> None:
        last = mesh.world_size - 1
        if mesh.rank == last:
            with pytest.raises(CheckpointError, match="truncated"):
                await mesh.agree("load", CheckpointError("truncated"), SOON_S)
        else:
            with pytest.raises(RemoteError, match=f"rank {last}: truncated"):
                await mesh.agree("load", None, SOON_S)

    on_mesh(body)


def test_a_rank_that_stays_away_is_named(on_mesh: OnMesh) -> None:
    async def body(mesh: Mesh, _: MpiChannel) -> None:
        if mesh.is_head and mesh.world_size > 1:
            with pytest.raises(DeadlineError, match=r"rank 1.* did not reach the barrier 'alone'"):
                await mesh.barrier("alone", 0.1)

    on_mesh(body)


def test_the_probe_measures_or_says_that_it_needs_two_ranks(on_mesh: OnMesh) -> None:
    async def body(mesh: Mesh, channel: MpiChannel) -> None:
        if mesh.world_size == 1:
            with pytest.raises(EnvironmentSetupError, match="-n 2"):
                await probe_control_plane(mesh)
            return
        probe = await probe_control_plane(mesh, raw=channel, idle_s=0.05, num_messages=200)
        assert (probe is not None) == mesh.is_head
        if probe is None:
            return
        assert [trip.payload_bytes for trip in probe.round_trips] == [64, 1024]
        assert all(0 < trip.p50_us <= trip.p95_us for trip in probe.round_trips)
        assert all(trip.raw_p50_us is not None for trip in probe.round_trips)
        assert probe.one_way_per_s > 0
        assert probe.raw_one_way_per_s is not None
        assert probe.raw_one_way_per_s > 0
        assert len(probe.idle_shares) == mesh.world_size
        assert len(format_probe(probe)) == 3 + mesh.world_size

    on_mesh(body)
