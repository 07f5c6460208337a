"""A stage's transfers. Those of decode steps move the same memory again and again: prepared once.

Prepared where graphs leave their results at fixed addresses, that is with CUDA graphs, and where
the channel can repeat a transfer (`RepeatingChannel`); plain transfers everywhere else. The two
ends of an edge may differ in that, as both move all rows of a graph, padding included.

Why a repeated send needs no copy. Hidden states leave on the stream, before any later
replay, of whatever slot, writes to their memory. Ids leave on a stream of their own, which later
replays do not wait for; so a graph puts them where only its slot's graphs write
(`StageTensors.sent_ids`), and the slot's next step has its input from the head, which has
received these ids by then (`StageWorker._receive_needed`).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mpipipe.control_plane.messages import DecodeScheduled, StepScheduled
from mpipipe.data_plane.channel import EdgeKind, RepeatingChannel

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mpipipe.clock import Clock
    from mpipipe.data_plane.channel import TensorChannel, Transfer
    from mpipipe.planning.plan import PipelinePlan, StagePlan
    from mpipipe.stage.engine import StageEngine

__all__ = ["StageTransfers"]

_Step = StepScheduled | DecodeScheduled
_Memory = tuple[EdgeKind, int, int]  # address, bytes


class StageTransfers:
    """This stage's ends of its edges.

    Args:
        channel: carries the tensors.
        clock: monotonic seconds.
        fixed: the tensors of decode steps stay where they are as long as the channel is open.
        most_unsent: sends under way at most, see `make_room`; None: they are not counted.
    """

    def __init__(
        self,
        channel: TensorChannel,
        clock: Clock,
        *,
        fixed: bool,
        most_unsent: int | None = None,
    ) -> None:
        self.awaited_s = 0.0  # spent so far until receives were on the stream: others' time
        self._channel = channel
        self._clock = clock
        self._repeating = channel if fixed and isinstance(channel, RepeatingChannel) else None
        self._sends: dict[_Memory, Callable[[], None]] = {}
        self._receives: dict[_Memory, Callable[[], None]] = {}
        self._most_unsent = most_unsent
        self._unsent: deque[Transfer] = deque()

    def prepare(self, plan: PipelinePlan, stage: StagePlan, lane: int, engine: StageEngine) -> None:
        """Prepare what the captured decode steps will move, as their first transfers would."""
        if self._repeating is None or len(plan.stages) == 1:
            return
        kind, to = EdgeKind.IDS, plan.rank_of(0, lane)
        if not stage.has_head:
            kind, to = EdgeKind.HIDDEN, plan.rank_of(stage.stage + 1, lane)
        for result in engine.graph_runner.results():
            self._repeated_send(self._repeating, result, to, kind)
        kind, source = EdgeKind.IDS, plan.rank_of(-1, lane)
        if not stage.has_embedding:
            kind, source = EdgeKind.HIDDEN, plan.rank_of(stage.stage - 1, lane)
        for buffer in engine.input_buffers():
            self._repeated_receive(self._repeating, buffer, source, kind)

    def send(self, step: _Step, tensor: torch.Tensor, to: int, kind: EdgeKind) -> None:
        """Add a send of what `step` made."""
        if self._repeating is None or step.has_chunks:
            transfer = self._channel.send(tensor, destination=to, kind=kind)
            if self._most_unsent is not None:
                self._unsent.append(transfer)
            return
        self._repeated_send(self._repeating, tensor, to, kind)()

    async def make_room(self) -> None:
        """Wait until one more send may be under way.

        A round of unfinished sends means that the next stage has stopped taking them; waiting here
        shows up as send time.
        """
        while self._most_unsent is not None and len(self._unsent) >= self._most_unsent:
            await self._unsent.popleft().wait()

    async def finish_sends(self) -> None:
        """Wait for what is under way."""
        while self._unsent:
            await self._unsent.popleft().wait()

    def start_receive(self, buffer: torch.Tensor, source: int, kind: EdgeKind) -> Transfer:
        """Start a receive that the stage waits for later, in the order of its steps."""
        return self._channel.receive(buffer, source=source, kind=kind)

    async def receive(
        self,
        step: StepScheduled | DecodeScheduled,
        buffer: torch.Tensor,
        source: int,
        kind: EdgeKind,
    ) -> None:
        """Add a receive of what `step` needs, or made."""
        if self._repeating is None or step.has_chunks:
            transfer = self._channel.receive(buffer, source=source, kind=kind)
            started_s = self._clock.now_s()
            await transfer.wait()
            self.awaited_s += self._clock.now_s() - started_s
            return
        self._repeated_receive(self._repeating, buffer, source, kind)()

    def _repeated_send(
        self, repeating: RepeatingChannel, tensor: torch.Tensor, to: int, kind: EdgeKind
    ) -> Callable[[], None]:
        key = (kind, tensor.data_ptr(), tensor.nbytes)
        send = self._sends.get(key)
        if send is None:
            send = repeating.repeated_send(tensor, destination=to, kind=kind)
            self._sends[key] = send
        return send

    def _repeated_receive(
        self, repeating: RepeatingChannel, buffer: torch.Tensor, source: int, kind: EdgeKind
    ) -> Callable[[], None]:
        key = (kind, buffer.data_ptr(), buffer.nbytes)
        receive = self._receives.get(key)
        if receive is None:
            receive = repeating.repeated_receive(buffer, source=source, kind=kind)
            self._receives[key] = receive
        return receive
