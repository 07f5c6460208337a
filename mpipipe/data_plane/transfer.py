"""One send or receive, as every transport of this package checks and represents it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mpipipe.errors import ChannelClosedError

if TYPE_CHECKING:
    import torch

__all__ = ["MOST_BYTES", "PendingTransfer", "check_transfer"]

MOST_BYTES = 2**31 - 1  # of one MPI message, whose count is a C int


def check_transfer(
    what: str,
    tensor: torch.Tensor,
    peer: int,
    *,
    world_size: int,
    closed: bool,
    most_bytes: int | None = None,
) -> None:
    """Refuse what this end cannot start.

    Args:
        what: the transfer in words, for errors.
        tensor: to be sent or filled.
        peer: the other rank.
        world_size: number of ranks.
        closed: whether the channel is.
        most_bytes: of one tensor; None: any number.

    Raises:
        ChannelClosedError: the channel is closed.
        ValueError: there is no such rank, or the tensor is not contiguous or too large.
    """
    if closed:
        raise ChannelClosedError(f"{what} was started after closing")
    if not 0 <= peer < world_size:
        raise ValueError(f"there is no rank {peer}: ranks are 0 to {world_size - 1}")
    if not tensor.is_contiguous():
        raise ValueError(f"{what}: the tensor is not contiguous (strides {tensor.stride()})")
    if most_bytes is not None and tensor.nbytes > most_bytes:
        raise ValueError(
            f"{what}: {tensor.nbytes} bytes are more than the {most_bytes} of one MPI message"
        )


class PendingTransfer:
    """Done when the transport says so; `wait` may be called again and returns the same outcome.

    Args:
        what: the transfer in words, for errors.
        num_bytes: of the tensor.
    """

    def __init__(self, what: str, num_bytes: int) -> None:
        self.what = what
        self.num_bytes = num_bytes
        self._done = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._done

    @property
    def error(self) -> Exception | None:
        """What `wait` would raise."""
        return self._error

    def finish(self, error: Exception | None = None) -> None:
        """The transport is through with the buffer; `error` when it failed. Once only."""
        assert not self._done, f"{self.what} finished twice"
        self._done = True
        self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Return when the buffer is the caller's again. One waiter at a time.

        Cancelling the wait leaves the transfer under way and the buffer in use.

        Raises:
            ChannelClosedError: the channel was closed first.
            ProtocolMismatchError: (receive) what came is not what was expected.
            PeerLostError: the transport failed.
        """
        while not self._done:
            if self._waiter is None or self._waiter.done():
                self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
