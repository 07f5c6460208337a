"""The contract between the lanes of a stage: sums and pieces that all of them need.

Under tensor parallelism the ranks of a stage, its *lanes*, each compute with a part of every
layer's weights. Every lane calls the same operations in the same order; each returns when the
caller may use its result, on a GPU in the order of the current stream. All lanes get equal bits.

`mpi` and `nccl_lanes` go between ranks, `ThreadLanes` between threads of one process (tests).
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch

from mpipipe.errors import ChannelClosedError

__all__ = ["ALONE", "Lanes", "ThreadLanes", "joined_columns", "open_thread_lanes"]


class Lanes(Protocol):
    """One lane's end."""

    lane: int
    num_lanes: int

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all lanes' `partial`, which is contiguous and may be overwritten.

        Raises:
            ChannelClosedError: the group was closed meanwhile.
        """
        ...

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """All lanes' `part` [..., n], side by side: [..., n * num_lanes]. Raises as `add_up`."""
        ...

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lane 0's `tensor`, which other lanes' may be overwritten with. Raises as `add_up`."""
        ...


class _Alone:
    """The only lane of its stage."""

    lane = 0
    num_lanes = 1

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


ALONE: Lanes = _Alone()


def joined_columns(parts: torch.Tensor) -> torch.Tensor:
    """Lanes' parts [lanes, ..., n] side by side: [..., lanes * n]."""
    return parts.movedim(0, -2).flatten(-2)


# ---- threads of one process ----------------------------------------------------------------------

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


def open_thread_lanes(num_lanes: int) -> list[ThreadLanes]:
    """The ends of all threads."""
    meeting = _Meeting(num_lanes)
    return [ThreadLanes(lane, num_lanes, meeting) for lane in range(num_lanes)]
