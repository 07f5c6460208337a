"""How far the clocks of the ranks are apart: by message, without any service.

All ranks call this together. `bench.timeline` corrects by it, `doctor.checks.measured` judges it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpipipe.runtime.ranks import Ranks

__all__ = ["ClockOffsets", "measure_clock_offsets"]

_DEADLINE_S = 120.0
_NUM_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class ClockOffsets:
    """By rank, how far its clock is ahead of the head's, in seconds; empty but on the head."""

    ahead_s: dict[int, float]
    error_s: float  # the largest possible: half of the shortest round trip


async def measure_clock_offsets(ranks: Ranks, now_s: Callable[[], float]) -> ClockOffsets:
    """Compare `now_s` of all ranks: from the shortest of some round trips, taken as equally long
    both ways (Cristian 1989).
    """
    best_s = float("inf")
    ahead_s: dict[int, float] = {}
    for _ in range(_NUM_ROUNDS):
        sent_s = now_s()
        await ranks.mesh.broadcast("clock", b"" if ranks.is_head else None, _DEADLINE_S)
        parts = await ranks.mesh.gather("clock", json.dumps(now_s()).encode(), _DEADLINE_S)
        received_s = now_s()
        if parts is None or received_s - sent_s >= best_s:
            continue
        best_s = received_s - sent_s
        middle_s = (sent_s + received_s) / 2
        ahead_s = {rank: json.loads(part) - middle_s for rank, part in enumerate(parts)}
    if not ranks.is_head:
        return ClockOffsets({}, 0.0)
    return ClockOffsets(ahead_s | {ranks.mesh.rank: 0.0}, best_s / 2)
