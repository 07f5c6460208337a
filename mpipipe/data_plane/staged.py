"""GPU tensors over a channel for CPU tensors, through pinned host memory.

For ranks that NCCL cannot serve: several on one GPU, or a torch without NCCL. A send copies to the
host on the current stream, and the bytes leave when that copy is done; a receive takes the bytes
and then adds the copy to the GPU to the stream. Nothing here waits for the GPU: the engine polls.
CPU tensors pass straight through; one edge (peer and kind) carries one sort of tensor only.

The channel below (`mpi`) moves the bytes; `channel` says what stream order means.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from mpipipe.data_plane.channel import (
    MOST_BYTES,
    EdgeKind,
    PendingTransfer,
    TensorChannel,
    check_transfer,
    drain,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from mpipipe.data_plane.channel import Transfer
    from mpipipe.progress import ProgressEngine

__all__ = ["CudaStaging", "Event", "HostChannel", "StagedChannel", "Staging", "open_staged_channel"]

_LEAST_BUFFER_BYTES = 4096


# ---- host memory ---------------------------------------------------------------------------------


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the stream has passed it."""


class Staging(Protocol):
    """Copies between a device and host memory that it can reach, in stream order."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Host memory: uint8 [num_bytes]."""

    def to_host(self, host: torch.Tensor, tensor: torch.Tensor) -> Event:
        """Add the copy `host` ← `tensor` to the current stream; the event is behind it."""

    def to_device(self, tensor: torch.Tensor, host: torch.Tensor) -> Event:
        """Add the copy `tensor` ← `host` to the current stream; the event is behind it."""


class CudaStaging:
    """Pinned memory and CUDA events."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Pinned, so that copies do not wait on the host."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def to_host(self, host: torch.Tensor, tensor: torch.Tensor) -> torch.cuda.Event:
        """See the protocol."""
        return self._copy(host, tensor)

    def to_device(self, tensor: torch.Tensor, host: torch.Tensor) -> torch.cuda.Event:
        """See the protocol."""
        return self._copy(tensor, host)

    @torch.inference_mode()  # a target made in this mode may be written in no other
    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return event


@dataclass(slots=True)
class _HostBuffers:
    """Host buffers by size, kept: pinning memory takes a millisecond."""

    staging: Staging
    free: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))

    def take(self, num_bytes: int) -> torch.Tensor:
        """At least `num_bytes`: uint8, a power of two long."""
        size = max(_LEAST_BUFFER_BYTES, 1 << max(0, num_bytes - 1).bit_length())
        ready = self.free[size]
        return ready.pop() if ready else self.staging.allocate(size)

    def give_back(self, host: torch.Tensor) -> None:
        """Keep `host` for the next `take`; nothing reads or writes it any more."""
        self.free[host.nbytes].append(host)


# ---- the channel ---------------------------------------------------------------------------------


class HostChannel(Protocol):
    """A channel for CPU tensors whose transfers can be asked whether they are done."""

    def send(self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind) -> PendingTransfer:
        """As `TensorChannel.send`."""

    def receive(self, buffer: torch.Tensor, *, source: int, kind: EdgeKind) -> PendingTransfer:
        """As `TensorChannel.receive`."""

    async def aclose(self) -> None:
        """As `TensorChannel.aclose`."""


def open_staged_channel(engine: ProgressEngine) -> TensorChannel:
    """GPU and CPU tensors over MPI. Collective, as `open_mpi_channel`, with the same errors."""
    from mpipipe.data_plane.mpi import open_mpi_channel

    below = open_mpi_channel(engine)
    channel = StagedChannel(below, engine, CudaStaging(), world_size=below.world_size)
    channel.start()
    return channel


@dataclass(slots=True)
class _Sending:
    """A tensor on its way to the host, then to the peer."""

    what: str
    destination: int
    kind: EdgeKind
    host: torch.Tensor  # uint8, at least as large as the tensor
    payload: torch.Tensor  # the part of `host` that travels, with dtype and shape
    copied: Event
    transfer: PendingTransfer | None = None  # once the copy is done


@dataclass(frozen=True, slots=True)
class _Receiving:
    """A tensor on its way from the peer, then to the device."""

    outer: PendingTransfer
    inner: PendingTransfer
    host: torch.Tensor
    payload: torch.Tensor
    buffer: torch.Tensor
    stream: torch.cuda.Stream | None


class StagedChannel:
    """This rank's end.

    Args:
        below: carries CPU tensors; closed with this channel.
        engine: polls.
        staging: the device's copies.
        world_size: number of ranks.
        is_staged: which tensors go through the host; the others go to `below` as they are.
    """

    def __init__(
        self,
        below: HostChannel,
        engine: ProgressEngine,
        staging: Staging,
        *,
        world_size: int,
        is_staged: Callable[[torch.Tensor], bool] = lambda tensor: tensor.device.type != "cpu",
    ) -> None:
        self._below = below
        self._engine = engine
        self._staging = staging
        self._world_size = world_size
        self._is_staged = is_staged
        self._pool = _HostBuffers(staging)
        # Per stream the copies complete in order, but on several streams a later one may overtake.
        self._sending: dict[tuple[int, EdgeKind], deque[_Sending]] = defaultdict(deque)
        self._receiving: list[_Receiving] = []
        self._uploading: deque[tuple[Event, torch.Tensor]] = deque()
        self._unregister: Callable[[], None] | None = None
        self._closed = False

    def start(self) -> None:
        """Let the engine poll."""
        self._unregister = self._engine.register(self._poll)

    def send(self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind) -> Transfer:
        """Start sending; see the contract. A GPU tensor's `wait` returns at once.

        Raises:
            ValueError: `tensor` is not contiguous or over 2 GiB; no such rank.
            ChannelClosedError: after `aclose`.
            PeerLostError: a CPU tensor could not be sent; for others the engine ends with that.
        """
        if not self._is_staged(tensor):
            return self._below.send(tensor, destination=destination, kind=kind)
        what = f"send of {kind.name} to rank {destination}"
        host, payload = self._host_memory(what, tensor, destination)
        copied = self._staging.to_host(payload, tensor.detach())
        self._sending[destination, kind].append(
            _Sending(what, destination, kind, host, payload, copied)
        )
        self._engine.wake()
        outer = PendingTransfer(what, tensor.nbytes)
        outer.finish()  # in stream order: whatever is added to the stream now follows the copy
        return outer

    def receive(self, buffer: torch.Tensor, *, source: int, kind: EdgeKind) -> Transfer:
        """Start receiving; see the contract. Raises as `send`.

        A GPU tensor's `wait` returns when the copy is added to the stream that is current now.
        """
        if not self._is_staged(buffer):
            return self._below.receive(buffer, source=source, kind=kind)
        what = f"receive of {kind.name} from rank {source}"
        host, payload = self._host_memory(what, buffer, source)
        inner = self._below.receive(payload, source=source, kind=kind)
        stream = torch.cuda.current_stream(buffer.device) if buffer.is_cuda else None
        outer = PendingTransfer(what, buffer.nbytes)
        self._receiving.append(_Receiving(outer, inner, host, payload, buffer.detach(), stream))
        self._engine.wake()
        return outer

    def _host_memory(
        self, what: str, tensor: torch.Tensor, peer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A host buffer, and the part of it that travels in place of `tensor`."""
        size, closed = self._world_size, self._closed
        check_transfer(what, tensor, peer, world_size=size, closed=closed, most_bytes=MOST_BYTES)
        host = self._pool.take(tensor.nbytes)
        return host, host[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    # ---- progress --------------------------------------------------------------------------------

    def _poll(self) -> bool:
        sent = [self._advance(edge) for edge in self._sending.values()]
        received = self._take_received()
        while self._uploading and self._uploading[0][0].query():
            self._pool.give_back(self._uploading.popleft()[1])
        return received or any(sent)

    def _advance(self, edge: deque[_Sending]) -> bool:
        """Hand over what has reached the host, in order; forget what has left.

        Raises:
            MpipipeError: the transport failed; no task awaits a send, so this ends the engine.
        """
        progressed = False
        for sending in edge:
            if sending.transfer is None:
                if not sending.copied.query():
                    break
                sending.transfer = self._below.send(
                    sending.payload, destination=sending.destination, kind=sending.kind
                )
                progressed = True
        while edge and (transfer := edge[0].transfer) is not None and transfer.done:
            self._pool.give_back(edge.popleft().host)
            progressed = True
            if transfer.error is not None and not self._closed:
                raise transfer.error
        return progressed

    def _take_received(self) -> bool:
        done = [receiving for receiving in self._receiving if receiving.inner.done]
        if not done:
            return False
        self._receiving = [entry for entry in self._receiving if not entry.inner.done]
        for receiving in done:
            if receiving.inner.error is None:
                with _on(receiving.stream):
                    event = self._staging.to_device(receiving.buffer, receiving.payload)
                self._uploading.append((event, receiving.host))
            receiving.outer.finish(receiving.inner.error)
        return True

    # ---- ending ----------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Finish the sends, give up receives that nothing came for, release. Idempotent.

        Raises:
            DeadlineError: the GPU or another rank does not take what was sent.
        """
        if self._closed:
            return
        self._closed = True
        await drain(self._unsent, self._poll, cause="a kernel on the GPU hangs: see the logs")
        await self._below.aclose()
        self._poll()
        if self._unregister is not None:
            self._unregister()

    def _unsent(self) -> list[str]:
        """Sends that the channel below does not know of yet; it finishes those that it knows."""
        edges = self._sending.values()
        return [sending.what for edge in edges for sending in edge if sending.transfer is None]


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Makes `stream` the current one. None: nothing to choose from, as in tests without a GPU."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
