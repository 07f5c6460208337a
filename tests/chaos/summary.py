"""The points of a run in a few lines: how often what ended how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.chaos.chain import Point

__all__ = ["summary"]


def summary(points: Sequence[Point]) -> list[str]:
    """A line for each kind of blow, and the totals."""
    dealt = [point for point in points if point.blow is not None and point.dealt]
    lines = []
    for kind in sorted({point.blow.kind for point in dealt if point.blow is not None}):
        own = [point for point in dealt if point.blow is not None and point.blow.kind == kind]
        codes = Counter("hangs" if p.end.exit_code is None else str(p.end.exit_code) for p in own)
        ends = ", ".join(f"{code} × {count}" for code, count in codes.most_common())
        slowest = max(point.end.seconds for point in own)
        lines.append(f"{kind:18} {len(own):3} points  slowest end {slowest:5.1f} s  exit {ends}")
    num_faults = sum(len(point.faults) for point in points)
    chains = len({point.chain for point in points})
    missed = sum(point.blow is not None and not point.dealt for point in points)
    lines.append(
        f"{len(dealt)} blows in {chains} chains ({missed} came after the end): "
        f"{num_faults} violations"
    )
    return lines
