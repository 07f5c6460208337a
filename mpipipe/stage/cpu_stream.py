"""The stream of a CPU: one thread that computes, while the event loop keeps MPI moving."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from mpipipe.topology.usage import COMPUTE_THREAD, name_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.clock import Clock
    from mpipipe.progress import ProgressEngine
    from mpipipe.stage.stream import Event

__all__ = ["CpuStream"]

T = TypeVar("T")


class _HostEvent:
    """The host's time when it was made: on a CPU the work before it is done by then."""

    __slots__ = ("now_s",)

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def query(self) -> bool:
        return True

    def seconds_until(self, later: Event) -> float:
        assert isinstance(later, _HostEvent)
        return later.now_s - self.now_s


def _begin_thread(num_threads: int) -> None:
    name_thread(COMPUTE_THREAD)
    torch.set_num_threads(num_threads)  # which torch keeps per thread


class CpuStream:
    """One thread that computes, while the event loop keeps MPI moving.

    Args:
        device: a CPU.
        clock: monotonic seconds.
        progress: told while the thread computes.
        num_threads: that torch computes with.
    """

    def __init__(
        self, device: torch.device, clock: Clock, progress: ProgressEngine, *, num_threads: int = 1
    ) -> None:
        self.device = device
        self.compute_s: float | None = None
        self._clock = clock
        self._progress = progress
        # It starts with the first work.
        self._thread = ThreadPoolExecutor(1, "compute", _begin_thread, (num_threads,))

    async def compute(self, work: Callable[[], T]) -> T:
        """See `Stream.compute`: returns when it is computed."""

        def timed() -> tuple[T, float]:
            started_s = self._clock.now_s()
            return work(), self._clock.now_s() - started_s

        loop = asyncio.get_running_loop()
        with self._progress.computing():
            result, self.compute_s = await loop.run_in_executor(self._thread, timed)
        return result

    def enter(self) -> None:
        """A CPU has no queue."""

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """See `Stream.upload`."""
        return torch.from_numpy(array.copy())

    def upload_into(self, array: np.ndarray, tensor: torch.Tensor) -> None:
        """See `Stream.upload_into`."""
        tensor.copy_(torch.from_numpy(array))

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Stream.download`."""
        return tensor.clone()

    def record_event(self) -> Event:
        """See `Stream.record_event`."""
        return _HostEvent(self._clock.now_s())

    def capture(self, work: Callable[[], None]) -> None:  # noqa: ARG002 - the contract's name
        """There are no graphs on a CPU."""
        return None  # noqa: RET501 - the contract's answer

    def drain(self) -> None:
        """Nothing is under way."""

    def release_captured(self) -> None:
        """There are no graphs on a CPU."""

    def peak_bytes(self) -> int:
        """No device memory."""
        return 0

    def close(self) -> None:
        """See `Stream.close`."""
        self._thread.shutdown()
