"""Median, interval and spread of a few repeats, and when two of them differ.

The interval of a median is between two order statistics, so it assumes nothing of how the values
are distributed: the true median lies outside of `[x(k), x(n+1-k)]` with the probability that fewer
than k of n coin tosses show one side, twice. Five repeats give their whole range 94 %. Pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Spread", "paired_ratio", "spread_of"]

_COVERAGE = 0.9


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeats of one measurement, in its unit."""

    num: int
    median: float
    low: float  # the interval of the median, both ends included
    high: float
    coverage: float  # probability that the interval holds the true median
    cv: float | None  # standard deviation over mean; None: a single value

    @property
    def is_sound(self) -> bool:
        """Whether the interval is one to judge by: enough repeats for 90 %."""
        return self.coverage >= _COVERAGE

    def is_above(self, bound: float) -> bool:
        """Whether the median is above `bound` beyond the noise."""
        return self.is_sound and self.low > bound

    def is_below(self, bound: float) -> bool:
        """Whether the median is below `bound` beyond the noise."""
        return self.is_sound and self.high < bound


def spread_of(values: Sequence[float]) -> Spread | None:
    """The narrowest interval of order statistics with 90 %, else the whole range; None: no values.

    A range of fewer than five values covers less, and says so.
    """
    if not values:
        return None
    ordered, num = sorted(values), len(values)
    inner = 1
    while 2 * (inner + 1) <= num and _coverage(num, inner + 1) >= _COVERAGE:
        inner += 1
    mean = statistics.fmean(ordered)
    cv = statistics.stdev(ordered) / mean if num > 1 and mean > 0 else None
    return Spread(
        num=num,
        median=statistics.median(ordered),
        low=ordered[inner - 1],
        high=ordered[num - inner],
        coverage=_coverage(num, inner),
        cv=cv,
    )


def _coverage(num: int, inner: int) -> float:
    """Of the interval from the `inner`-th smallest to the `inner`-th largest of `num` values."""
    outside: float = sum(math.comb(num, count) for count in range(inner)) / 2.0**num
    return max(0.0, 1 - 2 * outside)


def paired_ratio(measured: Mapping[int, float], base: Mapping[int, float]) -> Spread | None:
    """`measured` over `base`, both by repeat; None: no repeat has both.

    The launches of a repeat follow each other, so what slows the machine for a while cancels out.
    """
    both = [repeat for repeat in measured if base.get(repeat, 0.0) > 0]
    return spread_of([measured[repeat] / base[repeat] for repeat in both])
