"""Brings the weights of a stage's parts into staging buffers ahead of their use, step after step.

Part number i of those that are streamed always uses buffer i modulo their number, and a step uses
all parts in order. So what is to come next into a buffer is known as soon as it is free, across the
end of a step too. A part that has a buffer for itself is brought once and stays.

`Prefetcher` knows the order; a *carrier* moves the bytes and waits for them: `HostCarrier` for
stages on a CPU, `cuda_carrier` for a GPU.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mpipipe.metrics.offload import OffloadUse
from mpipipe.topology.usage import name_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mpipipe.weights.layer_store import Region

__all__ = ["Carrier", "HostCarrier", "Piece", "Prefetcher", "StreamedPart", "open_reader"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a region, and where in a buffer they go."""

    region: Region
    start: int  # in the region
    num_bytes: int
    offset: int  # in the buffer


@dataclass(frozen=True, slots=True)
class StreamedPart:
    """A layer, or a block of the head, that passes through a buffer."""

    number: int  # among all parts of the stage
    buffer: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """To be moved each time."""
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def from_disk(self) -> bool:
        """Whether it stands in a file."""
        return any(piece.region.tier == "disk" for piece in self.pieces)


class Carrier(Protocol):
    """Moves parts into their buffers."""

    def load(self, part: StreamedPart) -> None:
        """Begin to bring `part`, as soon as what was `used` in its buffer before it is done."""
        ...

    def arrive(self, part: StreamedPart) -> None:
        """What is computed from now on finds `part` in its buffer.

        Raises:
            EnvironmentSetupError: it cannot be read.
        """
        ...

    def used(self, part: StreamedPart) -> None:
        """What was computed so far was the last use of `part`, until it is loaded again."""
        ...

    def end_step(self) -> None:
        """A step has passed all its gates."""
        ...

    def use(self) -> OffloadUse:
        """How long gates waited so far, and how fast the link to a GPU was."""
        ...

    def close(self) -> bool:
        """Bring nothing more; whether all that was begun has ended. Idempotent."""
        ...


class Prefetcher:
    """The gates of a stage. One thread computes; see `models.streaming.WeightGates`.

    Args:
        parts: those that are streamed, in the order of their use.
        carrier: moves their bytes.
    """

    def __init__(self, parts: Sequence[StreamedPart], carrier: Carrier) -> None:
        self._parts = tuple(parts)
        self._carrier = carrier
        self._at = {part.number: place for place, part in enumerate(parts)}
        self._followers = _followers(parts)
        self._next = 0  # place of the part that this step uses next

    @property
    def bytes_per_step(self) -> int:
        """That come into the buffers for each step."""
        return sum(follower.num_bytes for follower in self._followers if follower is not None)

    def start(self) -> None:
        """Bring the first part of each buffer."""
        seen: set[int] = set()
        for part in self._parts:
            if part.buffer not in seen:
                seen.add(part.buffer)
                self._carrier.load(part)

    def before(self, part: int) -> None:
        """See `WeightGates.before`."""
        place = self._at.get(part)
        if place is None:
            return
        assert place == self._next, f"part {part} is used out of order"
        self._carrier.arrive(self._parts[place])

    def after(self, part: int) -> None:
        """See `WeightGates.after`."""
        place = self._at.get(part)
        if place is None:
            return
        self._next = place + 1
        follower = self._followers[place]
        if follower is not None:
            self._carrier.used(self._parts[place])
            self._carrier.load(follower)

    def end(self) -> None:
        """See `WeightGates.end`."""
        if not self._next:
            return
        for part in self._parts[self._next :]:
            self.before(part.number)
            self.after(part.number)
        self._next = 0
        self._carrier.end_step()


def _followers(parts: Sequence[StreamedPart]) -> list[StreamedPart | None]:
    """By part, the next one in its buffer; None: it has the buffer for itself."""
    followers: list[StreamedPart | None] = []
    for place, part in enumerate(parts):
        order = (*parts[place + 1 :], *parts[:place])
        followers.append(next((other for other in order if other.buffer == part.buffer), None))
    return followers


def open_reader() -> ThreadPoolExecutor:
    """The thread that reads a stage's weights from the disk; it starts with the first work."""
    return ThreadPoolExecutor(1, "weights", name_thread, ("weights",))


class HostCarrier:
    """Fills buffers in RAM, in a thread of its own.

    Args:
        buffers: uint8 [n] each, in host memory.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self._buffers = buffers
        self._reader = open_reader()
        self._loading: dict[int, Future[None]] = {}
        self._wait_s = 0.0

    def load(self, part: StreamedPart) -> None:
        """See `Carrier.load`: what computes on a CPU is done when it is told of."""
        self._loading[part.number] = self._reader.submit(self._fill, part)

    def _fill(self, part: StreamedPart) -> None:
        buffer = self._buffers[part.buffer]
        for piece in part.pieces:
            out = buffer[piece.offset : piece.offset + piece.num_bytes]
            piece.region.read_into(piece.start, out)

    def arrive(self, part: StreamedPart) -> None:
        """See `Carrier.arrive`."""
        loading = self._loading.pop(part.number, None)
        if loading is not None:  # None: it has stayed
            began_s = time.perf_counter()
            loading.result()
            self._wait_s += time.perf_counter() - began_s

    def used(self, part: StreamedPart) -> None:
        """Nothing to note: the thread that computes has done it."""

    def end_step(self) -> None:
        """Nothing to note."""

    def use(self) -> OffloadUse:
        """See `Carrier.use`."""
        return OffloadUse(wait_s=self._wait_s)

    def close(self) -> bool:
        """See `Carrier.close`: waits for one read of the disk at most."""
        self._reader.shutdown(cancel_futures=True)
        return True
