"""Which rank has been silent for too long: the decision behind the heartbeats. Pure.

Silence counts only while this rank listens. A process that was stopped, suspended or busy for a
minute heard nothing in that time and must not accuse the others, so no tick counts for more than
`_MOST_INTERVALS` intervals.

A rank cannot answer while a step, a compilation or an import holds up its event loop. It reports
the longest such time so far (`Heartbeat.deaf_s`), which is added to its limit. It also reports that
it is booting, when a busy file system may hold up Python for long. `heartbeats` sends and receives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mpipipe.control_plane.messages import Heartbeat

__all__ = ["BOOT_FACTOR", "Silence", "SilenceWatch", "interval_s", "silence_sentence"]

BOOT_FACTOR = 3.0
_MOST_INTERVALS = 2.0
_LONGEST_INTERVAL_S = 1.0
_PER_TIMEOUT = 5.0


def interval_s(timeout_s: float) -> float:
    """Seconds between two heartbeats of a rank."""
    return min(_LONGEST_INTERVAL_S, timeout_s / _PER_TIMEOUT)


@dataclass(frozen=True, slots=True)
class Silence:
    """A rank that has been silent for longer than it may be."""

    rank: int
    silent_s: float
    limit_s: float
    last: Heartbeat  # what it said last


@dataclass(slots=True)
class _Peer:
    silent_s: float = 0.0
    heard: bool = False  # since the last tick
    last: Heartbeat = field(default_factory=Heartbeat)


class SilenceWatch:
    """Counts the silence of other ranks.

    Args:
        ranks: the ranks that are watched.
        timeout_s: how long one may be silent beyond its reported `deaf_s`.
        now_s: the time at which watching begins.
    """

    def __init__(self, ranks: Iterable[int], timeout_s: float, now_s: float) -> None:
        self.timeout_s = timeout_s
        self._peers = {rank: _Peer() for rank in ranks}
        self._ticked_s = now_s

    def heard(self, rank: int, heartbeat: Heartbeat) -> None:
        """A heartbeat of `rank` has come."""
        peer = self._peers.get(rank)
        if peer is not None:
            peer.heard = True
            peer.last = heartbeat

    def tick(self, now_s: float) -> Silence | None:
        """Count the time since the last tick; the rank that has been silent for too long, if any.

        Of several the one that has been silent for longest, then the lowest.
        """
        listened_s = min(now_s - self._ticked_s, _MOST_INTERVALS * interval_s(self.timeout_s))
        self._ticked_s = now_s
        late: list[Silence] = []
        for rank, peer in self._peers.items():
            peer.silent_s = 0.0 if peer.heard else peer.silent_s + listened_s
            peer.heard = False
            limit_s = self.limit_s(peer.last)
            if peer.silent_s > limit_s:
                late.append(Silence(rank, peer.silent_s, limit_s, peer.last))
        return min(late, key=lambda found: (-found.silent_s, found.rank), default=None)

    def limit_s(self, last: Heartbeat) -> float:
        """How long a rank may be silent whose last heartbeat is `last`."""
        return self.timeout_s * (BOOT_FACTOR if last.booting else 1.0) + last.deaf_s


def silence_sentence(silence: Silence, label: str) -> str:
    """What happened, the likely cause, what to do. `label`: the rank with its host."""
    last = silence.last
    stage = f" (stage {last.stage})" if last.stage >= 0 else ""
    if last.step >= 0:
        doing = f"its last step was {last.step}"
    elif last.phase:
        doing = f"it was heard last in the phase {last.phase!r}"
    else:
        doing = "it has run no step yet"
    return (
        f"{label}{stage} has been silent for {silence.silent_s:.1f} s; {doing}; most likely its "
        "process is stopped or dead, or its node or the network is lost: the job ends, what is "
        "complete is kept, and with output.resume=true the same command goes on (a rank that is "
        "only slow needs a larger pipeline.heartbeat_timeout_s)"
    )
