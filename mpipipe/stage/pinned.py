"""`PinnedRing`: host memory that a GPU copies from and to, taken in turn.

Asking CUDA for pinned memory takes milliseconds and may wait for the GPU (4 ms measured in the
middle of a run), so all of it is asked for at once, and used again when the GPU has come by.
"""

from __future__ import annotations

import torch

__all__ = ["PinnedRing"]

_ALIGNMENT = 64


class PinnedRing:
    """Segments of pinned memory. What is taken stays valid until the ring has come round.

    Args:
        stream: whose copies use the memory.
        segment_bytes: more than this at once is pinned memory of its own.
        num_segments: what was taken is overwritten when so many segments are full. 8 of 4 MiB hold
            90 steps of 256 rows, 16 of 256 KiB the ids of 2,000; two rounds are in flight.
    """

    def __init__(
        self, stream: torch.cuda.Stream, *, segment_bytes: int = 4 << 20, num_segments: int = 8
    ) -> None:
        self._stream = stream
        self._segment_bytes = segment_bytes
        self._segments: list[torch.Tensor] = []
        self._used: list[torch.cuda.Event | None] = [None] * num_segments
        self._current = 0
        self._offset = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """Pinned memory: uint8 [num_bytes]."""
        if num_bytes > self._segment_bytes:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        if not self._segments:
            self._allocate()
        if self._offset + num_bytes > self._segment_bytes:
            self._turn()
        part = self._segments[self._current][self._offset : self._offset + num_bytes]
        self._offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return part

    def _allocate(self) -> None:
        whole = torch.empty(
            len(self._used) * self._segment_bytes, dtype=torch.uint8, pin_memory=True
        )
        self._segments = list(whole.split(self._segment_bytes))

    def _turn(self) -> None:
        """Go to the next segment; wait, if the GPU is a whole ring behind."""
        event = torch.cuda.Event()
        event.record(self._stream)
        self._used[self._current] = event
        self._current = (self._current + 1) % len(self._segments)
        self._offset = 0
        before = self._used[self._current]
        if before is not None and not before.query():
            before.synchronize()
