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

import enum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["EdgeKind", "RepeatingChannel", "TensorChannel", "Transfer"]


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
        ...


class TensorChannel(Protocol):
    """Moves tensors between ranks. Implementations: `loopback`, `mpi`, `staged`, `nccl`."""

    def send(self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind) -> Transfer:
        """Start sending a contiguous tensor to rank `destination`."""
        ...

    def receive(self, buffer: torch.Tensor, *, source: int, kind: EdgeKind) -> Transfer:
        """Start receiving into a contiguous `buffer` whose shape and dtype equal the sender's."""
        ...

    async def aclose(self) -> None:
        """Finish what is under way, then release. Idempotent."""
        ...


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

        Unlike `send`, it may read `tensor` late: until the receiver has it, nobody may overwrite
        it.
        """
        ...

    def repeated_receive(
        self, buffer: torch.Tensor, *, source: int, kind: EdgeKind
    ) -> Callable[[], None]:
        """What to call for each receive into `buffer` on the stream that is current now."""
        ...
