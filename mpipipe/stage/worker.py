"""The asyncio loop of one stage: receive, compute, send, overlapped. Decides nothing.

Three tasks share the work, so that no step waits for another's communication:

* *intake* follows the head's messages and posts each step's receive as soon as the step is known;
* *compute* runs the steps in order in one compute thread, while the event loop keeps MPI moving;
* *return* (first stage) waits for the ids of each step and hands them to the scheduler.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mpipipe.control_plane.messages import (
    GenerationBegan,
    GenerationEnded,
    LogprobsSampled,
    RequestClosed,
    RequestOpened,
    SessionEnded,
    StepSampled,
    StepScheduled,
)
from mpipipe.data_plane.channel import EdgeKind
from mpipipe.stage.device_use import DeviceUse
from mpipipe.stage.edges import exercise_edges
from mpipipe.stage.executor import PreparedStep, StepOutput
from mpipipe.stage.sequences import SequenceTable

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from mpipipe.clock import Clock
    from mpipipe.control_plane.mesh import Mesh
    from mpipipe.data_plane.channel import TensorChannel, Transfer
    from mpipipe.metrics.accounting import StageAccount
    from mpipipe.planning.plan import PipelinePlan, StagePlan
    from mpipipe.progress import ProgressEngine
    from mpipipe.stage.executor import StageExecutor

__all__ = ["StageWorker"]


@dataclass(frozen=True, slots=True)
class _ReadyStep:
    """A step whose input is on its way."""

    prepared: PreparedStep
    hidden_TH: torch.Tensor | None
    receive: Transfer | None


@dataclass(frozen=True, slots=True)
class _ReturningStep:
    """A step whose ids are on their way back to the first stage."""

    message: StepScheduled
    ids_S: torch.Tensor
    receive: Transfer


class StageWorker:
    """Runs the stage of this rank for one `generate` call after another.

    Args:
        plan: the agreed plan.
        stage: this rank's part of it.
        mesh: control messages.
        channel: tensors.
        executor: computes a step.
        thread: the stage's only compute thread.
        engine: told while the stage computes, so that polling does not steal the core.
        account: told where the time goes.
        clock: monotonic seconds.
        dtype: of the hidden states on the edges.
    """

    def __init__(
        self,
        *,
        plan: PipelinePlan,
        stage: StagePlan,
        mesh: Mesh,
        channel: TensorChannel,
        executor: StageExecutor,
        thread: Executor,
        engine: ProgressEngine,
        account: StageAccount,
        clock: Clock,
        dtype: torch.dtype,
    ) -> None:
        self._plan = plan
        self._stage = stage
        self._mesh = mesh
        self._channel = channel
        self._executor = executor
        self._thread = thread
        self._engine = engine
        self._account = account
        self._clock = clock
        self._dtype = dtype
        self._table = SequenceTable()
        self._closed: list[int] = []
        self._sends: deque[tuple[Transfer, torch.Tensor]] = deque()
        self._ready: asyncio.Queue[_ReadyStep | None] = asyncio.Queue()
        self._returning: asyncio.Queue[_ReturningStep | None] = asyncio.Queue()
        self._mailbox = mesh.mailbox(
            GenerationBegan,
            RequestOpened,
            StepScheduled,
            RequestClosed,
            GenerationEnded,
            SessionEnded,
        )

    @property
    def is_first(self) -> bool:
        """Whether this stage embeds token ids."""
        return self._stage.has_embedding

    @property
    def is_last(self) -> bool:
        """Whether this stage samples."""
        return self._stage.has_head

    async def serve(self) -> bool:
        """Run steps until the head ends this generate call; False: the head ended the session."""
        _, first = await self._mailbox.get()
        if isinstance(first, SessionEnded):
            return False
        assert isinstance(first, GenerationBegan), first
        self._account.begin(self._clock.now_s())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._intake(), name="intake")
            tasks.create_task(self._compute(), name="compute")
            if self.is_first:
                tasks.create_task(self._return_ids(), name="return")
        self._account.end(self._clock.now_s())
        self._closed.extend(self._table.clear())
        return True

    def device_use(self) -> DeviceUse:
        """Nothing: on a CPU computing is Python's own time."""
        return DeviceUse()

    async def exercise_edges(self) -> None:
        """Send one small tensor over every edge of this stage, so that no step pays for set-up."""
        await exercise_edges(self._plan, self._stage, self._channel, torch.device("cpu"))

    # ---- intake ----------------------------------------------------------------------------------

    async def _intake(self) -> None:
        while True:
            _, message = await self._mailbox.get()
            match message:
                case StepScheduled():
                    self._take_step(message)
                case RequestOpened():
                    self._table.open(message)
                case RequestClosed():
                    self._table.close(message.sequence_ids)
                    self._closed.extend(message.sequence_ids)
                case GenerationEnded():
                    self._ready.put_nowait(None)
                    self._returning.put_nowait(None)
                    return
                case _:
                    raise AssertionError(f"the mailbox does not carry {type(message).__name__}")

    def _take_step(self, message: StepScheduled) -> None:
        self._account.step_scheduled(message.step, self._clock.now_s())
        prepared = PreparedStep(
            message=message,
            placed=self._table.place(message),
            input_ids=self._table.input_ids(message) if self.is_first else (),
            sample_rows=self._table.sample_rows(message) if self.is_last else (),
            forget=tuple(self._closed),
        )
        self._closed.clear()
        hidden_TH, receive = None, None
        if not self.is_first:
            hidden_TH = torch.empty(message.num_tokens, self._plan.hidden_size, dtype=self._dtype)
            receive = self._channel.receive(
                hidden_TH, source=self._neighbour(-1), kind=EdgeKind.HIDDEN
            )
        if self.is_first:
            ids_S = torch.empty(message.num_sampled, dtype=torch.int64)
            transfer = self._channel.receive(ids_S, source=self._plan.last_rank, kind=EdgeKind.IDS)
            self._returning.put_nowait(_ReturningStep(message, ids_S, transfer))
        self._ready.put_nowait(_ReadyStep(prepared, hidden_TH, receive))

    def _neighbour(self, offset: int) -> int:
        return self._plan.stages[self._stage.stage + offset].rank

    # ---- compute ---------------------------------------------------------------------------------

    async def _compute(self) -> None:
        while (ready := await self._ready.get()) is not None:
            step = ready.prepared.message
            if ready.receive is not None:
                await ready.receive.wait()
            self._account.input_ready(step.step, self._clock.now_s())
            output = await self._run(ready)
            self._account.computed(step.step, self._clock.now_s(), output.compute_s)
            await self._send(step, output)
            self._account.sent(step, self._clock.now_s())
        while self._sends:
            await self._sends.popleft()[0].wait()

    async def _run(self, ready: _ReadyStep) -> StepOutput:
        loop = asyncio.get_running_loop()
        with self._engine.computing():
            return await loop.run_in_executor(
                self._thread, self._executor.run, ready.prepared, ready.hidden_TH
            )

    async def _send(self, step: StepScheduled, output: StepOutput) -> None:
        if self.is_last:
            if not self.is_first:
                self._table.append_sampled(step, output.tensor.tolist())
            if output.logprobs is not None:
                self._mesh.send(self._plan.head_rank, LogprobsSampled(step.step, output.logprobs))
            destination, kind = self._plan.head_rank, EdgeKind.IDS
        else:
            destination, kind = self._neighbour(+1), EdgeKind.HIDDEN
        # The tensor must outlive its transfer; more than a lap of unfinished sends means that the
        # next stage has stopped taking them, and waiting here shows up as send time.
        while len(self._sends) >= self._plan.num_slots:
            await self._sends.popleft()[0].wait()
        transfer = self._channel.send(output.tensor, destination=destination, kind=kind)
        self._sends.append((transfer, output.tensor))

    # ---- ids -------------------------------------------------------------------------------------

    async def _return_ids(self) -> None:
        while (returning := await self._returning.get()) is not None:
            await returning.receive.wait()
            token_ids: tuple[int, ...] = tuple(returning.ids_S.tolist())
            self._table.append_sampled(returning.message, token_ids)
            self._mesh.send(self._mesh.rank, StepSampled(returning.message.step, token_ids))
