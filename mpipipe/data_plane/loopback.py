"""Tensors within one process: the own rank as destination, and virtual ranks in tests.

As with large MPI messages a send is done when its receive has come: the one copy goes straight from
buffer to buffer. A task that awaits a send before the receive is started therefore waits for ever;
here that happens with small tensors too.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpipipe.data_plane.channel import EdgeKind, PendingTransfer, check_transfer

if TYPE_CHECKING:
    import torch

__all__ = ["LoopbackChannel", "open_loopback_channels"]

_Edge = tuple[int, int, EdgeKind]  # source, destination, kind


@dataclass(frozen=True, slots=True)
class _Posted:
    transfer: PendingTransfer
    tensor: torch.Tensor
    owner: LoopbackChannel


@dataclass(slots=True)
class _Crossing:
    """Transfers of one edge without a counterpart yet: only one of the queues is filled."""

    sends: deque[_Posted] = field(default_factory=deque)
    receives: deque[_Posted] = field(default_factory=deque)


class LoopbackChannel:
    """One virtual rank's end.

    Args:
        rank: the own number.
        world_size: number of virtual ranks.
        edges: shared by all ends.
    """

    def __init__(self, rank: int, world_size: int, edges: dict[_Edge, _Crossing]) -> None:
        self._rank = rank
        self._world_size = world_size
        self._edges = edges
        self._closed = False

    def send(self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind) -> PendingTransfer:
        """Start sending; see the contract.

        Raises:
            ValueError: `tensor` is not contiguous, or there is no such rank.
            ChannelClosedError: after `aclose`.
        """
        edge = (self._rank, destination, kind)
        posted = self._post(f"send of {kind.name} to rank {destination}", tensor, destination)
        crossing = self._edges.setdefault(edge, _Crossing())
        if crossing.receives:
            _copy(posted, crossing.receives.popleft())
        else:
            crossing.sends.append(posted)
        return posted.transfer

    def receive(self, buffer: torch.Tensor, *, source: int, kind: EdgeKind) -> PendingTransfer:
        """Start receiving; see the contract. Raises as `send`."""
        edge = (source, self._rank, kind)
        posted = self._post(f"receive of {kind.name} from rank {source}", buffer, source)
        crossing = self._edges.setdefault(edge, _Crossing())
        if crossing.sends:
            _copy(crossing.sends.popleft(), posted)
        else:
            crossing.receives.append(posted)
        return posted.transfer

    def _post(self, what: str, tensor: torch.Tensor, peer: int) -> _Posted:
        check_transfer(what, tensor, peer, world_size=self._world_size, closed=self._closed)
        return _Posted(PendingTransfer(what, tensor.nbytes), tensor.detach(), self)

    async def aclose(self) -> None:
        """Give up what has no counterpart; its waiters get ChannelClosedError. Idempotent."""
        self._closed = True
        for crossing in self._edges.values():
            for queue in (crossing.sends, crossing.receives):
                mine = [posted for posted in queue if posted.owner is self]
                for posted in mine:
                    queue.remove(posted)
                    posted.transfer.give_up()


def _copy(sent: _Posted, received: _Posted) -> None:
    """Move the tensor and finish both; a receive of another shape or type fails."""
    source, target = sent.tensor, received.tensor
    if source.shape != target.shape or source.dtype != target.dtype:
        expected = f"{tuple(target.shape)} {target.dtype}"
        came = f"{tuple(source.shape)} {source.dtype}"
        sent.transfer.finish()
        received.transfer.finish(received.transfer.mismatch(expected, came))
        return
    target.copy_(source)
    sent.transfer.finish()
    received.transfer.finish()


def open_loopback_channels(world_size: int) -> tuple[LoopbackChannel, ...]:
    """The ends of `world_size` virtual ranks of one event loop."""
    edges: dict[_Edge, _Crossing] = {}
    return tuple(LoopbackChannel(rank, world_size, edges) for rank in range(world_size))
