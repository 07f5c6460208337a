"""`CudaCarrier`: weights from host memory and disk into buffers on a GPU, beside what it computes.

Copies have a CUDA stream of their own; events order them with the stream that computes, so the host
waits for none. What stands in a file is read by a thread into pinned memory, which adds the copy
itself; a gate waits in the calling thread until that has been added.

With CUDA graphs every step ends when the copies that it began have ended: a graph can wait for
nothing that began outside of it. The copies of the last layers' followers, at most one per buffer,
are then not hidden behind the next step.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch

from mpipipe.abandoned import ends_within
from mpipipe.kv_cache.copy_times import CopyTimes
from mpipipe.metrics.offload import OffloadUse
from mpipipe.weights.layer_store import HostRegion, Region
from mpipipe.weights.prefetch import open_reader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.weights.pinned_memory import PinnedMemory
    from mpipipe.weights.prefetch import StreamedPart

__all__ = ["CudaCarrier"]

# Reads and copies that are on their way take less, unless what is computed before them never ends.
END_S = 2.0
_NUM_BOUNCES = 2  # one is read into while the GPU copies from the other


class _Bounce:
    """Pinned memory between the disk and the GPU."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.copied = torch.cuda.Event()


class CudaCarrier:
    """Fills buffers on a GPU.

    Args:
        buffers: uint8 [n] each, on the GPU, of equal size.
        pinned: gives host memory.
        from_disk: whether any part stands in a file.
        end_with_steps: steps are captured as CUDA graphs.
    """

    def __init__(
        self,
        buffers: Sequence[torch.Tensor],
        pinned: PinnedMemory,
        *,
        from_disk: bool,
        end_with_steps: bool,
    ) -> None:
        self._buffers = buffers
        self._device = buffers[0].device
        self._copies = torch.cuda.Stream(self._device)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))  # the buffers' memory
        self._used = [torch.cuda.Event() for _ in buffers]
        self._here: dict[int, torch.cuda.Event] = {}  # by part: it is in its buffer
        self._expected: set[int] = set()  # parts that were loaded and have not arrived
        self._end_with_steps = end_with_steps
        num_bounces = _NUM_BOUNCES if from_disk else 0
        size = buffers[0].numel()
        self._bounces = deque(_Bounce(pinned.take(size)) for _ in range(num_bounces))
        self._reader = open_reader()
        self._reading: dict[int, Future[None]] = {}
        self._times = CopyTimes()
        self._copying = threading.Lock()  # held by the thread that adds copies, or counts them
        self._wait_s = 0.0

    def load(self, part: StreamedPart) -> None:
        """See `Carrier.load`."""
        self._expected.add(part.number)
        if part.from_disk:
            self._reading[part.number] = self._reader.submit(self._read, part)
        else:
            self._copy(part, [_memory_of(piece.region)[piece.start :] for piece in part.pieces])

    def _read(self, part: StreamedPart) -> None:
        """In the thread that reads."""
        torch.cuda.set_device(self._device)
        bounce = self._bounces[0]
        self._bounces.rotate(-1)
        bounce.copied.synchronize()
        sources = []
        for piece in part.pieces:
            source = bounce.memory[piece.offset : piece.offset + piece.num_bytes]
            piece.region.read_into(piece.start, source)
            sources.append(source)
        self._copy(part, sources)
        bounce.copied.record(self._copies)

    def _copy(self, part: StreamedPart, sources: Sequence[torch.Tensor]) -> None:
        """Add the copies of the beginnings of `sources` into the part's buffer."""
        copies, buffer = self._copies, self._buffers[part.buffer]
        here = self._here.setdefault(part.number, torch.cuda.Event())
        with self._copying, torch.cuda.stream(copies):
            copies.wait_event(self._used[part.buffer])
            # Nothing is timed in a graph.
            timed = not torch.cuda.is_current_stream_capturing()
            began = self._times.begin(copies) if timed else None
            for piece, source in zip(part.pieces, sources, strict=True):
                target = buffer[piece.offset : piece.offset + piece.num_bytes]
                target.copy_(source[: piece.num_bytes], non_blocking=True)
            here.record(copies)
            self._times.end(copies, began, part.num_bytes)

    def arrive(self, part: StreamedPart) -> None:
        """See `Carrier.arrive`."""
        reading = self._reading.pop(part.number, None)
        if reading is not None:
            began_s = time.perf_counter()
            reading.result()
            self._wait_s += time.perf_counter() - began_s
        if part.number in self._expected:
            self._expected.discard(part.number)
            torch.cuda.current_stream(self._device).wait_event(self._here[part.number])

    def used(self, part: StreamedPart) -> None:
        """See `Carrier.used`."""
        self._used[part.buffer].record(torch.cuda.current_stream(self._device))

    def end_step(self) -> None:
        """See `Carrier.end_step`."""
        if self._end_with_steps and self._expected:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)
            self._expected.clear()

    def use(self) -> OffloadUse:
        """See `Carrier.use`."""
        with self._copying:
            rate = self._times.bytes_per_s
        return OffloadUse(wait_s=self._wait_s, host_bytes_per_s=rate)

    def close(self) -> bool:
        """See `Carrier.close`: waits `END_S` at most, as what is computed may wait for a lost rank.

        What goes on then is noted as abandoned: the process ends without waiting for it.
        """
        self._reader.shutdown(wait=False, cancel_futures=True)
        return ends_within(END_S, self._wait_for_end, "weights-end")

    def _wait_for_end(self) -> None:
        """Until the reader has ended, then the GPU: the reader adds copies."""
        self._reader.shutdown()
        with contextlib.suppress(RuntimeError):  # the GPU is lost: nothing is copied any more
            torch.cuda.synchronize(self._device)


def _memory_of(region: Region) -> torch.Tensor:
    assert isinstance(region, HostRegion)
    return region.memory
