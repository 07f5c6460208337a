"""The contract of a tensor transport: start a transfer, await its end.

Shapes follow from the plan and the step message, so nothing but the tensor travels. Within one
(source, destination, kind) transfers match in the order they were started. A buffer belongs to the
transport from `send`/`receive` until `Transfer.wait` returns: do not touch it in between.

Tensors on a GPU travel *in stream order*, and so does that promise: `send` takes what the current
stream has computed by then, `receive` fills the buffer for what is added to the current stream
after `wait` has returned, and after either `wait` the stream, not the host, may use the buffer.
Nothing waits on the host for the GPU. A receive keeps its stream waiting until the tensor comes, so
add transfers to a stream in an order in which they can complete: on the first stage, send the
hidden states of a step before receiving its ids. (`staged` receives without holding the stream.)
"""

from __future__ import annotations

import asyncio
import enum
import time
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mpipipe.errors import ChannelClosedError, DeadlineError, ProtocolMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = [
    "MOST_BYTES",
    "EdgeKind",
    "PendingTransfer",
    "RepeatingChannel",
    "TensorChannel",
    "Transfer",
    "check_transfer",
    "drain",
]


class EdgeKind(enum.IntEnum):
    """What travels on an edge; kinds never mix, even between the same two ranks."""

    HIDDEN = 1  # stage s → s+1: hidden states [T, hidden]
    IDS = 2  # last stage → head: sampled ids [num_sampled], int64; ahead, one 0 if none


class Transfer(Protocol):
    """One send or receive under way."""

    async def wait(self) -> None:
        """Return when the buffer is the caller's again.

        Raises:
            ChannelClosedError: the channel was closed first.
        """


class TensorChannel(Protocol):
    """Moves tensors between ranks. Implementations: `loopback`, `mpi`, `staged`, `nccl`."""

    def send(self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind) -> Transfer:
        """Start sending a contiguous tensor to rank `destination`."""

    def receive(self, buffer: torch.Tensor, *, source: int, kind: EdgeKind) -> Transfer:
        """Start receiving into a contiguous `buffer` whose shape and dtype equal the sender's."""

    async def aclose(self) -> None:
        """Finish what is under way, then release. Idempotent."""


@runtime_checkable
class RepeatingChannel(Protocol):
    """A channel that can prepare a transfer of the same memory to be done again and again.

    As MPI's persistent requests: prepared once, then started at little cost to the host. The other
    end may use `send` and `receive` for the same transfers.
    """

    def repeated_send(
        self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind
    ) -> Callable[[], None]:
        """What to call for each send of `tensor` behind the work of the stream that is current now.

        Unlike `send`, it may read `tensor` late: do not overwrite it until the receiver has it.
        """

    def repeated_receive(
        self, buffer: torch.Tensor, *, source: int, kind: EdgeKind
    ) -> Callable[[], None]:
        """What to call for each receive into `buffer` on the stream that is current now."""


# ---- what every implementation here does alike ---------------------------------------------------

MOST_BYTES = 2**31 - 1  # of one MPI message, whose count is a C int
_CLOSE_LIMIT_S = 30.0
_CLOSE_POLL_S = 0.5e-3


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

    def give_up(self) -> None:
        """The channel is closed before the transfer's end."""
        self.finish(ChannelClosedError(f"the tensor channel was closed during the {self.what}"))

    def mismatch(self, expected: object, came: object) -> ProtocolMismatchError:
        """The error of a receive for which something else came; both in words."""
        return ProtocolMismatchError(
            f"the {self.what} expected {expected} but got {came}; the ranks disagree about the "
            "step, which is a bug in mpipipe: please report it with the logs"
        )

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


async def drain(
    unfinished: Callable[[], Sequence[str]], poll: Callable[[], bool], *, cause: str
) -> None:
    """Before a channel is closed: poll until nothing is unfinished.

    Args:
        unfinished: the transfers under way, in words.
        poll: moves them on; returns whether any moved.
        cause: what most likely holds them up, and what to do, for the error.

    Raises:
        DeadlineError: some are under way for too long.
    """
    limit_s = time.monotonic() + _CLOSE_LIMIT_S
    while names := unfinished():
        if time.monotonic() >= limit_s:
            raise DeadlineError(
                f"the tensor channel could not be closed: {', '.join(names)} unfinished after "
                f"{_CLOSE_LIMIT_S:g} s; most likely {cause}"
            )
        if not poll():
            await asyncio.sleep(_CLOSE_POLL_S)
