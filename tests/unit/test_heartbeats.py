"""Heartbeats of virtual ranks: scripted time, real messages in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from mpipipe.clock import ScriptedClock
from mpipipe.control_plane.heartbeats import Heartbeats, Vitals
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.control_plane.messages import Echo, RankLost
from mpipipe.errors import PeerLostError
from mpipipe.progress import ProgressEngine, new_event_loop

TIMEOUT_S = 10.0
TURNS = 20


class World:
    """Ranks whose heartbeats are driven turn by turn; those in `frozen` take no turn."""

    def __init__(self, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = ScriptedClock()
        self.engine = ProgressEngine()
        self.cpu_s = [0.0] * num_ranks
        self.frozen: set[int] = set()
        self.vitals = [
            Vitals(TIMEOUT_S, "load", stage=rank, last_step=lambda: 7) for rank in range(num_ranks)
        ]
        self.meshes = [
            Mesh(channel, self.engine, self.clock)
            for channel in open_memory_channels(num_ranks, self.engine)
        ]
        self.beats = [
            Heartbeats(mesh, self.clock, f"n{rank}", self.vitals[rank], partial(self._cpu_s, rank))
            for rank, mesh in enumerate(self.meshes)
        ]
        self.ended: dict[int, PeerLostError] = {}
        self._naps: dict[int, asyncio.Event] = {}
        self._running: dict[int, asyncio.Task[None]] = {}
        self._patch = monkeypatch

    def _cpu_s(self, rank: int) -> float:
        return self.cpu_s[rank]

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Let every rank run to its first nap."""
        ranks: dict[asyncio.Task[Any] | None, int] = {}

        async def nap(_: float) -> None:
            rank = ranks[asyncio.current_task()]
            self._naps[rank] = asyncio.Event()
            await self._naps[rank].wait()

        self._patch.setattr("mpipipe.control_plane.heartbeats.asyncio.sleep", nap)
        for rank, beats in enumerate(self.beats):
            self.meshes[rank].start()
            task = self._running[rank] = tasks.create_task(self._run(rank, beats))
            ranks[task] = rank
        await self._settle()

    async def _run(self, rank: int, beats: Heartbeats) -> None:
        try:
            await beats.run()
        except PeerLostError as error:
            self.ended[rank] = error

    async def _settle(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(TURNS):
            self.engine.poll()
            turn = loop.create_future()
            loop.call_soon(turn.set_result, None)
            await turn

    async def advance(self, seconds: int) -> None:
        """One second at a time, in which each rank that is not frozen has its turn."""
        for _ in range(seconds):
            self.clock.advance(1.0)
            for rank, nap in list(self._naps.items()):
                if rank not in self.frozen:
                    nap.set()
            await self._settle()

    def stop(self) -> None:
        for task in self._running.values():
            task.cancel()


@pytest.fixture
def drive(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[int, Callable[[World], Coroutine[Any, Any, None]]], World]:
    def run(num_ranks: int, script: Callable[[World], Coroutine[Any, Any, None]]) -> World:
        async def main() -> World:
            async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
                world = World(num_ranks, monkeypatch)
                await world.start(tasks)
                await script(world)
                world.stop()
            return world

        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(main())

    return run


Drive = Callable[[int, Callable[[World], Coroutine[Any, Any, None]]], World]


def test_ranks_that_live_go_on(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.advance(100)

    assert drive(4, script).ended == {}


@pytest.mark.parametrize("frozen", [1, 2])
def test_a_frozen_rank_ends_all_others_and_the_head_alone_tells(frozen: int, drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.advance(5)
        world.frozen.add(frozen)
        await world.advance(9)
        assert world.ended == {}
        await world.advance(4)

    ended = drive(3, script).ended
    assert ended.keys() == {0, 3 - frozen}
    assert f"rank {frozen} on n{frozen} (stage {frozen})" in str(ended[0])
    assert "its last step was 7" in str(ended[0])
    assert {rank: error.told_by for rank, error in ended.items()} == {0: None, 3 - frozen: 0}
    assert {error.lost for error in ended.values()} == {frozen}
    assert len({str(error) for error in ended.values()}) == 1


def test_of_a_frozen_head_the_lowest_rank_that_is_left_tells(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.advance(5)
        world.frozen.add(0)
        await world.advance(14)

    ended = drive(4, script).ended
    assert {rank: error.told_by for rank, error in ended.items()} == {1: None, 2: 1, 3: 1}
    assert "rank 0 on n0" in str(ended[1])


def test_with_the_head_another_rank_may_be_frozen_too(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.advance(5)
        world.frozen |= {0, 1}
        await world.advance(16)

    ended = drive(4, script).ended
    assert {rank: error.told_by for rank, error in ended.items()} == {2: None, 3: 2}


def test_a_job_that_is_stopped_as_a_whole_and_continued_goes_on(drive: Drive) -> None:
    async def script(world: World) -> None:
        for stopped_s in (30, 3600):
            await world.advance(5)
            world.clock.advance(stopped_s)
        await world.advance(30)

    assert drive(3, script).ended == {}


def test_a_rank_that_was_busy_tells_for_how_long_and_gets_as_much_more(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.advance(3)
        world.frozen.add(1)  # a long step on its event loop …
        await world.advance(8)
        world.cpu_s[1] += 8.0
        world.frozen.clear()
        await world.advance(3)
        world.frozen.add(1)  # … and another one
        await world.advance(16)
        assert world.ended == {}
        await world.advance(4)

    assert drive(2, script).ended.keys() == {0}


def test_a_rank_that_stood_still_tells_its_log_but_not_while_it_boots(drive: Drive) -> None:
    told: list[tuple[int, float, float]] = []

    def tell(rank: int, seconds: float, cpu_s: float) -> None:
        told.append((rank, seconds, cpu_s))

    async def script(world: World) -> None:
        for rank, vitals in enumerate(world.vitals):
            vitals.on_pause = partial(tell, rank)
        world.vitals[0].last_step = None
        await world.advance(3)
        world.frozen |= {0, 1}
        await world.advance(4)
        world.cpu_s[1] += 0.5
        world.frozen.clear()
        await world.advance(3)

    drive(2, script)
    # It sleeps for two seconds a time, of which some are over when it is stopped.
    ((rank, seconds, cpu_s),) = told
    assert (rank, cpu_s) == (1, 0.5)
    assert seconds == pytest.approx(3.0, abs=1.0)


def test_a_rank_that_was_stopped_gets_no_more(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.advance(3)
        world.frozen.add(1)
        await world.advance(8)
        world.frozen.clear()
        await world.advance(3)
        world.frozen.add(1)
        await world.advance(13)

    assert drive(2, script).ended.keys() == {0}


def test_without_a_timeout_ranks_wait_for_ever_but_hear_of_a_loss(drive: Drive) -> None:
    async def script(world: World) -> None:
        for vitals in world.vitals:
            vitals.timeout_s = 0.0
        world.frozen.add(1)
        await world.advance(1000)
        assert world.ended == {}
        world.meshes[1].send(0, RankLost(2, "rank 2 is silent"))
        await world.advance(2)

    ended = drive(3, script).ended
    assert [(rank, error.told_by) for rank, error in ended.items()] == [(0, 1)]


def test_heartbeats_do_not_wake_an_idle_rank_and_other_messages_do(drive: Drive) -> None:
    woken: list[int] = []

    async def script(world: World) -> None:
        await world.advance(2)
        world.engine.wake = lambda: woken.append(1)  # type: ignore[method-assign]
        await world.advance(10)
        assert woken == []
        world.meshes[1].send(0, Echo(1, b"", reply=False))
        await world.advance(1)

    drive(2, script)
    assert woken
