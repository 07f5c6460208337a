"""The one ordered queue of work of a rank's device, as the stage engine sees it.

A *stream* takes work in order; the host adds to it and learns later how far it got. On a GPU it is
a CUDA stream with pinned memory and events (`cuda_stream`). On a CPU it is one thread
(`cpu_stream`): the worker awaits each `compute` before it adds what comes behind it, and all else
is done when the call returns.

`data_plane` transfers between ranks; `cuda_graph_runner` says what is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import torch

__all__ = ["Event", "Stream"]

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

    def release_captured(self) -> None:
        """Give up what was captured; none of it may be replayed any more, nor be under way."""
        ...

    def peak_bytes(self) -> int:
        """Most memory of the device that was reserved at once; 0 on a CPU."""
        ...

    def close(self) -> None:
        """Release its thread, when what that computes is done. Idempotent.

        On a GPU at once; work that its thread still does is noted as abandoned.
        """
        ...
