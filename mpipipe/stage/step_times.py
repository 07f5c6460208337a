"""When a stage had computed its steps, told to the stage that gets the results.

So a stage can tell waiting for the other's compute from waiting for the tensor (`StageAccount`).
The last stage tells the first, which waits for ids. A batch of steps is one message, and no batch
is older than a quarter of a second: a line about a step must not stay in memory for long.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import TYPE_CHECKING

from mpipipe.control_plane.messages import StepTimes

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.clock import Clock
    from mpipipe.control_plane.mesh import Mesh
    from mpipipe.metrics.accounting import StageAccount
    from mpipipe.planning.plan import PipelinePlan

__all__ = ["StepTimesLink"]

_BATCH_STEPS = 64
_BATCH_AGE_S = 0.25
# A stage that is stopped or overloaded tells late; what waits for it here is told without.
_GIVE_UP_S = 2.0
_SETTLE_S = 1.0


class StepTimesLink:
    """One stage's end of the messages to the stage behind it and from the stage before it.

    Args:
        plan: the agreed plan, of two stages or more.
        stage: the number of this one.
        lane: this rank's, which tells the same lane of the next stage.
        mesh: control messages.
        account: told what the stage before tells.
        clock: monotonic seconds, those of the times.
        ahead_s: by rank, how far its clock is ahead of the head's, as far as it is known.
    """

    def __init__(
        self,
        plan: PipelinePlan,
        stage: int,
        *,
        lane: int = 0,
        mesh: Mesh,
        account: StageAccount,
        clock: Clock,
        ahead_s: Callable[[int], float],
    ) -> None:
        self._next_rank = plan.rank_of((stage + 1) % plan.num_stages, lane)
        self._mesh = mesh
        self._account = account
        self._clock = clock
        self._ahead_s = ahead_s
        self._mailbox = mesh.mailbox(StepTimes)
        self._num_told = 0
        self._batch: list[float] = []

    def computed(self, at_s: float) -> None:
        """This stage had computed its next step at `at_s`."""
        self._batch.append(at_s)
        if len(self._batch) >= _BATCH_STEPS:
            self.flush()

    def flush(self) -> None:
        """Tell what is not told yet."""
        if self._batch:
            self._mesh.send(self._next_rank, StepTimes(self._num_told, tuple(self._batch)))
            self._num_told += len(self._batch)
            self._batch.clear()

    def poll(self) -> None:
        """Take what was told here, and tell what has become old."""
        self._take()
        if self._batch and self._clock.now_s() - self._batch[0] > _BATCH_AGE_S:
            self.flush()
        if not self._account.is_divided:
            self._account.give_up(self._clock.now_s() - _GIVE_UP_S)

    async def settle(self) -> None:
        """Wait a moment for the times that are still due, after a call has ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                self._take()
                while not self._account.is_divided:
                    await self._mailbox.wait()
                    self._take()
        self._account.give_up(float("inf"))

    def _take(self) -> None:
        while self._mailbox.num_waiting and (received := self._mailbox.get_nowait()) is not None:
            source, told = received
            assert isinstance(told, StepTimes)
            shift_s = self._ahead_s(self._mesh.rank) - self._ahead_s(source)
            # Of a clock that is not known yet: these steps are told without the division.
            is_known = not math.isnan(shift_s)
            times_s = [at_s + shift_s if is_known else None for at_s in told.computed_s]
            self._account.upstream_computed(told.first_step, times_s)
