"""Replicas over MPI: rank 0 hands requests to the heads of pipelines of one or two stub stages."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from mpipipe.clock import MonotonicClock
from mpipipe.config.schema import PipelineConfig
from mpipipe.control_plane.group import RankGroup
from mpipipe.control_plane.mesh import Mesh
from mpipipe.control_plane.messages import (
    DecodeScheduled,
    DispatchBegan,
    DispatchEnded,
    Echo,
    RequestClosed,
    RequestOpened,
    StepSampled,
    StepScheduled,
)
from mpipipe.control_plane.mpi import open_mpi_control_channel
from mpipipe.metrics.log import NullLog
from mpipipe.planning.layout import Layout, lay_out
from mpipipe.progress import ProgressEngine, new_event_loop
from mpipipe.scheduler.core import SchedulerCore, SchedulerLimits
from mpipipe.scheduler.replicas import Dispatch, ReplicaLink, ReplicaPlace
from mpipipe.scheduler.runner import Runner
from mpipipe.scheduler.texts import TextMaker
from mpipipe.types import Completion, Request, SamplingParams
from tests.unit.planned_rank import make_rank

LIMIT_S = 40
CAPACITY = 8
NUM_REQUESTS = 120


def request(index: int) -> Request:
    sampling = SamplingParams(max_new_tokens=1 + 7 * index % 23)
    return Request(f"r{index}", index, tuple(range(1, 2 + index % 5)), sampling)


def token(first_id: int, num_tokens: int) -> int:
    return (first_id + num_tokens) % 50 + 1


class Stage:
    """One stage: a later one echoes each step to its head, which then has its tokens."""

    def __init__(self, mesh: Mesh, ranks: tuple[int, ...]) -> None:
        self.mesh = mesh
        self.ranks = ranks
        self.lengths: dict[int, int] = {}
        self.batches: dict[int, list[int]] = {}
        self.opened: set[int] = set()
        self.waiting: list[StepSampled] = []

    async def serve(self) -> None:
        kinds = (RequestOpened, StepScheduled, DecodeScheduled, RequestClosed, Echo)
        inbox = self.mesh.mailbox(*kinds)
        while True:
            source, message = await inbox.get()
            assert source in self.ranks, f"a message of rank {source} is of another replica"
            match message:
                case RequestOpened():
                    self.opened.add(message.sequence_id)
                    self.lengths[message.sequence_id] = len(message.prompt_ids)
                case StepScheduled():
                    self.run(message.step, [s.sequence_id for s in message.sequences if s.sample])
                case DecodeScheduled():
                    rows = self.batches.setdefault(message.slot, [])
                    for row in reversed(message.left):
                        del rows[row]
                    rows.extend(message.joined)
                    chunks = [c.sequence_id for c in message.chunks if c.sample]
                    self.run(message.step, rows + chunks)
                case Echo():
                    self.mesh.send(self.mesh.rank, self.waiting.pop(0))

    def run(self, step: int, sampled: list[int]) -> None:
        ids = [token(1, self.lengths[number]) for number in sampled]
        for number in sampled:
            self.lengths[number] += 1
        if self.mesh.rank != self.ranks[0]:
            if self.mesh.rank == self.ranks[-1]:
                self.mesh.send(self.ranks[0], Echo(step, b"", True))
            return
        self.waiting.append(StepSampled(step, tuple(ids)))
        if len(self.ranks) == 1:
            self.mesh.send(self.mesh.rank, self.waiting.pop(0))


async def serve_head(mesh: Mesh, ranks: tuple[int, ...]) -> int:
    """A replica's head for one call; how many requests it completed."""
    inbox = mesh.mailbox(DispatchBegan, DispatchEnded)
    assert isinstance((await inbox.get())[1], DispatchBegan)
    limits = SchedulerLimits(len(ranks), CAPACITY // len(ranks), 32, 200, 4, 200, 0)
    link = ReplicaLink(mesh, MonotonicClock(), capacity=CAPACITY)
    runner = Runner(
        core=SchedulerCore(limits, prefill="mixed"),
        group=RankGroup(mesh, ranks),
        texts=TextMaker(lambda ids: f"{len(ids)} tokens"),
        clock=MonotonicClock(),
        log=NullLog(),
        on_request=link.ended,
        link=link,
    )
    completed = [completion async for completion in runner.generate(())]
    assert isinstance((await inbox.get())[1], DispatchEnded)
    return len(completed)


def layout_of(world_size: int, num_replicas: int) -> Layout:
    world = [make_rank(rank) for rank in range(world_size)]
    return lay_out(world, PipelineConfig(replicas=num_replicas))


@pytest.mark.parametrize("stages", [1, 2])
def test_every_request_is_completed_once_whatever_replicas_there_are(stages: int) -> None:
    async def main() -> None:
        engine = ProgressEngine()
        engine.share_cores(num_ranks=2, num_cores=1)
        mesh = Mesh(open_mpi_control_channel(engine), engine, MonotonicClock())
        mesh.start()
        layout = layout_of(mesh.world_size, -(-mesh.world_size // stages))
        ranks = layout.replicas[layout.place_of(mesh.rank).replica]
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(engine.run())
            stage = tasks.create_task(Stage(mesh, ranks).serve())
            head = tasks.create_task(serve_head(mesh, ranks)) if mesh.rank == ranks[0] else None
            if mesh.is_head:
                completions, dispatch = await dispatched(mesh, layout)
                check(completions, dispatch, len(layout.replicas))
            counted = str(await head if head is not None else 0).encode()
            parts = await mesh.gather("counts", counted, LIMIT_S)
            assert parts is None or sum(map(int, parts)) == NUM_REQUESTS
            await mesh.barrier("end", LIMIT_S)
            stage.cancel()
            await mesh.aclose()
            polling.cancel()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


async def dispatched(mesh: Mesh, layout: Layout) -> tuple[list[Completion], Dispatch]:
    places = [ReplicaPlace(members[0], CAPACITY) for members in layout.replicas]
    wanted = [request(index) for index in range(NUM_REQUESTS)]
    dispatch = Dispatch(mesh, MonotonicClock(), wanted, places)
    dispatch.begin()
    async with aclosing(dispatch.completions()) as running:
        completions = [completion async for completion in running]
    await dispatch.end()
    return completions, dispatch


def check(completions: list[Completion], dispatch: Dispatch, num_replicas: int) -> None:
    completions.sort(key=lambda completion: completion.index)
    assert [completion.index for completion in completions] == list(range(NUM_REQUESTS))
    for completion in completions:
        wanted = request(completion.index)
        lengths = range(len(wanted.prompt_ids), 999)[: wanted.sampling.max_new_tokens]
        assert completion.token_ids == tuple(token(1, length) for length in lengths)
        assert completion.text == f"{wanted.sampling.max_new_tokens} tokens"
        assert 0 <= completion.queue_s <= completion.ttft_s <= completion.latency_s
    totals = dispatch.totals()
    assert len(totals) == num_replicas
    assert sum(replica.num_completed for replica in totals) == NUM_REQUESTS
    assert all(replica.num_completed > 0 for replica in totals)
