"""Transfers of decode steps are prepared once where the channel can repeat them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpipipe.clock import ScriptedClock
from mpipipe.control_plane.messages import DecodeScheduled, ScheduledSequence, StepScheduled
from mpipipe.data_plane.channel import EdgeKind
from mpipipe.data_plane.loopback import LoopbackChannel, open_loopback_channels
from mpipipe.planning.step_limits import row_buckets
from mpipipe.stage.stage_transfers import StageTransfers
from tests.contract.engine_pipeline import EnginePipeline, engine_plan
from tests.contract.tiny_models import save_tiny

DECODE = DecodeScheduled(0, 0, 1, (), (), (), (), False)
PROMPT = StepScheduled(0, 0, (), False)
MIXED = replace(DECODE, chunks=(ScheduledSequence(1, 0, 3, (), sample=True),))


class Repeating:
    """A loopback channel that can repeat, and counts what was prepared and how often it went."""

    def __init__(self, channel: LoopbackChannel) -> None:
        self.send = channel.send
        self.receive = channel.receive
        self.aclose = channel.aclose
        self.num_prepared = 0
        self.num_repeats = 0

    def repeated_send(
        self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind
    ) -> Callable[[], None]:
        return self._counted(lambda: self.send(tensor, destination=destination, kind=kind))

    def repeated_receive(
        self, buffer: torch.Tensor, *, source: int, kind: EdgeKind
    ) -> Callable[[], None]:
        return self._counted(lambda: self.receive(buffer, source=source, kind=kind))

    def _counted(self, transfer: Callable[[], object]) -> Callable[[], None]:
        self.num_prepared += 1

        def start() -> None:
            self.num_repeats += 1
            transfer()

        return start


def pair(*, fixed: bool) -> tuple[Repeating, StageTransfers, StageTransfers]:
    """A repeating end with its hops, and the hops of a plain end."""
    ends = open_loopback_channels(2)
    repeating = Repeating(ends[0])
    clock = ScriptedClock()
    return (
        repeating,
        StageTransfers(repeating, clock, fixed=fixed),
        StageTransfers(ends[1], clock, fixed=fixed),
    )


def test_a_transfer_is_prepared_once_for_each_memory_and_size() -> None:
    async def session() -> None:
        repeating, here, there = pair(fixed=True)
        results, arrived = torch.zeros(2, 4), torch.empty(4)
        for number in range(3):
            results.fill_(number)
            for row in (0, 1):
                here.send(DECODE, results[row], 1, EdgeKind.HIDDEN)
                await there.receive(DECODE, arrived, 0, EdgeKind.HIDDEN)
                assert arrived.tolist() == [number] * 4
        here.send(DECODE, results[0, :2], 1, EdgeKind.HIDDEN)
        assert (repeating.num_prepared, repeating.num_repeats) == (3, 7)

    asyncio.run(session())


def test_a_receive_is_prepared_once_too() -> None:
    async def session() -> None:
        repeating, here, there = pair(fixed=True)
        ids, arrival = torch.zeros(3, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        for number in range(4):
            there.send(DECODE, ids.fill_(number), 0, EdgeKind.IDS)
            await here.receive(DECODE, arrival, 1, EdgeKind.IDS)
            assert arrival.tolist() == [number] * 3
        assert (repeating.num_prepared, repeating.num_repeats) == (1, 4)

    asyncio.run(session())


def test_prompts_and_results_that_move_about_travel_plainly() -> None:
    async def session() -> None:
        for fixed, step in ((True, PROMPT), (True, MIXED), (False, DECODE)):
            repeating, here, there = pair(fixed=fixed)
            arrived = torch.empty(5)
            here.send(step, torch.ones(5), 1, EdgeKind.HIDDEN)
            await there.receive(step, arrived, 0, EdgeKind.HIDDEN)
            there.send(step, torch.ones(5), 0, EdgeKind.IDS)
            await here.receive(step, arrived, 1, EdgeKind.IDS)
            assert arrived.tolist() == [1] * 5
            assert repeating.num_prepared == 0

    asyncio.run(session())


def test_waiting_for_a_tensor_is_counted_apart() -> None:
    """It is the other stage's time, not the host's."""

    async def session() -> None:
        ends, clock = open_loopback_channels(2), ScriptedClock()
        here, arrived = StageTransfers(ends[0], clock, fixed=False), torch.empty(5)
        receiving = asyncio.ensure_future(here.receive(DECODE, arrived, 1, EdgeKind.HIDDEN))
        await asyncio.sleep(0)
        clock.advance(3.5)
        ends[1].send(torch.ones(5), destination=0, kind=EdgeKind.HIDDEN)
        await receiving
        assert here.awaited_s == 3.5

    asyncio.run(session())


@pytest.mark.parametrize("number", [0, 1])
def test_transfers_of_captured_steps_are_prepared_at_boot(number: int, tmp_path: Path) -> None:
    """All of them, and preparing moves nothing."""
    plan = engine_plan(2, graphs=True)
    pipeline = EnginePipeline(save_tiny("llama", tmp_path), plan, "replayed").prepare()
    engine, stage = pipeline.engines[number], plan.stages[number]
    repeating = Repeating(open_loopback_channels(2)[number])
    hops = StageTransfers(repeating, ScriptedClock(), fixed=engine.graph_runner.use_graphs)
    hops.prepare(plan, stage, 0, engine)
    # For each size one receive, and for each slot and size one send.
    num_prepared = len(row_buckets(plan.max_sequences_per_slot)) * (1 + plan.num_slots)
    assert (repeating.num_prepared, repeating.num_repeats) == (num_prepared, 0)
    hops.prepare(plan, stage, 0, engine)
    kind = EdgeKind.IDS if stage.has_head else EdgeKind.HIDDEN
    for result in engine.graph_runner.results():
        hops.send(DECODE, result, 1 - number, kind)
    assert repeating.num_prepared == num_prepared
    assert repeating.num_repeats == len(engine.graph_runner.results())
