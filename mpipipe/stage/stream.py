"""The one ordered queue of work of a rank's device, as the stage engine sees it.

A *stream* takes work in order; the host adds to it and learns later how far it got. On a GPU it is
a CUDA stream with pinned memory and events. On a CPU it is one thread: the worker awaits each
`compute` before it adds what comes behind it, and all else is done when the call returns.

`data_plane` transfers between ranks; `cuda_graph_runner` says what is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch

from mpipipe.stage.pinned import PinnedRing

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CudaStream", "Event", "Stream"]

T = TypeVar("T")


class Event(Protocol):
    """A point of the stream, behind the work that was added before it."""

    def query(self) -> bool:
        """Whether the device has come by."""
        ...

    def seconds_until(self, later: Event) -> float:
        """Device time from this point to a `later` one of the same stream; both must have
        passed.
        """
        ...


class Stream(Protocol):
    """Adds work to a device's queue; nothing here waits for the device except `drain`."""

    device: torch.device
    compute_s: float | None  # of the latest `compute` in its own thread; None: events tell all

    async def compute(self, work: Callable[[], T]) -> T:
        """Add `work`; what it returns may be used by what is added next.

        Raises:
            Exception: what `work` raised.
        """
        ...

    def enter(self) -> None:
        """From now on the calling thread's work on a GPU goes to this stream."""
        ...

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """A copy of `array` on the device; the array may be changed at once."""
        ...

    def upload_into(self, array: np.ndarray, tensor: torch.Tensor) -> None:
        """Replace the contents of a contiguous device tensor of the same bytes."""
        ...

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor that holds the contents once a event added after this call is reached."""
        ...

    def record_event(self) -> Event:
        """A point behind everything added so far."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """Record `work` for replays that cost the host one call; None: this stream cannot."""
        ...

    def drain(self) -> None:
        """Wait until the device has done everything."""
        ...

    def peak_bytes(self) -> int:
        """Most memory of the device that was reserved at once; 0 on a CPU."""
        ...

    def close(self) -> None:
        """Release its thread, when what that computes is done. Idempotent."""
        ...


class _CudaEvent:
    """A CUDA event with timing."""

    __slots__ = ("event",)

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def query(self) -> bool:
        return bool(self.event.query())

    def seconds_until(self, later: Event) -> float:
        assert isinstance(later, _CudaEvent)
        return float(self.event.elapsed_time(later.event)) / 1e3


class CudaStream:
    """One CUDA stream; copies go through a ring of pinned memory."""

    compute_s: float | None = None

    def __init__(self, device: torch.device, cuda_stream: torch.cuda.Stream) -> None:
        self.device = device
        self._stream = cuda_stream
        self._pinned = PinnedRing(cuda_stream)
        # Of its own: the host may read a result later than the GPU has gone by.
        self._results = PinnedRing(cuda_stream, segment_bytes=256 << 10, num_segments=16)
        # Graphs run one at a time, in stream order, so all may share their work space. A graph's
        # result may lie where an earlier one has temporaries: it holds until any graph's replay.
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_stream = torch.cuda.Stream(device)

    async def compute(self, work: Callable[[], T]) -> T:
        """See `Stream.compute`: what `work` adds to the stream is computed later."""
        return work()

    def enter(self) -> None:
        """See `Stream.enter`; torch keeps device and stream per thread."""
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(self._stream)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """See `Stream.upload`."""
        return self._staged(array).to(self.device, non_blocking=True)

    def upload_into(self, array: np.ndarray, tensor: torch.Tensor) -> None:
        """See `Stream.upload_into`."""
        tensor.copy_(self._staged(array), non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Stream.download`."""
        host = self._results.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return host.copy_(tensor, non_blocking=True)

    def _staged(self, array: np.ndarray) -> torch.Tensor:
        source = torch.from_numpy(array)
        return self._pinned.take(source.nbytes).view(source.dtype).view(source.shape).copy_(source)

    def record_event(self) -> Event:
        """See `Stream.record_event`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return _CudaEvent(event)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Stream.capture`. `work` must have run once before, so that its kernels are loaded.

        torch's own `torch.cuda.graph` collects garbage and empties the allocator around each
        capture, about 0.1 s each time; with dozens of graphs that is most of a start.
        """
        graph = torch.cuda.CUDAGraph()
        self._capture_stream.wait_stream(self._stream)
        with torch.cuda.stream(self._capture_stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        self._stream.wait_stream(self._capture_stream)
        replay: Callable[[], None] = graph.replay
        return replay

    def drain(self) -> None:
        """See `Stream.drain`."""
        torch.cuda.synchronize(self.device)

    def peak_bytes(self) -> int:
        """See `Stream.peak_bytes`."""
        return int(torch.cuda.max_memory_reserved(self.device))

    def close(self) -> None:
        """A stream has no thread."""
