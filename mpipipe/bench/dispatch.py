"""`mpipipe bench dispatch`: how many short prompts rank 0 hands out a second, stages left out.

Everything but the stages is what a run has: rank 0's dispatch, the heads' runners and schedulers,
the messages between them. A stage answers each step at once. Rank 0 has no replica here, so that
its own share can be told; with one rank all replicas are virtual ones in this process.
"""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import aclosing
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from mpipipe.control_plane import codec
from mpipipe.control_plane.group import RankGroup
from mpipipe.control_plane.mailbox import Mailbox
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.control_plane.messages import (
    DecodeScheduled,
    DispatchBegan,
    DispatchEnded,
    Message,
    ReplicaTold,
    RequestsGiven,
    StepSampled,
    StepScheduled,
)
from mpipipe.metrics.log import NullLog
from mpipipe.runtime.handshake import exchange_resources
from mpipipe.runtime.ranks import open_ranks
from mpipipe.scheduler.core import SchedulerCore, SchedulerLimits
from mpipipe.scheduler.replicas import Dispatch, ReplicaLink, ReplicaPlace
from mpipipe.scheduler.runner import Runner
from mpipipe.scheduler.texts import TextMaker
from mpipipe.types import Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.clock import Clock
    from mpipipe.progress import ProgressEngine

__all__ = [
    "DispatchOptions",
    "DispatchRates",
    "measure_dispatch",
    "measure_in_process",
    "measure_over",
]

_MEET_S = 60.0
_TOKEN_ID = 1000
_PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class DispatchOptions:
    """What is dispatched."""

    num_prompts: int = 40_000
    input_tokens: int = 16
    output_tokens: int = 1
    capacity: int = 256  # sequences that a replica runs at once
    num_virtual: int = 8  # replicas where there is one rank

    def requests(self) -> list[Request]:
        """The prompts, all alike."""
        prompt = (_TOKEN_ID,) * self.input_tokens
        sampling = SamplingParams(max_new_tokens=self.output_tokens, ignore_eos=True)
        return [Request(str(i), i, prompt, sampling) for i in range(self.num_prompts)]

    def core(self) -> SchedulerCore:
        """A scheduler with room for all that runs at once."""
        num_tokens = self.input_tokens + self.output_tokens
        limits = SchedulerLimits(
            num_slots=1,
            max_sequences_per_slot=self.capacity,
            max_tokens_per_step=self.capacity * self.input_tokens,
            num_pages=2 * self.capacity * -(-num_tokens // _PAGE_SIZE),
            page_size=_PAGE_SIZE,
            max_context_tokens=num_tokens,
            lookahead=0,
        )
        return SchedulerCore(limits, prefill="mixed")


@dataclass(frozen=True, slots=True)
class DispatchRates:
    """What rank 0 did. Shares are of the elapsed time; `_us` microseconds of CPU time."""

    num_replicas: int
    num_prompts: int
    elapsed_s: float
    handed_to_told_p50_s: float  # a prompt left rank 0, and its completion was there
    handling_us: float  # of rank 0, for a prompt: deciding, encoding, sending, taking completions
    decoding_us: float  # of rank 0, for a prompt: the heads' messages
    process_share: float  # of one core, that rank 0's process used; polling included
    messages_per_s: float
    bytes_per_s: float

    @property
    def prompts_per_s(self) -> float:
        """Handed out and completed."""
        return self.num_prompts / self.elapsed_s

    @property
    def busy_share(self) -> float:
        """Of rank 0: handling and decoding."""
        return (self.handling_us + self.decoding_us) * 1e-6 * self.prompts_per_s

    @property
    def most_prompts_per_s(self) -> float:
        """What a rank 0 that does nothing else could hand out, if the replicas took them."""
        return 1e6 / (self.handling_us + self.decoding_us)


async def measure_dispatch(
    clock: Clock, options: DispatchOptions, *, debug: bool = False
) -> DispatchRates | None:
    """Measure over the ranks of this launch; the result on the head, None elsewhere.

    Raises:
        ProtocolMismatchError: the ranks are of different versions.
        DeadlineError: a rank did not come.
    """
    async with open_ranks(clock, debug=debug) as ranks:
        mesh = ranks.mesh
        if mesh.world_size == 1:
            return await measure_in_process(ranks.engine, clock, options)
        await exchange_resources(ranks, "cpu", deadline_s=_MEET_S)
        return await measure_over(mesh, clock, options)


async def measure_over(mesh: Mesh, clock: Clock, options: DispatchOptions) -> DispatchRates | None:
    """Measure over two or more ranks that have met."""
    if mesh.is_head:
        return await _dispatch(mesh, clock, options)
    await _replicate(mesh, clock, options)
    return None


async def measure_in_process(
    engine: ProgressEngine, clock: Clock, options: DispatchOptions
) -> DispatchRates:
    """The same with virtual ranks in this process, which take turns: all share one core."""
    channels = open_memory_channels(1 + options.num_virtual, engine)
    meshes = [Mesh(channel, engine, clock) for channel in channels]
    for mesh in meshes:
        mesh.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            for mesh in meshes[1:]:
                tasks.create_task(_replicate(mesh, clock, options))
            return await _dispatch(meshes[0], clock, options)
    finally:
        for mesh in meshes:
            await mesh.aclose()


# ---- a replica -----------------------------------------------------------------------------------


async def _replicate(mesh: Mesh, clock: Clock, options: DispatchOptions) -> None:
    """A head and its only stage, until rank 0 ends the call."""
    group = RankGroup(mesh, [mesh.rank])
    inbox = mesh.mailbox(DispatchBegan, DispatchEnded)
    steps = mesh.mailbox(StepScheduled, DecodeScheduled)
    async with asyncio.TaskGroup() as tasks:
        stage = tasks.create_task(_answer(mesh, steps))
        await inbox.get()
        link = ReplicaLink(mesh, clock, capacity=options.capacity)
        runner = Runner(
            core=options.core(),
            group=group,
            texts=TextMaker(_text_of),
            clock=clock,
            log=NullLog(),
            on_request=link.ended,
            link=link,
        )
        async with aclosing(runner.generate(())) as completions:
            async for _ in completions:
                pass
        await inbox.get()
        stage.cancel()


async def _answer(mesh: Mesh, steps: Mailbox[tuple[int, Message]]) -> None:
    """The stage: the tokens of a step as soon as it is sent."""
    while True:
        _, step = await steps.get()
        assert isinstance(step, StepScheduled | DecodeScheduled), step
        mesh.send(mesh.rank, StepSampled(step.step, (_TOKEN_ID,) * step.num_sampled))


def _text_of(token_ids: Sequence[int]) -> str:
    return "word" * len(token_ids)


# ---- rank 0 --------------------------------------------------------------------------------------


class _TimedMailbox(Mailbox[tuple[int, Message]]):
    """A mailbox that tells when its reader is busy: from an item to asking for the next one."""

    def __init__(self, inner: Mailbox[tuple[int, Message]], messages: _TimedMessages) -> None:
        super().__init__("rank 0's, timed")
        self._inner = inner
        self._messages = messages

    async def get(self) -> tuple[int, Message]:
        """As `Mailbox.get`."""
        self._messages.paused()
        item = await self._inner.get()
        self._messages.resumed(item[1])
        return item


class _TimedMessages:
    """Rank 0's messages, and the CPU time that it works on them."""

    def __init__(self, mesh: Mesh, clock: Clock) -> None:
        self.handling_s = 0.0
        self.handed_s: dict[int, float] = {}  # by request
        self.waited_s: list[float] = []  # from there until its completion was there
        self.seen: list[Message] = []  # both ways
        self._mesh = mesh
        self._clock = clock
        self._since_cpu_s = time.thread_time()  # it is at work

    def send(self, to: int, message: Message) -> None:
        """As `Mesh.send`."""
        if isinstance(message, RequestsGiven):
            now_s = self._clock.now_s()
            self.handed_s.update((request.index, now_s) for request in message.requests)
        self.seen.append(message)
        self._mesh.send(to, message)

    def mailbox(self, *types: type[Message]) -> _TimedMailbox:
        """As `Mesh.mailbox`."""
        return _TimedMailbox(self._mesh.mailbox(*types), self)

    def paused(self) -> None:
        """It has done all that it could."""
        self.handling_s += time.thread_time() - self._since_cpu_s

    def resumed(self, message: Message) -> None:
        """It goes on with `message`."""
        now_s = self._clock.now_s()
        self._since_cpu_s = time.thread_time()
        self.seen.append(message)
        if isinstance(message, ReplicaTold):
            for record in message.records:
                self.waited_s.append(now_s - self.handed_s.pop(record.completion.index))

    def decoding_s(self) -> float:
        """CPU time that decoding the messages that came takes: all of them, once more."""
        frames = [
            codec.encode(message) for message in self.seen if isinstance(message, ReplicaTold)
        ]
        began_s = time.thread_time()
        for frame in frames:
            codec.decode(frame)
        return time.thread_time() - began_s

    def num_bytes(self) -> int:
        """Of all messages, both ways."""
        return sum(len(codec.encode(message)) for message in self.seen)


async def _dispatch(mesh: Mesh, clock: Clock, options: DispatchOptions) -> DispatchRates:
    """Hand the prompts out to all other ranks, and say what it took."""
    requests = options.requests()
    places = [ReplicaPlace(rank, options.capacity) for rank in range(1, mesh.world_size)]
    gc.collect()
    gc.freeze()  # as a boot ends
    try:
        return await _time_dispatch(mesh, clock, requests, places)
    finally:
        gc.unfreeze()


async def _time_dispatch(
    mesh: Mesh, clock: Clock, requests: list[Request], places: list[ReplicaPlace]
) -> DispatchRates:
    cpu_s, began_s = time.process_time(), clock.now_s()
    messages = _TimedMessages(mesh, clock)
    dispatch = Dispatch(messages, clock, requests, places)
    dispatch.begin()
    async with aclosing(dispatch.completions()) as completions:
        async for _ in completions:
            pass
    messages.paused()
    elapsed_s = clock.now_s() - began_s
    cpu_s = time.process_time() - cpu_s
    await dispatch.end()
    return DispatchRates(
        num_replicas=len(places),
        num_prompts=len(messages.waited_s),
        elapsed_s=elapsed_s,
        handed_to_told_p50_s=median(messages.waited_s),
        handling_us=messages.handling_s / len(requests) * 1e6,
        decoding_us=messages.decoding_s() / len(requests) * 1e6,
        process_share=cpu_s / elapsed_s,
        messages_per_s=len(messages.seen) / elapsed_s,
        bytes_per_s=messages.num_bytes() / elapsed_s,
    )
