"""Heartbeats of the ranks: the head hears every rank, every rank the head.

One small message per interval and direction, which neither wakes the polling of an idle rank nor
counts as traffic. `silence` decides which rank is lost; the exception that `run` raises then ends
this rank, and with it the job.

Exactly one rank tells the user: the head tells of another rank's silence, and the lowest rank that
is left tells of the head's. It sends `RankLost` to all other ranks, which end without a message.
The runtime ends a rank after an error.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.control_plane.messages import Heartbeat, RankLost
from mpipipe.control_plane.silence import SilenceWatch, interval_s, silence_sentence
from mpipipe.errors import PeerLostError

if TYPE_CHECKING:
    from mpipipe.clock import Clock
    from mpipipe.control_plane.mesh import Mesh

__all__ = ["Heartbeats", "Vitals"]

_HEAD = 0
# When the head is silent each rank waits so much longer than the rank before it, which tells it.
_TURN_S = 1.0
_LONGEST_TURN_S = 3.0
_OFF_INTERVAL_S = 1.0
_PAUSE_S = 1.0  # a rank that stood still for so long says so in its log


@dataclass(slots=True)
class Vitals:
    """What the heartbeats of this rank tell; boot and the session write it here."""

    timeout_s: float = 0.0  # how long a rank may be silent; 0: no heartbeats
    phase: str = ""  # the latest boot phase
    stage: int = -1  # -1: no plan yet
    last_step: Callable[[], int] | None = None  # -1 before any; None: this rank is booting
    # Told, past the boot, for how many seconds this rank stood still, and what CPU time it used.
    on_pause: Callable[[float, float], object] = lambda _seconds, _cpu_s: None

    @property
    def step(self) -> int:
        """Number of the last step that left this rank's stage; -1 before any."""
        return -1 if self.last_step is None else self.last_step()


class Heartbeats:
    """This rank's signs of life, and its watch over the others'.

    Args:
        mesh: carries the messages; must be started.
        clock: monotonic seconds.
        host: of this rank.
        vitals: what to tell, and for how long others may be silent.
        cpu_s: CPU seconds that this process and its children have used.
    """

    def __init__(
        self,
        mesh: Mesh,
        clock: Clock,
        host: str,
        vitals: Vitals,
        cpu_s: Callable[[], float] | None = None,
    ) -> None:
        self._mesh = mesh
        self._clock = clock
        self._host = host
        self._vitals = vitals
        self._cpu_s = cpu_s or _cpu_s
        self._deaf_s = 0.0
        self._mailbox = mesh.mailbox(Heartbeat, RankLost)

    async def run(self) -> None:
        """Send, listen and judge until cancelled.

        Raises:
            PeerLostError: a rank was silent for too long; names it.
        """
        watch: SilenceWatch | None = None
        while True:
            self._listen(watch)
            timeout_s = self._vitals.timeout_s
            if timeout_s <= 0:
                watch = None
                await asyncio.sleep(_OFF_INTERVAL_S)
                continue
            watch = watch or SilenceWatch(self._partners, timeout_s, self._clock.now_s())
            watch.timeout_s = timeout_s
            self._judge(watch)
            self._send()
            await self._sleep(interval_s(timeout_s))

    @property
    def _partners(self) -> Sequence[int]:
        return range(1, self._mesh.world_size) if self._mesh.is_head else (_HEAD,)

    # ---- parts -----------------------------------------------------------------------------------

    async def _sleep(self, seconds: float) -> None:
        """Sleep, and note the time in which this rank could not answer."""
        started_s, used_s = self._clock.now_s(), self._cpu_s()
        await asyncio.sleep(seconds)
        late_s, cpu_s = self._clock.now_s() - started_s - seconds, self._cpu_s() - used_s
        # A process that was stopped meanwhile was late without being busy.
        self._deaf_s = max(self._deaf_s, min(late_s, cpu_s))
        if late_s >= _PAUSE_S and self._vitals.last_step is not None:
            self._vitals.on_pause(late_s, cpu_s)

    def _send(self) -> None:
        vitals = self._vitals
        booting = vitals.last_step is None
        beat = Heartbeat(self._host, vitals.stage, vitals.step, vitals.phase, booting, self._deaf_s)
        self._mesh.send_quietly(self._partners, beat)

    def _listen(self, watch: SilenceWatch | None) -> None:
        while (received := self._mailbox.get_nowait()) is not None:
            source, message = received
            if isinstance(message, RankLost):
                raise PeerLostError(message.sentence, lost=message.rank, told_by=source)
            if watch is not None and isinstance(message, Heartbeat):
                watch.heard(source, message)

    def _judge(self, watch: SilenceWatch) -> None:
        found = watch.tick(self._clock.now_s())
        if found is None:
            return
        if found.rank == _HEAD:
            turn_s = min((self._mesh.rank - 1) * _TURN_S, _LONGEST_TURN_S)
            if found.silent_s <= found.limit_s + turn_s:
                return
        label = f"rank {found.rank}" + (f" on {found.last.host}" if found.last.host else "")
        sentence = silence_sentence(found, label)
        others = set(range(self._mesh.world_size)) - {self._mesh.rank, found.rank}
        for rank in sorted(others):
            self._mesh.send(rank, RankLost(found.rank, sentence))
        raise PeerLostError(sentence, lost=found.rank)


def _cpu_s() -> float:
    return sum(os.times()[:4])
