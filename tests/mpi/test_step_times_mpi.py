"""Clocks compared, and the times of steps told from stage to stage, over MPI on any ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mpipipe.clock import MonotonicClock, ScriptedClock
from mpipipe.control_plane.mesh import Mesh
from mpipipe.control_plane.mpi import open_mpi_control_channel
from mpipipe.metrics.accounting import StageAccount
from mpipipe.progress import ProgressEngine, new_event_loop
from mpipipe.runtime.clock_offsets import Clocks
from mpipipe.stage.step_times import StepTimesLink

LIMIT_S = 40
SOON_S = 20.0
AHEAD_S = 1000.0  # each rank's clock before that of the rank before it
NUM_STEPS = 150  # two batches, and what is left

Body = Callable[[Mesh, asyncio.TaskGroup], Awaitable[None]]


@pytest.fixture
def on_mesh() -> Callable[[Body], None]:
    async def main(body: Body) -> None:
        engine = ProgressEngine()
        engine.share_cores(num_ranks=2, num_cores=1)
        mesh = Mesh(open_mpi_control_channel(engine), engine, MonotonicClock())
        mesh.start()
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            await body(mesh, tasks)
            await mesh.aclose()
            running.cancel()

    def run(body: Body) -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(main(body))

    return run


def test_clocks_are_compared_while_ranks_go_on(on_mesh: Callable[[Body], None]) -> None:
    async def body(mesh: Mesh, tasks: asyncio.TaskGroup) -> None:
        clock = MonotonicClock()
        hosts = [f"node{rank // 2}" for rank in range(mesh.world_size)]
        apart_s = AHEAD_S * (mesh.rank // 2)  # ranks of one host have one clock
        clocks = Clocks(mesh, hosts, lambda: clock.now_s() + apart_s)
        compared: list[int] = []
        clocks.on_compared = lambda offsets: compared.append(len(offsets))
        running = tasks.create_task(clocks.run())
        await mesh.barrier("begin", SOON_S)
        for name in ("first", "second"):
            await clocks.compare()
            await mesh.barrier(name, SOON_S)
        await asyncio.sleep(0)
        for rank in range(mesh.world_size):
            assert clocks.ahead_s(rank) == pytest.approx(AHEAD_S * (rank // 2), abs=5.0)
        for offset in clocks.offsets:
            # Both read the machine's one clock, so what is found is off by the error at most.
            assert abs(offset.ahead_s - AHEAD_S * (offset.rank // 2)) <= offset.error_s + 1e-9
            assert (offset.error_s == 0.0) == (offset.rank < 2)
        assert compared == ([mesh.world_size] * 2 if mesh.is_head else [])
        await mesh.barrier("end", SOON_S)
        running.cancel()

    on_mesh(body)


def test_a_stage_divides_its_waits_by_the_times_of_the_stage_before(
    on_mesh: Callable[[Body], None],
) -> None:
    """Of a step that begins at n, the stage before is done at n + ¼, and the tensor is at n + ½."""

    async def body(mesh: Mesh, _: asyncio.TaskGroup) -> None:
        size = mesh.world_size
        plan: Any = SimpleNamespace(rank_of=lambda stage, lane: stage, num_stages=size)
        account, clock = StageAccount(mesh.rank), ScriptedClock(AHEAD_S * mesh.rank)
        link = StepTimesLink(
            plan,
            mesh.rank,
            mesh=mesh,
            account=account,
            clock=clock,
            ahead_s=lambda rank: AHEAD_S * rank,
        )
        begin_s = clock.now_s()
        account.begin(begin_s)
        for number in range(NUM_STEPS):
            start_s = begin_s + number
            link.computed(start_s + 0.25)  # for the stage behind, on this rank's clock
            account.step_scheduled(number, start_s)
            account.input_ready(number, start_s + 0.5)
            account.computed(number, start_s + 1.0)
            step: Any = SimpleNamespace(
                step=number, slot=0, num_tokens=1, num_sampled=1, num_sequences=1,
                phase="decode", steady=False,
            )  # fmt: skip
            account.sent(step, start_s + 1.0, needs=number)
        link.flush()
        await link.settle()
        totals = account.snapshot()
        assert totals.num_undivided == 0
        assert totals.overall.wait_s == pytest.approx(NUM_STEPS / 4)
        assert totals.overall.transfer_s == pytest.approx(NUM_STEPS / 4)
        assert totals.overall.wall_s == pytest.approx(NUM_STEPS)
        await mesh.barrier("end", SOON_S)

    on_mesh(body)
