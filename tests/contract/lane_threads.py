"""The lanes of a stage as threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from mpipipe.data_plane.lanes import joined_columns
from mpipipe.errors import ChannelClosedError

T = TypeVar("T")

_THREAD_LIMIT_S = 60.0


class _Meeting:
    """Where the threads leave their tensors."""

    def __init__(self, num_lanes: int) -> None:
        self.barrier = threading.Barrier(num_lanes)
        self.tensors: list[torch.Tensor] = [torch.empty(0)] * num_lanes


class ThreadLanes:
    """One thread's end. A thread that fails must `close`, or the others wait for a minute.

    Args:
        lane: the own number.
        num_lanes: of all threads.
        meeting: shared by them.
    """

    def __init__(self, lane: int, num_lanes: int, meeting: _Meeting) -> None:
        self.lane = lane
        self.num_lanes = num_lanes
        self._meeting = meeting

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        """See `Lanes.add_up`."""
        return partial.copy_(self._all(partial).sum(dim=0))

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """See `Lanes.gather`."""
        return joined_columns(self._all(part))

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Lanes.from_first`."""
        return tensor.copy_(self._all(tensor)[0])

    def close(self) -> None:
        """Let the other threads fail at once."""
        self._meeting.barrier.abort()

    def _all(self, tensor: torch.Tensor) -> torch.Tensor:
        meeting = self._meeting
        meeting.tensors[self.lane] = tensor
        try:
            meeting.barrier.wait(_THREAD_LIMIT_S)
            stacked = torch.stack(meeting.tensors)
            meeting.barrier.wait(_THREAD_LIMIT_S)  # all have read before any overwrites
        except threading.BrokenBarrierError as error:
            raise ChannelClosedError("another lane of the stage has failed") from error
        return stacked


def on_lanes(num_lanes: int, body: Callable[[ThreadLanes], T]) -> list[T]:
    """What `body` returns on each lane; the first error of any ends them all."""

    def guarded(lanes: ThreadLanes) -> T:
        try:
            return body(lanes)
        except BaseException:
            lanes.close()
            raise

    meeting = _Meeting(num_lanes)
    ends = [ThreadLanes(lane, num_lanes, meeting) for lane in range(num_lanes)]
    with ThreadPoolExecutor(num_lanes) as pool:
        running = [pool.submit(guarded, lanes) for lanes in ends]
    failures = [error for work in running if (error := work.exception()) is not None]
    if failures:
        raise next((e for e in failures if not isinstance(e, ChannelClosedError)), failures[0])
    return [work.result() for work in running]
