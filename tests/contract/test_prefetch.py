"""The order in which weights come into staging buffers, and that a gate waits for them."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from random import Random

import pytest
import torch

from mpipipe.clock import ScriptedClock
from mpipipe.errors import EnvironmentSetupError
from mpipipe.metrics.offload import OffloadUse
from mpipipe.progress import ProgressEngine
from mpipipe.stage.cpu_stream import CpuStream
from mpipipe.types import Tier
from mpipipe.weights.layer_store import HostRegion
from mpipipe.weights.prefetch import HostCarrier, Piece, Prefetcher, StreamedPart

SIZE = 8  # bytes of a part
LIMIT_S = 60


def streamed(number: int, buffer: int) -> StreamedPart:
    """A part whose bytes are its number."""
    region = HostRegion(torch.full((SIZE,), number, dtype=torch.uint8))
    return StreamedPart(number, buffer, (Piece(region, 0, SIZE, 0),))


def parts_of(numbers: list[int], num_buffers: int) -> list[StreamedPart]:
    return [streamed(number, place % num_buffers) for place, number in enumerate(numbers)]


@dataclass
class CheckingCarrier:
    """Loads at once, and fails where a buffer is overwritten in use or used for another part."""

    contents: dict[int, int] = field(default_factory=dict)  # by buffer, a part's number
    in_use: set[int] = field(default_factory=set)
    loads: list[int] = field(default_factory=list)
    num_steps: int = 0

    def load(self, part: StreamedPart) -> None:
        assert part.buffer not in self.in_use, "its part may still be used"
        self.contents[part.buffer] = part.number
        self.in_use.add(part.buffer)
        self.loads.append(part.number)

    def arrive(self, part: StreamedPart) -> None:
        assert self.contents[part.buffer] == part.number

    def used(self, part: StreamedPart) -> None:
        self.in_use.discard(part.buffer)

    def end_step(self) -> None:
        self.num_steps += 1

    def use(self) -> OffloadUse:
        return OffloadUse()

    def close(self) -> bool:
        return True


@pytest.mark.parametrize("num_buffers", [1, 2, 3, 4])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 6, 7])
def test_each_part_is_there_when_it_is_used(num_parts: int, num_buffers: int) -> None:
    """Some steps end early, as those do that need no logits; then the rest passes by."""
    rng = Random(num_parts)
    numbers = [2 * number for number in range(num_parts)]  # resident layers between
    carrier = CheckingCarrier()
    prefetcher = Prefetcher(parts_of(numbers, num_buffers), carrier)
    prefetcher.start()
    assert carrier.loads == numbers[:num_buffers]
    for _ in range(10):
        before = len(carrier.loads)
        for part in range(rng.choice((1, num_parts, 2 * num_parts))):
            prefetcher.before(part)
            prefetcher.after(part)
        prefetcher.end()
        assert SIZE * (len(carrier.loads) - before) == prefetcher.bytes_per_step
    assert carrier.num_steps == 10


def test_parts_that_have_a_buffer_each_are_brought_once() -> None:
    prefetcher = Prefetcher(parts_of([0, 1, 2], 2), CheckingCarrier())
    assert prefetcher.bytes_per_step == 2 * SIZE, "the second has its buffer for itself"
    assert not Prefetcher(parts_of([0, 1, 2], 3), CheckingCarrier()).bytes_per_step


def test_what_begins_no_part_ends_no_step() -> None:
    carrier = CheckingCarrier()
    prefetcher = Prefetcher(parts_of([3], 1), carrier)
    prefetcher.start()
    for part in range(3):
        prefetcher.before(part)
        prefetcher.after(part)
    prefetcher.end()
    assert carrier.num_steps == 0


@dataclass(frozen=True)
class SlowRegion:
    """Cannot be read until it is allowed."""

    allowed: threading.Event
    error: Exception | None = None
    tier: Tier = "disk"
    num_bytes: int = SIZE

    def write(self, offset: int, tensor: torch.Tensor) -> None:
        raise AssertionError("it is read only")

    def read_into(self, offset: int, out: torch.Tensor) -> None:
        assert self.allowed.wait(LIMIT_S)
        if self.error is not None:
            raise self.error
        out.fill_(7)


def test_a_gate_waits_for_the_disk_in_its_own_thread() -> None:
    """Loading goes on beside the thread that computes, and the gate holds that up."""
    allowed = threading.Event()
    buffer = torch.zeros(SIZE, dtype=torch.uint8)
    carrier = HostCarrier([buffer])
    part = StreamedPart(0, 0, (Piece(SlowRegion(allowed), 0, SIZE, 0),))
    prefetcher = Prefetcher([part], carrier)
    passed: list[list[int]] = []

    def compute() -> None:
        prefetcher.before(0)
        passed.append(buffer.tolist())

    try:
        prefetcher.start()  # returns at once
        computing = threading.Thread(target=compute)
        computing.start()
        assert not passed
        allowed.set()
        computing.join(LIMIT_S)
        assert passed == [[7] * SIZE]
        assert carrier.use().wait_s > 0
    finally:
        allowed.set()
        carrier.close()


def test_what_the_disk_says_is_raised_at_the_gate() -> None:
    allowed = threading.Event()
    allowed.set()
    region = SlowRegion(allowed, EnvironmentSetupError("the disk is ill"))
    carrier = HostCarrier([torch.zeros(SIZE, dtype=torch.uint8)])
    prefetcher = Prefetcher([StreamedPart(0, 0, (Piece(region, 0, SIZE, 0),))], carrier)
    try:
        prefetcher.start()
        with pytest.raises(EnvironmentSetupError, match="the disk is ill"):
            prefetcher.before(0)
    finally:
        carrier.close()


def test_the_event_loop_lives_while_a_step_waits_for_the_disk() -> None:
    """Heartbeats and messages go on: here it is the loop that lets the disk answer."""
    allowed = threading.Event()
    carrier = HostCarrier([torch.zeros(SIZE, dtype=torch.uint8)])
    part = StreamedPart(0, 0, (Piece(SlowRegion(allowed), 0, SIZE, 0),))
    prefetcher = Prefetcher([part], carrier)

    async def session() -> None:
        stream = CpuStream(torch.device("cpu"), ScriptedClock(), ProgressEngine())
        try:
            async with asyncio.timeout(LIMIT_S):
                computing = asyncio.ensure_future(stream.compute(lambda: prefetcher.before(0)))
                await asyncio.sleep(0)
                assert not computing.done()
                allowed.set()
                await computing
        finally:
            stream.close()

    prefetcher.start()
    try:
        asyncio.run(session())
    finally:
        allowed.set()
        carrier.close()
