"""Rank 0 hands prompts out to heads over MPI, on any number of ranks."""

from __future__ import annotations

import asyncio

from mpipipe.bench.dispatch import DispatchOptions, DispatchRates, measure_in_process, measure_over
from mpipipe.clock import MonotonicClock
from mpipipe.control_plane.mesh import Mesh
from mpipipe.control_plane.mpi import open_mpi_control_channel
from mpipipe.progress import ProgressEngine, new_event_loop

LIMIT_S = 40
OPTIONS = DispatchOptions(num_prompts=500, capacity=32, num_virtual=2)


async def dispatch() -> None:
    clock, engine = MonotonicClock(), ProgressEngine()
    engine.share_cores(num_ranks=2, num_cores=1)
    mesh = Mesh(open_mpi_control_channel(engine), engine, clock)
    mesh.start()
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(engine.run())
        rates: DispatchRates | None
        if mesh.world_size == 1:
            rates = await measure_in_process(engine, clock, OPTIONS)
        else:
            rates = await measure_over(mesh, clock, OPTIONS)
        assert (rates is not None) == mesh.is_head
        if rates is not None:
            assert rates.num_prompts == OPTIONS.num_prompts
            assert rates.num_replicas == max(2, mesh.world_size) - (mesh.world_size > 1)
        await mesh.aclose()
        running.cancel()


def test_every_prompt_is_handed_out_and_told_once() -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(dispatch())
