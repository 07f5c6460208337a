"""Sums and pieces between the lanes of a stage over MPI, asked for by computing threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mpi4py import MPI

from mpipipe.data_plane.mpi import MpiLanes, open_mpi_lanes
from mpipipe.errors import ChannelClosedError
from mpipipe.progress import ProgressEngine, new_event_loop

LIMIT_S = 40
LET_GO_S = 10
RANK, SIZE = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()


def on_lanes(lanes_per_stage: int, body: Callable[[MpiLanes], None]) -> None:
    """Call `body` in a thread of every rank, which are cut into stages."""

    async def main() -> None:
        engine = ProgressEngine()
        engine.share_cores(num_ranks=2, num_cores=1)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            stage, lane = divmod(RANK, lanes_per_stage)
            lanes = open_mpi_lanes(engine, stage=stage, lane=lane)
            with engine.computing():
                await asyncio.to_thread(body, lanes)
            lanes.close()
            running.cancel()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_lane_has_the_sum_in_the_order_of_the_lanes(dtype: torch.dtype) -> None:
    def body(lanes: MpiLanes) -> None:
        assert (lanes.lane, lanes.num_lanes) == (RANK, SIZE)
        generator = torch.Generator().manual_seed(3)
        for shape in ((1, 7), (64, 1000)):
            parts = torch.randn(SIZE, *shape, generator=generator).to(dtype)
            mine = parts[RANK].clone()
            assert torch.equal(lanes.add_up(mine), parts.sum(dim=0))

    on_lanes(SIZE, body)


def test_pieces_lie_side_by_side_and_the_first_lane_tells() -> None:
    def body(lanes: MpiLanes) -> None:
        whole = torch.arange(3 * 4 * SIZE).view(3, 4 * SIZE)
        part = whole[:, 4 * RANK : 4 * RANK + 4].contiguous()
        assert torch.equal(lanes.gather(part), whole)
        assert lanes.gather(part[:0]).shape == (0, 4 * SIZE)
        told = lanes.from_first(torch.full((5,), 10 + RANK))
        assert told.tolist() == [10] * 5

    on_lanes(SIZE, body)


def test_stages_do_not_hear_each_other() -> None:
    width = 2 if SIZE % 2 == 0 else 1

    def body(lanes: MpiLanes) -> None:
        first = RANK - RANK % width
        total = lanes.add_up(torch.tensor([1 << RANK]))
        assert int(total) == sum(1 << rank for rank in range(first, first + width))

    on_lanes(width, body)


def test_a_thread_that_waits_for_a_lane_is_let_go_when_the_lanes_close() -> None:
    async def main() -> None:
        engine = ProgressEngine()
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            lanes = open_mpi_lanes(engine, stage=0, lane=RANK)
            lanes.close()
            with pytest.raises(ChannelClosedError, match="after its lanes were closed"):
                await asyncio.to_thread(lanes.add_up, torch.ones(1))
            running.cancel()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("asks_first", [True, False])
def test_a_thread_is_let_go_while_the_loop_waits_for_it(
    *, asks_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a rank fails while it computes: the loop's thread closes, and runs nothing else."""

    async def main() -> None:
        lanes = open_mpi_lanes(ProgressEngine(), stage=0, lane=RANK)
        loop, may_ask, asked = asyncio.get_running_loop(), threading.Event(), threading.Event()
        post = loop.call_soon_threadsafe

        def post_and_tell(*arguments: object) -> None:
            post(*arguments)  # type: ignore[arg-type]
            asked.set()

        def compute() -> None:
            assert may_ask.wait(LET_GO_S)
            lanes.add_up(torch.ones(1))

        monkeypatch.setattr(loop, "call_soon_threadsafe", post_and_tell)
        thread = ThreadPoolExecutor(1)
        computing = thread.submit(compute)
        if asks_first:
            may_ask.set()
            assert asked.wait(LET_GO_S)
        lanes.close()
        may_ask.set()
        assert isinstance(computing.exception(LET_GO_S), ChannelClosedError)
        thread.shutdown()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())
