"""Where the messages of barriers, gathers, broadcasts and phases wait for their collective.

A peer may be ahead: its message then waits here until this rank comes to the same collective. Per
kind, name and source the order is kept, so a name can be used again and again.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from mpipipe.control_plane.messages import (
    BarrierEntered,
    BarrierReleased,
    Broadcast,
    GatherPart,
    Hello,
    PhaseReport,
    PhaseVerdict,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpipipe.clock import Clock

__all__ = ["Collected", "Collective", "CollectiveT", "PendingCollectives"]

Collective = (
    Hello | PhaseReport | PhaseVerdict | BarrierEntered | BarrierReleased | Broadcast | GatherPart
)
CollectiveT = TypeVar("CollectiveT", bound=Collective)
_Key = tuple[type, str]


@dataclass(frozen=True)
class Collected(Generic[CollectiveT]):
    """The messages by source, in the order of the sources, and the sources that were late."""

    messages: dict[int, CollectiveT]
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Waiting:
    deadline_s: float  # on the clock
    future: asyncio.Future[None]


class PendingCollectives:
    """Collective messages by kind, name and source.

    Args:
        clock: that deadlines are measured on.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queues: dict[_Key, dict[int, deque[Collective]]] = {}
        self._waiting: list[_Waiting] = []

    def add(self, source: int, message: Collective) -> None:
        """Keep `message` and wake the waiting collectives."""
        queues = self._queues.setdefault((type(message), _name_of(message)), {})
        queues.setdefault(source, deque()).append(message)
        for waiting in self._waiting:
            _wake(waiting)

    def expire(self) -> bool:
        """Wake the collectives whose deadline has passed; True if there was one. Polled."""
        if not self._waiting:
            return False
        now_s = self._clock.now_s()
        late = [waiting for waiting in self._waiting if now_s >= waiting.deadline_s]
        for waiting in late:
            _wake(waiting)
        return bool(late)

    async def collect(
        self,
        kind: type[CollectiveT],
        name: str,
        sources: Sequence[int],
        limit_s: float,
        *,
        hurry_s: Callable[[CollectiveT], float | None] = lambda _: None,
    ) -> Collected[CollectiveT]:
        """One message of `kind` and `name` from each of `sources`, or what came within `limit_s`.

        Once a message has come, the others get at most `hurry_s(message)` seconds more.
        """
        deadline_s = self._clock.now_s() + limit_s
        heard: set[int] = set()
        # The key holds the kind, which the type checker cannot know.
        queues = cast("dict[int, deque[CollectiveT]]", self._queues.setdefault((kind, name), {}))
        while missing := tuple(source for source in sources if not queues.get(source)):
            now_s = self._clock.now_s()
            for source, queue in queues.items():
                if queue and source not in heard:
                    heard.add(source)
                    grace_s = hurry_s(queue[0])
                    deadline_s = min(deadline_s, now_s + (math.inf if grace_s is None else grace_s))
            if now_s >= deadline_s:
                break
            await self._wait_until(deadline_s)
        messages = {source: queues[source].popleft() for source in sources if queues.get(source)}
        return Collected(messages, missing)

    async def _wait_until(self, deadline_s: float) -> None:
        waiting = _Waiting(deadline_s, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            await waiting.future
        finally:
            self._waiting.remove(waiting)


def _wake(waiting: _Waiting) -> None:
    if not waiting.future.done():
        waiting.future.set_result(None)


def _name_of(message: Collective) -> str:
    match message:
        case Hello():
            return ""
        case PhaseReport() | PhaseVerdict():
            return message.phase
        case _:
            return message.name
