"""How far the clocks of the ranks are apart: by message, without any service.

The head asks a rank for its time, several times, and takes the answer of the shortest round trip,
as if both ways took equally long (Cristian 1989): half of that round trip is the largest possible
error. Answering is a task of the event loop, so steps go on meanwhile; an answer may come late
then, which the shortest of many leaves out.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.control_plane.messages import ClockAsked, ClocksCompared, ClockTold

if TYPE_CHECKING:
    from mpipipe.control_plane.mesh import Mesh
    from mpipipe.runtime.ranks import Ranks

__all__ = ["ClockOffset", "ClockOffsets", "Clocks", "compared_clocks", "measure_clock_offsets"]

_HEAD = 0
_NUM_ROUNDS = 20
_INTERVAL_S = 60.0
_ANSWER_S = 2.0  # for all rounds with one rank; it may be stopped
_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """One rank's clock against the head's."""

    rank: int
    ahead_s: float
    error_s: float  # the largest possible


@dataclass(frozen=True, slots=True)
class ClockOffsets:
    """By rank, how far its clock is ahead of the head's, in seconds; empty but on the head."""

    ahead_s: dict[int, float]
    error_s: float  # the largest possible


class Clocks:
    """The clocks of all ranks, compared when asked to and once a minute.

    Args:
        mesh: carries the messages.
        hosts: of each rank. Ranks of one host read the same clock, so one of them is asked.
        now_s: this rank's clock.
    """

    def __init__(self, mesh: Mesh, hosts: Sequence[str], now_s: Callable[[], float]) -> None:
        self.on_compared: Callable[[Sequence[ClockOffset]], None] | None = None  # on the head
        self.offsets: tuple[ClockOffset, ...] = ()  # the latest, by rank; on the head
        self._mesh = mesh
        self._hosts = tuple(hosts)
        self._now_s = now_s
        own_host = hosts[mesh.rank]
        self._ahead_s = tuple(0.0 if host == own_host else math.nan for host in hosts)
        self._number = 0
        self._by_host = {hosts[_HEAD]: (0.0, 0.0)}
        self._one_at_a_time = asyncio.Lock()
        types = (ClockTold,) if mesh.is_head else (ClockAsked, ClocksCompared)
        self._mailbox = mesh.mailbox(*types)

    def ahead_s(self, rank: int) -> float:
        """How far the clock of `rank` is ahead of the head's; NaN as long as that is not known.

        Before the first comparison: of the ranks of one host to each other.
        """
        return self._ahead_s[rank]

    async def run(self) -> None:
        """Compare once a minute (head), answer (other ranks), until cancelled."""
        while self._mesh.is_head:
            await asyncio.sleep(_INTERVAL_S)
            await self.compare()
        while True:
            _, message = await self._mailbox.get()
            if isinstance(message, ClockAsked):
                self._mesh.send(_HEAD, ClockTold(message.number, self._now_s()))
            elif isinstance(message, ClocksCompared):
                self._ahead_s = message.ahead_s

    async def compare(self) -> None:
        """Ask a rank of every host, and tell all ranks; nothing is done but on the head.

        A host that does not answer in time keeps what was found before; it is left out of
        `offsets` when nothing was.
        """
        if not self._mesh.is_head:
            return
        async with self._one_at_a_time:
            for host in dict.fromkeys(self._hosts):
                if host != self._hosts[_HEAD]:
                    await self._ask(host)
            self.offsets = tuple(
                ClockOffset(rank, *self._by_host[host])
                for rank, host in enumerate(self._hosts)
                if host in self._by_host
            )
            unknown = (math.nan, math.nan)  # clocks of two hosts may be days apart
            self._ahead_s = tuple(self._by_host.get(host, unknown)[0] for host in self._hosts)
            for rank in range(1, len(self._hosts)):
                self._mesh.send(rank, ClocksCompared(self._ahead_s))
        if self.on_compared is not None:
            self.on_compared(self.offsets)

    async def _ask(self, host: str) -> None:
        rank, shortest_s = self._hosts.index(host), float("inf")
        with suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_S):
                for _ in range(_NUM_ROUNDS):
                    self._number += 1
                    sent_s = self._now_s()
                    self._mesh.send(rank, ClockAsked(self._number))
                    told_s = await self._answer()
                    trip_s = self._now_s() - sent_s
                    if trip_s < shortest_s:
                        shortest_s = trip_s
                        self._by_host[host] = (told_s - sent_s - trip_s / 2, trip_s / 2)

    async def _answer(self) -> float:
        while True:
            _, told = await self._mailbox.get()
            assert isinstance(told, ClockTold)
            if told.number == self._number:  # and not one that came too late
                return told.now_s


@asynccontextmanager
async def compared_clocks(
    ranks: Ranks, hosts: Sequence[str], now_s: Callable[[], float]
) -> AsyncIterator[Clocks]:
    """The clocks of all ranks; inside, ranks answer and the head compares once a minute."""
    clocks = Clocks(ranks.mesh, hosts, now_s)
    running = ranks.tasks.create_task(clocks.run(), name="clocks")
    try:
        yield clocks
    finally:
        running.cancel()


async def measure_clock_offsets(ranks: Ranks, now_s: Callable[[], float]) -> ClockOffsets:
    """Compare `now_s` of all ranks once; they call this together."""
    each_its_own = [str(rank) for rank in range(ranks.mesh.world_size)]
    async with compared_clocks(ranks, each_its_own, now_s) as clocks:
        await ranks.mesh.barrier("clocks", _DEADLINE_S)
        await clocks.compare()
        await ranks.mesh.barrier("clocks compared", _DEADLINE_S)
    found = clocks.offsets
    return ClockOffsets(
        {offset.rank: offset.ahead_s for offset in found},
        max((offset.error_s for offset in found), default=0.0),
    )
