"""Times of all ranks on one clock, rank 0's: by the offsets that the run measured.

Between two measurements an offset is taken as linear, before the first and after the last as
constant. A rank that was never measured counts as being on rank 0's clock, as all ranks of one host
are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mpipipe.logs.reading import Line, number, whole

__all__ = ["ClockReading", "RankClocks", "read_clocks"]


@dataclass(frozen=True, slots=True)
class ClockReading:
    """One measurement of one rank."""

    t_s: float  # when, on rank 0's clock
    offset_s: float  # add to the rank's time for rank 0's
    error_s: float


class RankClocks:
    """The clocks of one attempt.

    Args:
        readings: by rank, in the order of their times.
    """

    def __init__(self, readings: Mapping[int, Sequence[ClockReading]]) -> None:
        self._readings = readings

    def on_head(self, rank: int, t_s: float) -> float:
        """The time `t_s` of `rank` on rank 0's clock."""
        readings = self._readings.get(rank, ())
        if not readings:
            return t_s
        about_s = t_s + readings[0].offset_s
        after = bisect_right(readings, about_s, key=lambda reading: reading.t_s)
        if after in {0, len(readings)}:
            return t_s + readings[max(0, after - 1)].offset_s
        first, second = readings[after - 1], readings[after]
        share = (about_s - first.t_s) / (second.t_s - first.t_s)
        return t_s + first.offset_s + share * (second.offset_s - first.offset_s)

    def error_s(self, rank: int) -> float | None:
        """The largest error of the rank's offsets; None: it was never measured."""
        return max((reading.error_s for reading in self._readings.get(rank, ())), default=None)


def read_clocks(lines: Iterable[Line]) -> RankClocks:
    """The clocks from the lines of `clock.jsonl`, those of one attempt."""
    readings: dict[int, list[ClockReading]] = {}
    for line in lines:
        t_s, offset_s = number(line, "t_s"), number(line, "offset_s")
        if t_s is None or offset_s is None:
            continue
        reading = ClockReading(t_s, offset_s, number(line, "error_s") or 0.0)
        readings.setdefault(whole(line, "of_rank", -1), []).append(reading)
    for found in readings.values():
        found.sort(key=lambda reading: reading.t_s)
    return RankClocks(readings)
