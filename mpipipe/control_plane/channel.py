"""The contract of a control transport: bytes from rank to rank, in order, nothing lost.

Frames of one source arrive in the order they were sent, whatever their size; frames of different
sources in any order. A frame to the own rank arrives too. Progress is made by the ProgressEngine
that the channel was opened with: it must be running for anything to arrive.

All methods belong to the event-loop thread. Implementations: `memory`, `mpi`.
"""

from __future__ import annotations

from typing import NoReturn, Protocol

__all__ = ["Channel"]


class Channel(Protocol):
    """Moves frames between the ranks of one launch."""

    @property
    def rank(self) -> int:
        """The own number, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def send_nowait(self, to: int, frame: bytes, *, quiet: bool = False) -> None:
        """Start sending `frame` to rank `to` and return at once.

        A `quiet` frame does not make the polling of either rank more eager; it may arrive late.

        Raises:
            ChannelClosedError: the channel was closed.
            ValueError: there is no rank `to`.
        """
        ...

    def receive_nowait(self) -> tuple[int, bytes] | None:
        """The next frame that has arrived already, or None.

        Raises:
            ChannelClosedError: the channel was closed and nothing is left.
        """
        ...

    async def aclose(self) -> None:
        """Finish sending, wait until every rank closes, release. Idempotent.

        Frames that are not received by then are lost: call a barrier first.

        Raises:
            DeadlineError: another rank did not close; `abort` is all that is left.
        """
        ...

    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks now, this one with `exit_code`."""
        ...
