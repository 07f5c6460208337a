"""The asyncio loop of one stage. Decides nothing.

The head's messages are followed in their order; each step is added to the stream: receive, compute,
send. What the device has done is noticed by a poll: ids that reached the host go to the scheduler,
log-probabilities to the head, device times to the account.

On a GPU one task follows each message as it comes, and nothing waits for the device. The ids of a
step are received right before the step that needs them, or one round later (`num_slots` steps),
whichever is earlier: a receive that is added before its data exists keeps the stream, and one GPU
core, waiting.

The lanes of a stage (tensor parallelism) do all of this alike, each with the same lane of the other
stages; the first tells the head.

On a CPU, whose steps compute in a thread, three tasks share the work, so that no step waits for
another's communication: the task that receives starts each step's receive as soon as its message is
here, *follow* runs the steps, *return* (first of several stages) receives ids as they come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch

from mpipipe.control_plane.messages import (
    DecodeScheduled,
    GenerationBegan,
    GenerationEnded,
    LogprobsSampled,
    PagesRestored,
    PagesSaved,
    RequestClosed,
    RequestOpened,
    SessionEnded,
    StepSampled,
    StepScheduled,
)
from mpipipe.data_plane.channel import EdgeKind
from mpipipe.errors import NumericsError
from mpipipe.stage.device_logprobs import logprobs_of
from mpipipe.stage.device_use import DeviceUse
from mpipipe.stage.edges import exercise_edges
from mpipipe.stage.ranges import NO_RANGES
from mpipipe.stage.stage_transfers import StageTransfers
from mpipipe.stage.timeline import StepEvents

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.clock import Clock
    from mpipipe.control_plane.mesh import Mesh
    from mpipipe.data_plane.channel import TensorChannel, Transfer
    from mpipipe.metrics.offload import OffloadUse
    from mpipipe.planning.plan import PipelinePlan, StagePlan
    from mpipipe.progress import ProgressEngine
    from mpipipe.stage.engine import StageEngine
    from mpipipe.stage.launched import LaunchedStep, LogprobTensors
    from mpipipe.stage.ranges import Ranges
    from mpipipe.stage.stream import Event, Stream
    from mpipipe.stage.timeline import StreamTimeline

__all__ = ["StageWorker"]

_Step = StepScheduled | DecodeScheduled
_FROM_HEAD = (
    RequestOpened,
    StepScheduled,
    DecodeScheduled,
    RequestClosed,
    PagesSaved,
    PagesRestored,
    GenerationBegan,
    GenerationEnded,
    SessionEnded,
)
_NUM_RECENT = 4096


@dataclass(frozen=True, slots=True)
class _Arriving:
    """A step's hidden states, on their way before the step's turn."""

    hidden_TH: torch.Tensor
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class _Returning:
    """A step on the stream whose outcome the scheduler awaits (first stage)."""

    step: _Step
    request_rows_S: torch.Tensor


@dataclass(frozen=True, slots=True)
class _OnTheWay:
    """Ids (or none) that the host has once the event is reached."""

    step: _Step
    ids_S: torch.Tensor | None
    event: Event


class StageWorker:
    """Runs the stage of this rank for one `generate` call after another.

    Args:
        plan: the agreed plan.
        stage: this rank's part of it.
        mesh: control messages.
        channel: tensors; its waits return in the order of the stream.
        engine: puts steps on the stream.
        stream: the device.
        timeline: told where the device's time goes.
        progress: polls for what the device has done.
        clock: monotonic seconds.
        ranges: names the steps for a profiler.
        offload_use: tells how offloaded weights came so far; None: there are none.
    """

    def __init__(
        self,
        *,
        plan: PipelinePlan,
        stage: StagePlan,
        mesh: Mesh,
        channel: TensorChannel,
        engine: StageEngine,
        stream: Stream,
        timeline: StreamTimeline,
        progress: ProgressEngine,
        clock: Clock,
        ranges: Ranges = NO_RANGES,
        offload_use: Callable[[], OffloadUse | None] = lambda: None,
    ) -> None:
        self._plan = plan
        self._stage = stage
        self._mesh = mesh
        self._channel = channel
        fixed, most_unsent = engine.graph_runner.use_graphs, plan.num_slots
        self._transfers = StageTransfers(
            channel, clock, fixed=fixed, most_unsent=most_unsent if engine.free_inputs else None
        )
        self._engine = engine
        self._stream = stream
        self._timeline = timeline
        self._progress = progress
        self._clock = clock
        self._ranges = ranges
        self._offload_use = offload_use
        self._launches_s: deque[float] = deque(maxlen=_NUM_RECENT)  # of this call's decode steps
        self._us_per_launch: float | None = None  # of the latest call that had any
        self._returning: deque[_Returning] = deque()  # ids not received yet, in order
        self._on_the_way: deque[_OnTheWay] = deque()
        self._logprobs: deque[tuple[int, LogprobTensors, Event]] = deque()
        self._received = -1  # the latest step whose ids have been received
        self._id_bytes = 0  # of ids received since a step was launched
        self._ids_due = asyncio.Event()  # a step was launched whose ids will return
        self._ids_here = asyncio.Event()  # `_received` has changed
        self._mailbox = mesh.mailbox(*_FROM_HEAD)

    @property
    def is_first(self) -> bool:
        """Whether this stage embeds token ids."""
        return self._stage.has_embedding

    @property
    def is_last(self) -> bool:
        """Whether this stage samples."""
        return self._stage.has_head

    @property
    def _lane(self) -> int:
        return self._stage.ranks.index(self._mesh.rank)

    async def serve(self, began: Callable[[], object] = lambda: None) -> bool:
        """Run steps until the head ends this generate call; False: the head ended the session.

        `began` is told when the call begins.
        """
        _, first = await self._mailbox.get()
        if isinstance(first, SessionEnded):
            return False
        assert isinstance(first, GenerationBegan), first
        self._timeline.begin(self._clock.now_s())
        began()
        self._launches_s.clear()
        unregister = self._progress.register(self._poll)
        try:
            await (self._serve_in_tasks() if self._engine.free_inputs else self._serve_at_once())
            self._stream.drain()
            self._poll()
        finally:
            unregister()
        assert not self._returning, "the head ends a call when all steps have come back"
        self._timeline.end(self._clock.now_s(), bytes_in=self._id_bytes)
        self._id_bytes = 0
        if self._launches_s:
            self._us_per_launch = median(self._launches_s) * 1e6
        self._engine.clear()
        return True

    async def settle(self) -> None:
        """After a call: wait a moment until this stage's times are known as far as they will be."""
        await self._timeline.settle()

    def device_use(self) -> DeviceUse:
        """Memory of the device; median host time of the latest call's decode steps; offloading.

        Of memory and time nothing on a CPU, where computing is the host's time.
        """
        return DeviceUse(
            self._stream.peak_bytes(),
            self._us_per_launch,
            self._offload_use(),
            self._engine.page_moves(),
        )

    async def exercise_edges(self) -> None:
        """Use every edge once, and prepare what repeats on it, so that no step pays for set-up."""
        stage, lane = self._stage, self._lane
        await exercise_edges(self._plan, stage, lane, self._channel, self._stream.device)
        self._stream.drain()
        self._transfers.prepare(self._plan, stage, lane, self._engine)

    # ---- messages --------------------------------------------------------------------------------

    async def _serve_at_once(self) -> None:
        while not isinstance(message := await self._next(), GenerationEnded):
            await self._follow(message)

    async def _next(self) -> object:
        """The next message. Before waiting for one, receive the ids that no step has asked for."""
        while (received := self._mailbox.get_nowait()) is None:
            if self._returning and not self._on_the_way:
                await self._receive_ids()
            else:
                await self._mailbox.wait()
        return received[1]

    async def _serve_in_tasks(self) -> None:
        queue: asyncio.Queue[tuple[object, _Arriving | None]] = asyncio.Queue()
        self._received = -1
        async with asyncio.TaskGroup() as tasks:
            returning = tasks.create_task(self._return_ids(), name="return")
            following = tasks.create_task(self._follow_queue(queue), name="follow")
            message: object = None
            while not isinstance(message, GenerationEnded):
                _, message = await self._mailbox.get()
                queue.put_nowait((message, self._expect(message)))
            await following
            returning.cancel()

    def _expect(self, message: object) -> _Arriving | None:
        """Let a step's hidden states come while the steps before it compute."""
        if self.is_first or not isinstance(message, StepScheduled | DecodeScheduled):
            return None
        hidden_TH = self._engine.hidden_buffer(message)
        transfer = self._transfers.start_receive(hidden_TH, self._neighbour(-1), EdgeKind.HIDDEN)
        return _Arriving(hidden_TH, transfer)

    async def _follow_queue(self, queue: asyncio.Queue[tuple[object, _Arriving | None]]) -> None:
        while True:
            message, arriving = await queue.get()
            if isinstance(message, GenerationEnded):
                break
            await self._follow(message, arriving)
        await self._transfers.finish_sends()

    async def _return_ids(self) -> None:
        while True:
            await self._ids_due.wait()
            self._ids_due.clear()
            while self._returning:
                await self._receive_ids()

    async def _follow(self, message: object, arriving: _Arriving | None = None) -> None:
        match message:
            case StepScheduled() | DecodeScheduled():
                await self._launch(message, arriving)
            case RequestOpened():
                self._engine.open(message)
            case RequestClosed():
                self._engine.close(message.sequence_ids)
            case PagesSaved() | PagesRestored():
                await self._stream.compute(partial(self._engine.move_pages, message))
            case _:
                raise AssertionError(f"the mailbox does not carry {type(message).__name__}")

    async def _launch(self, step: _Step, arriving: _Arriving | None) -> None:
        """Put a step on the stream: receive, compute, send."""
        stream, engine = self._stream, self._engine
        started_s = self._clock.now_s() - self._transfers.awaited_s
        taken_up = stream.record_event()
        hidden_TH, needs, input_there = None, step.step, None
        if arriving is not None:
            hidden_TH = arriving.hidden_TH
            await arriving.transfer.wait()
        elif not self.is_first:
            hidden_TH = engine.hidden_buffer(step)
            await self._transfers.receive(step, hidden_TH, self._neighbour(-1), EdgeKind.HIDDEN)
        elif not self.is_last:
            needs, input_there = await self._receive_needed(step)
        else:
            needs = -1
        input_there = input_there or stream.record_event()
        if isinstance(step, DecodeScheduled):
            work = partial(engine.decode, step, hidden_TH)
        else:
            work = partial(engine.prefill, step, hidden_TH)
        launched = await stream.compute(self._ranges.step(step, work))
        computed, compute_s = stream.record_event(), stream.compute_s
        if engine.free_inputs:
            await self._transfers.make_room()
        self._pass_on(step, launched)
        events = StepEvents(step, taken_up, input_there, computed, stream.record_event(), compute_s)
        events.needs = needs
        events.bytes_in = self._id_bytes if hidden_TH is None else hidden_TH.nbytes
        events.bytes_out = 0 if self.is_first and self.is_last else launched.result.nbytes
        self._id_bytes = 0
        self._timeline.add(events)
        self._progress.wake()
        if step.phase == "decode" and compute_s is None:
            self._launches_s.append(self._clock.now_s() - self._transfers.awaited_s - started_s)

    def _pass_on(self, step: _Step, launched: LaunchedStep) -> None:
        """Send what the step made, and note what is to come back."""
        if not self.is_last:
            self._transfers.send(step, launched.result, self._neighbour(+1), EdgeKind.HIDDEN)
        elif not self.is_first:
            first = self._plan.rank_of(0, self._lane)
            self._transfers.send(step, launched.result, first, EdgeKind.IDS)
        if launched.logprobs is not None and self._lane == 0:
            self._logprobs.append((step.step, launched.logprobs, self._stream.record_event()))
        if not self.is_first:
            return
        if self.is_last:
            self._bring_to_host(step, launched.result if step.num_sampled else None)
        else:
            self._returning.append(_Returning(step, launched.request_rows_S))
            self._ids_due.set()

    # ---- ids, on the first stage -----------------------------------------------------------------

    async def _receive_needed(self, step: _Step) -> tuple[int, Event | None]:
        """Receive the ids that `step` reads, and all that are a round old.

        Returns the latest such step, and the event behind the last ids; None: there is none here.
        """
        if self._engine.free_inputs:
            return await self._wait_for_ids(step), None
        needed = step.step - self._plan.num_slots
        if isinstance(step, DecodeScheduled):
            needed = max(needed, self._engine.needed_sample(step))
        here: Event | None = None
        while self._returning and self._returning[0].step.step <= needed:
            here = await self._receive_ids()
        return needed, here

    async def _wait_for_ids(self, step: _Step) -> int:
        """Wait until the return task has received the ids that `step` reads."""
        if not isinstance(step, DecodeScheduled):
            return -1
        needed = self._engine.needed_sample(step)
        while self._received < needed:
            self._ids_here.clear()
            await self._ids_here.wait()
        return needed

    async def _receive_ids(self) -> Event:
        """Receive the oldest ids that are still out, for the next steps and for the host.

        Returns the event behind all of it.
        """
        returning = self._returning.popleft()
        step = returning.step
        if not step.has_chunks and not self._engine.free_inputs:
            ids_S = self._engine.ids_buffer(len(returning.request_rows_S))
        else:
            num_ids = step.num_sampled or 1  # `LaunchedStep.result`: a sign that the step is done
            ids_S = torch.empty(num_ids, dtype=torch.int64, device=self._stream.device)
        last = self._plan.rank_of(-1, self._lane)
        await self._transfers.receive(step, ids_S, last, EdgeKind.IDS)
        self._id_bytes += ids_S.nbytes
        if step.num_sampled:
            with torch.inference_mode():
                self._engine.take_ids(returning.request_rows_S, ids_S)
        self._received = step.step
        self._ids_here.set()
        return self._bring_to_host(step, ids_S if step.num_sampled else None)

    def _bring_to_host(self, step: _Step, ids_S: torch.Tensor | None) -> Event:
        host_S = None if ids_S is None else self._stream.download(ids_S)
        here = self._stream.record_event()
        self._on_the_way.append(_OnTheWay(step, host_S, here))
        self._progress.wake()
        return here

    # ---- what the device has done ----------------------------------------------------------------

    def _poll(self) -> bool:
        """Called by the progress engine: hand on what has arrived; True if anything had."""
        active = False
        while self._on_the_way and self._on_the_way[0].event.query():
            self._hand_on(self._on_the_way.popleft())
            active = True
        while self._logprobs and self._logprobs[0][2].query():
            step, tensors, _ = self._logprobs.popleft()
            entries = logprobs_of(
                tensors.ids_S,
                tensors.chosen_S,
                tensors.top_ids_SK,
                tensors.top_values_SK,
                tensors.num_top,
            )
            self._mesh.send(self._plan.head_rank, LogprobsSampled(step, entries))
            active = True
        return self._timeline.collect() or active

    def _hand_on(self, arrived: _OnTheWay) -> None:
        number = arrived.step.step
        token_ids: tuple[int, ...] = ()
        if arrived.ids_S is not None:  # behind the sequences' may be ids of rows without one
            token_ids = tuple(arrived.ids_S.tolist()[: arrived.step.num_sampled])
        if token_ids and min(token_ids) < 0:
            raise NumericsError(
                f"the model's logits are not finite for {sum(i < 0 for i in token_ids)} of "
                f"{len(token_ids)} sequences of step {number}: most likely its activations "
                f"overflowed in {self._plan.dtype}, or a weight file is damaged; set model.dtype "
                "to bfloat16 or float32, or copy the model again"
            )
        if self._lane == 0:  # on the head
            self._mesh.send(self._mesh.rank, StepSampled(number, token_ids))
        self._mailbox.wake()  # with nothing left to launch, the next ids may now be received

    def _neighbour(self, offset: int) -> int:
        return self._plan.rank_of(self._stage.stage + offset, self._lane)
