"""Rank 0 and the heads of replicas as virtual ranks: real runners, stages that answer at once."""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from mpipipe.clock import MonotonicClock, ScriptedClock
from mpipipe.control_plane.group import RankGroup
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.control_plane.messages import (
    DecodeScheduled,
    DispatchBegan,
    DispatchEnded,
    Message,
    NoMoreRequests,
    ReplicaTold,
    RequestClosed,
    RequestOpened,
    RequestsGiven,
    StepSampled,
    StepScheduled,
)
from mpipipe.metrics.lines import RequestRecord
from mpipipe.metrics.log import NullLog
from mpipipe.progress import ProgressEngine, new_event_loop
from mpipipe.scheduler.core import SchedulerCore, SchedulerLimits
from mpipipe.scheduler.instructions import SchedulerStatistics
from mpipipe.scheduler.replicas import Dispatch, ReplicaLink, ReplicaPlace
from mpipipe.scheduler.runner import Runner
from mpipipe.scheduler.texts import TextMaker
from mpipipe.types import Completion, Request, SamplingParams

LIMIT_S = 20
CAPACITY = 4
EOS = 0


def requests(count: int, **sampling: Any) -> list[Request]:
    return [
        Request(
            f"r{i}",
            i,
            tuple(1 + (7 * i + k) % 26 for k in range(1 + 3 * i % 8)),
            SamplingParams(max_new_tokens=1 + 5 * i % 17).replace(**sampling),
        )
        for i in range(count)
    ]


def next_id(history: Sequence[int], sampling: SamplingParams) -> int:
    return zlib.crc32(bytes(history), sampling.seed) % 27


def expected(request: Request) -> tuple[int, ...]:
    history = list(request.prompt_ids)
    while len(history) < len(request.prompt_ids) + request.sampling.max_new_tokens:
        history.append(next_id(history, request.sampling))
        if history[-1] == EOS:
            break
    return tuple(history[len(request.prompt_ids) :])


@dataclass
class Stage:
    """The only stage of a replica: answers each step when it comes."""

    mesh: Mesh
    histories: dict[int, list[int]] = field(default_factory=dict)
    sampling: dict[int, SamplingParams] = field(default_factory=dict)
    batches: dict[int, list[int]] = field(default_factory=dict)

    async def serve(self) -> None:
        inbox = self.mesh.mailbox(RequestOpened, StepScheduled, DecodeScheduled, RequestClosed)
        while True:
            _, message = await inbox.get()
            if isinstance(message, StepScheduled) and not message.step:
                self.batches.clear()  # a new call
            match message:
                case RequestOpened():
                    self.histories[message.sequence_id] = list(message.prompt_ids)
                    self.sampling[message.sequence_id] = message.sampling
                case StepScheduled():
                    self.run(message.step, [s.sequence_id for s in message.sequences if s.sample])
                case DecodeScheduled():
                    rows = self.batches.setdefault(message.slot, [])
                    for row in reversed(message.left):
                        del rows[row]
                    rows.extend(message.joined)
                    chunks = [c.sequence_id for c in message.chunks if c.sample]
                    self.run(message.step, rows + chunks)
            await asyncio.sleep(0)

    def run(self, step: int, sampled: Sequence[int]) -> None:
        ids = []
        for number in sampled:
            ids.append(next_id(self.histories[number], self.sampling[number]))
            self.histories[number].append(ids[-1])
        self.mesh.send(self.mesh.rank, StepSampled(step, tuple(ids)))


@dataclass
class World:
    """Virtual ranks, each of them a replica of one stage; rank 0 dispatches."""

    meshes: list[Mesh]
    tasks: asyncio.TaskGroup
    records: list[tuple[RequestRecord, int]] = field(default_factory=list)
    starved_s: list[float] = field(default_factory=list)

    async def serve_replica(self, mesh: Mesh, num_calls: int) -> None:
        inbox = mesh.mailbox(DispatchBegan, DispatchEnded)
        for _ in range(num_calls):
            assert isinstance((await inbox.get())[1], DispatchBegan)
            limits = SchedulerLimits(1, CAPACITY, 16, 100, 4, 200, 0)
            core = SchedulerCore(limits, eos_token_ids=(EOS,), prefill="mixed")
            link = ReplicaLink(mesh, MonotonicClock(), capacity=CAPACITY)
            runner = Runner(
                core=core,
                group=RankGroup(mesh, (mesh.rank,)),
                texts=TextMaker(lambda ids: " ".join(map(str, ids))),
                clock=MonotonicClock(),
                log=NullLog(),
                on_request=link.ended,
                link=link,
            )
            async for _ in runner.generate(()):
                pass
            assert core.is_idle
            assert isinstance((await inbox.get())[1], DispatchEnded)

    def dispatch(self, wanted: Sequence[Request], **settings: Any) -> Dispatch:
        return Dispatch(
            self.meshes[0],
            MonotonicClock(),
            wanted,
            [ReplicaPlace(rank, CAPACITY) for rank in range(len(self.meshes))],
            on_request=lambda record, replica: self.records.append((record, replica)),
            **settings,
        )


@asynccontextmanager
async def open_world(num_replicas: int, num_calls: int = 1) -> AsyncIterator[World]:
    engine = ProgressEngine()
    meshes = [
        Mesh(channel, engine, MonotonicClock())
        for channel in open_memory_channels(num_replicas, engine)
    ]
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(engine.run())]
        for mesh in meshes:
            mesh.start()
            running.append(tasks.create_task(Stage(mesh).serve()))
        world = World(meshes, tasks)
        serving = [tasks.create_task(world.serve_replica(mesh, num_calls)) for mesh in meshes]
        yield world
        await asyncio.gather(*serving)
        for mesh in meshes:
            await mesh.aclose()
        for task in running:
            task.cancel()


async def complete(world: World, wanted: Sequence[Request]) -> tuple[Dispatch, list[Completion]]:
    dispatch = world.dispatch(wanted)
    dispatch.begin()
    async with aclosing(dispatch.completions()) as completions:
        ended = [completion async for completion in completions]
    await dispatch.end()
    return dispatch, ended


def run(main: Any) -> Any:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


@pytest.mark.parametrize("num_replicas", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 60])
def test_every_request_once_with_the_tokens_that_it_has_alone(
    num_replicas: int, count: int
) -> None:
    async def main() -> None:
        async with open_world(num_replicas, num_calls=2) as world:
            for seed in (3, 4):
                wanted = requests(count, seed=seed)
                dispatch, completions = await complete(world, wanted)
                completions.sort(key=lambda completion: completion.index)
                assert [c.token_ids for c in completions] == [expected(r) for r in wanted]
                totals = dispatch.totals()
                assert sum(replica.num_completed for replica in totals) == count
                assert [replica.head_rank for replica in totals] == list(range(num_replicas))
                assert dispatch.num_output_tokens == sum(c.num_output_tokens for c in completions)
                if count == 60:
                    assert all(replica.num_completed > 0 for replica in totals)

    run(main())


def test_a_refused_request_comes_back_as_an_error_and_is_told_with_its_replica() -> None:
    async def main() -> None:
        async with open_world(2) as world:
            wanted = requests(6)
            wanted[2] = replace(wanted[2], prompt_ids=(5,) * 300)
            dispatch, completions = await complete(world, wanted)
            assert [c.index for c in completions if c.error_kind == "too_long"] == [2]
            assert Counter(record.completion.index for record, _ in world.records) == Counter(
                range(6)
            )
            assert {replica for _, replica in world.records} == {0, 1}
            assert sum(replica.num_failed for replica in dispatch.totals()) == 1

    run(main())


def test_a_stop_ends_what_is_in_flight_and_hands_out_no_more() -> None:
    async def main() -> None:
        async with open_world(2) as world:
            dispatch = world.dispatch(requests(60, ignore_eos=True))
            completions = []
            dispatch.begin()
            async with aclosing(dispatch.completions()) as running:
                async for completion in running:
                    completions.append(completion)
                    dispatch.stop()
            await dispatch.end()
            indices = [completion.index for completion in completions]
            assert len(set(indices)) == len(indices)
            assert 1 <= len(indices) < 60

    run(main())


def test_a_stop_before_the_begin_and_a_caller_that_leaves_early_end_in_order() -> None:
    async def main() -> None:
        async with open_world(3, num_calls=3) as world:
            dispatch = world.dispatch(requests(20))
            dispatch.stop()
            dispatch.begin()
            assert [completion async for completion in dispatch.completions()] == []
            await dispatch.end()
            dispatch = world.dispatch(requests(20, seed=1))
            dispatch.begin()
            async with aclosing(dispatch.completions()) as running:
                await anext(running)
            await dispatch.end()
            _, completions = await complete(world, wanted := requests(20, seed=2))
            completions.sort(key=lambda completion: completion.index)
            assert [c.token_ids for c in completions] == [expected(r) for r in wanted]

    run(main())


@dataclass
class Wire:
    """Takes what a link sends."""

    sent: list[Message] = field(default_factory=list)

    def send(self, to: int, message: Message) -> None:
        assert to == 0
        self.sent.append(message)

    def mailbox(self, *_types: type[Message]) -> Any:
        raise AssertionError("a link does not receive")

    def asked(self) -> list[int]:
        told = [message for message in self.sent if isinstance(message, ReplicaTold)]
        self.sent.clear()
        return [message.num_wanted for message in told]


def counts(num_waiting: int) -> SchedulerStatistics:
    return SchedulerStatistics(num_waiting, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_a_replica_asks_for_its_capacity_and_then_for_what_waits() -> None:
    wire, clock = Wire(), ScriptedClock()
    link = ReplicaLink(wire, clock, capacity=32)
    link.turn(counts(0), 0)
    assert wire.asked() == [32]
    link.turn(counts(0), 0)
    assert wire.asked() == []  # they are on their way
    link.given(RequestsGiven(tuple(requests(32)), 1.5))
    link.turn(counts(5), 0)
    assert wire.asked() == []
    link.turn(counts(4), 0)  # half of the reserve of eight
    assert wire.asked() == [4]
    link.turn(counts(1), 0)
    assert wire.asked() == []
    link.turn(counts(0), 0)  # four are on their way
    assert wire.asked() == [4]
    link.closed()
    link.turn(counts(0), 0)
    assert wire.asked() == []


def test_a_replica_tells_how_it_stands_from_time_to_time() -> None:
    wire, clock = Wire(), ScriptedClock()
    link = ReplicaLink(wire, clock, capacity=1)
    link.turn(counts(0), 0)
    assert wire.asked() == [1]
    clock.advance(0.2)
    link.turn(counts(0), 7)
    assert wire.sent == []
    clock.advance(0.1)
    link.turn(counts(0), 7)
    (told,) = wire.sent
    assert isinstance(told, ReplicaTold)
    assert (told.num_output_tokens, told.num_wanted, told.is_done) == (7, 0, False)


def test_a_request_has_waited_since_rank_0_got_it() -> None:
    link = ReplicaLink(Wire(), ScriptedClock(10.0), capacity=1)
    assert link.given(RequestsGiven((), waited_s=4.0)) == 6.0


@pytest.mark.parametrize(("ahead_s", "arrived_s"), [(100.0, 1.0), (float("nan"), 3.0)])
def test_moments_of_another_clock_come_on_the_one_of_rank_0(
    ahead_s: float, arrived_s: float
) -> None:
    """Of a clock that is not known a message's way is part of the moment, here two seconds."""

    async def main() -> None:
        engine = ProgressEngine()
        (channel,) = open_memory_channels(1, engine)
        clock = ScriptedClock(7.0)
        mesh = Mesh(channel, engine, clock)
        told: list[RequestRecord] = []
        dispatch = Dispatch(
            mesh,
            clock,
            requests(1),
            [ReplicaPlace(0, 1)],
            ahead_s=lambda _: ahead_s,
            on_request=lambda record, _: told.append(record),
        )
        completion = Completion.rejected("r0", 0, _error())
        record = RequestRecord(completion, 0, 101.0, None, 104.0, 0, (102.0, 103.0))
        mesh.send(0, ReplicaTold((), 1, 105.0))
        mesh.send(0, ReplicaTold((record,), 0, 105.0))
        mesh.send(0, ReplicaTold((), 0, 105.0, is_done=True))
        dispatch.begin()
        assert [ended async for ended in dispatch.completions()] == [completion]
        shift_s = arrived_s - 101.0
        assert told == [record.shifted(shift_s)]
        assert told[0].token_s == (102.0 + shift_s, 103.0 + shift_s)
        inbox = mesh.mailbox(DispatchBegan, RequestsGiven, NoMoreRequests)
        kinds = [type((await inbox.get())[1]) for _ in range(3)]
        assert kinds == [DispatchBegan, RequestsGiven, NoMoreRequests]

    run(main())


def _error() -> Any:
    from mpipipe.errors import PromptError

    return PromptError("too_long", "it is too long")
