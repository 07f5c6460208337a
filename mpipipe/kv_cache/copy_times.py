"""`CopyTimes`: how fast copies on a CUDA stream are, by events around some of them.

Nothing waits for a copy to be timed: it counts when its events are asked for and have passed.
"""

from __future__ import annotations

from collections import deque

import torch

__all__ = ["CopyTimes"]

_NUM_TIMED = 64  # copies whose times are not known yet


class CopyTimes:
    """The bytes that were copied, and the seconds that took. Used by one thread at a time."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()
        self._num_bytes, self._seconds = 0, 0.0

    def begin(self, copies: torch.cuda.Stream) -> torch.cuda.Event | None:
        """Before a copy is added to `copies`; None: it is not timed, as many are under way."""
        self._collect()
        if len(self._under_way) >= _NUM_TIMED:
            return None
        began = torch.cuda.Event(enable_timing=True)
        began.record(copies)
        return began

    def end(
        self, copies: torch.cuda.Stream, began: torch.cuda.Event | None, num_bytes: int
    ) -> None:
        """Behind it, with what `begin` returned."""
        if began is not None:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record(copies)
            self._under_way.append((began, ended, num_bytes))

    def add(self, num_bytes: int, seconds: float) -> None:
        """A copy whose time is known: one that the caller waited for."""
        self._num_bytes += num_bytes
        self._seconds += seconds

    @property
    def bytes_per_s(self) -> float | None:
        """Of the timed copies that have ended; None: of none."""
        self._collect()
        return self._num_bytes / self._seconds if self._seconds else None

    def _collect(self) -> None:
        while self._under_way and self._under_way[0][1].query():
            began, ended, num_bytes = self._under_way.popleft()
            self.add(num_bytes, began.elapsed_time(ended) / 1e3)
