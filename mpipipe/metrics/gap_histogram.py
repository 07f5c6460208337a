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


class GapHistogram:
    """Counts times by their order of magnitude."""

    def __init__(self) -> None:
        self._counts = np.zeros(_NUM_BUCKETS, dtype=np.int64)
        self._num_added = 0

    def add(self, times_s: Sequence[float]) -> None:
        """Count each of them."""
        ratios = np.maximum(np.asarray(times_s, dtype=np.float64) / _LOWEST_S, 1.0)
        places = np.minimum(np.log(ratios) / _LOG_RATIO, _NUM_BUCKETS - 1).astype(np.int64)
        np.add.at(self._counts, places, 1)
        self._num_added += len(times_s)

    def percentile(self, percent: float) -> float | None:
        """The nearest-rank percentile to 0.5 %, see above; None before anything was added."""
        wanted = max(1, math.ceil(self._num_added * percent / 100))
        if not self._num_added:
            return None
        place = int(np.searchsorted(np.cumsum(self._counts), wanted))
        return _LOWEST_S * math.exp((place + 0.5) * _LOG_RATIO)
