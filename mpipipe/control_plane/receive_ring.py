"""The pre-posted receives of one source, tested in the order in which they were posted.

MPI matches the messages of one source to receives in that order, so nothing overtakes. A ring for
each source, not one for MPI_ANY_SOURCE: MPICH 5.0 over UCX never completes such a receive when its
message came from another host before it was posted; a flood of more pieces than receives hung both
ranks. `mpi` makes the receives and puts the pieces together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

__all__ = ["PersistentReceive", "ReceiveRing"]


class _Status(Protocol):
    @property
    def count(self) -> int: ...


StatusT = TypeVar("StatusT", bound=_Status)
StatusT_contra = TypeVar("StatusT_contra", bound=_Status, contravariant=True)


class PersistentReceive(Protocol[StatusT_contra]):
    """The calls of a persistent request of MPI that a ring needs."""

    def Test(self, status: StatusT_contra) -> bool:  # noqa: N802 - MPI's name
        """Whether it has completed."""
        ...

    def Start(self) -> None:  # noqa: N802 - MPI's name
        """Post it again."""
        ...

    def Cancel(self) -> None:  # noqa: N802 - MPI's name
        """Take it back."""
        ...

    def Wait(self) -> object:  # noqa: N802 - MPI's name
        """Return when it is over."""
        ...

    def Free(self) -> None:  # noqa: N802 - MPI's name
        """Forget it."""
        ...


class ReceiveRing(Generic[StatusT]):
    """Receives of one source that are always posted.

    Args:
        source: the rank whose messages they take.
        slots: buffers, one per receive.
        receives: persistent, into the slots, started in this order.
    """

    def __init__(
        self,
        source: int,
        slots: Sequence[bytearray],
        receives: Sequence[PersistentReceive[StatusT]],
    ) -> None:
        self.source = source
        self._slots = slots
        self._receives = receives
        self._next = 0

    def __len__(self) -> int:
        return len(self._receives)

    def next_piece(self, status: StatusT) -> bytes | None:
        """The piece that came next, with its tag in `status`; None: nothing came yet."""
        receive = self._receives[self._next]
        if not receive.Test(status):
            return None
        piece = bytes(memoryview(self._slots[self._next])[: status.count])
        receive.Start()
        self._next = (self._next + 1) % len(self._receives)
        return piece

    def free(self) -> None:
        """Take the receives back."""
        for receive in self._receives:
            receive.Cancel()
            receive.Wait()
            receive.Free()
