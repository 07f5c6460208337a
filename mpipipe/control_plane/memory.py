"""Control frames within one process: virtual ranks for tests, and runs of one rank without MPI.

The same contract as `mpi`, except that `aclose` does not wait for the other virtual ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from mpipipe.control_plane.mailbox import Mailbox
from mpipipe.errors import ChannelClosedError

if TYPE_CHECKING:
    from mpipipe.progress import ProgressEngine

__all__ = ["MemoryChannel", "open_memory_channels"]


class MemoryChannel:
    """One virtual rank's end. `group` holds all ends by rank; `open_memory_channels` fills it."""

    def __init__(self, rank: int, group: list[MemoryChannel], engine: ProgressEngine) -> None:
        self._rank = rank
        self._group = group
        self._engine = engine
        self._inbox: Mailbox[tuple[int, bytes]] = Mailbox(f"the control channel of rank {rank}")
        self._closed = False

    @property
    def rank(self) -> int:
        """The own number, from 0."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of virtual ranks."""
        return len(self._group)

    def send_nowait(self, to: int, frame: bytes, *, quiet: bool = False) -> None:
        """Put `frame` into the inbox of rank `to`. Raises as in the contract."""
        if self._closed:
            raise ChannelClosedError(f"rank {self._rank} sent to rank {to} after closing")
        if not 0 <= to < self.world_size:
            raise ValueError(f"there is no rank {to}: ranks are 0 to {self.world_size - 1}")
        self._group[to]._take(self._rank, frame, quiet=quiet)

    def _take(self, source: int, frame: bytes, *, quiet: bool) -> None:
        if self._closed:
            return
        self._inbox.put((source, frame))
        if not quiet:
            self._engine.wake()

    def receive_nowait(self) -> tuple[int, bytes] | None:
        """The next frame, or None. Raises as in the contract."""
        return self._inbox.get_nowait()

    async def aclose(self) -> None:
        """Release. Idempotent."""
        self._closed = True
        self._inbox.close()

    def abort(self, exit_code: int) -> NoReturn:
        """Close all virtual ranks and leave the process by SystemExit."""
        for channel in self._group:
            channel._closed = True
            channel._inbox.close()
        raise SystemExit(exit_code)


def open_memory_channels(world_size: int, engine: ProgressEngine) -> tuple[MemoryChannel, ...]:
    """The ends of `world_size` virtual ranks that share one event loop and its engine."""
    group: list[MemoryChannel] = []
    group.extend(MemoryChannel(rank, group, engine) for rank in range(world_size))
    return tuple(group)
