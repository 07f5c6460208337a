"""The stream of a GPU: a CUDA stream, with pinned memory for what goes up and comes down."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from mpipipe.abandoned import abandon
from mpipipe.garbage import no_garbage_collection
from mpipipe.stage.pinned import PinnedRing

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.progress import ProgressEngine
    from mpipipe.stage.stream import Event

__all__ = ["CudaStream"]

T = TypeVar("T")


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
    """One CUDA stream; copies go through a ring of pinned memory.

    Args:
        device: a GPU.
        cuda_stream: of it.
        progress: told while a thread adds steps; None: they are added where `compute` is called,
            as they wait for nothing.
    """

    compute_s: float | None = None

    def __init__(
        self,
        device: torch.device,
        cuda_stream: torch.cuda.Stream,
        progress: ProgressEngine | None = None,
    ) -> None:
        self.device = device
        self._progress = progress
        self._thread = ThreadPoolExecutor(1, "launch", self.enter)  # starts with its first work
        self._launching: set[Future[Any]] = set()  # what the thread has not done yet
        self._stream = cuda_stream
        self._pinned = PinnedRing(cuda_stream)
        # Of its own: the host may read a result later than the GPU has gone by.
        self._results = PinnedRing(cuda_stream, segment_bytes=256 << 10, num_segments=16)
        # Graphs run one at a time, in stream order, so all may share their work space. A graph's
        # result may lie where an earlier one has temporaries: it holds until any graph's replay.
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_stream = torch.cuda.Stream(device)
        self._graphs: list[torch.cuda.CUDAGraph] = []

    async def compute(self, work: Callable[[], T]) -> T:
        """See `Stream.compute`: what `work` adds to the stream is computed later.

        Work that may wait for the disk runs in a thread, so that the event loop lives.
        """
        if self._progress is None:
            return work()
        with self._progress.computing():
            launching = self._thread.submit(work)
            self._launching.add(launching)
            launching.add_done_callback(self._launching.discard)
            return await asyncio.wrap_future(launching)

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
        """In pinned memory.

        Copied by numpy: from 32 KB on torch hands a part to each of its threads and waits for all,
        8 ms on busy cores for a page table of 82 KB (18 µs alone).
        """
        source = torch.from_numpy(array)
        staged = self._pinned.take(source.nbytes).view(source.dtype).view(source.shape)
        np.copyto(staged.numpy(), array)
        return staged

    def record_event(self) -> Event:
        """See `Stream.record_event`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return _CudaEvent(event)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Stream.capture`. `work` must have run once before, so that its kernels are loaded.

        torch's own `torch.cuda.graph` collects garbage and empties the allocator around each
        capture, about 0.1 s each time; with dozens of graphs that is most of a start. Here no
        garbage is collected meanwhile: a graph in it that is destroyed spoils the capture.
        """
        graph = torch.cuda.CUDAGraph()
        self._capture_stream.wait_stream(self._stream)
        with no_garbage_collection(), torch.cuda.stream(self._capture_stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        self._stream.wait_stream(self._capture_stream)
        self._graphs.append(graph)
        replay: Callable[[], None] = graph.replay
        return replay

    def drain(self) -> None:
        """See `Stream.drain`."""
        torch.cuda.synchronize(self.device)

    def release_captured(self) -> None:
        """See `Stream.release_captured`: a communicator of NCCL waits for graphs that use it."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()

    def peak_bytes(self) -> int:
        """See `Stream.peak_bytes`."""
        return int(torch.cuda.max_memory_reserved(self.device))

    def close(self) -> None:
        """See `Stream.close`. Work that was given up may never end: what it waits for does not."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        launching = [*self._launching]
        if launching:
            abandon(lambda: not all(work.done() for work in launching))
