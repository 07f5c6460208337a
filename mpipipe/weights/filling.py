"""Stored tensors into tensors that the caller made: read ahead, piece by piece, in order.

`FileReaders` read pieces of `PIECE_BYTES` each. Bytes that only have to be read go straight into
their tensor. Others come through the chunks of a `ReadBuffers`: the thread that has read a chunk
converts it into its tensor, or the calling thread sends it to a GPU. So host memory beside the
tensors is fixed: it grows neither with a tensor nor with the model.

A thread converts by itself. torch's own threads meet after every operation: where cores are shared,
each meeting costs a turn of the scheduler (measured: 15 s instead of 1.3 for 1.3 GB on two busy
cores), and a single one of them touches new memory first.

Invariants: tensors are full in the order in which they were asked for, and hold the same bits
whatever the number of threads, as every piece is written once, by the same operation.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from mpipipe.types import Shard
from mpipipe.weights.read_buffers import ReadBuffers, content_of
from mpipipe.weights.readers import Extent, FileReaders, ReadTimes
from mpipipe.weights.sources import TensorSource

__all__ = ["PIECE_BYTES", "Filling", "TensorFiller"]

PIECE_BYTES = 8 << 20  # 150 µs on a PCIe 5 link, more than a piece takes in Python
_PIECES_PER_READER = 2  # one is read, one waits for its turn or is on its way to a GPU


@dataclass(frozen=True, slots=True)
class Filling:
    """A tensor to fill."""

    tensor: torch.Tensor
    # A stored tensor's name → what it fills: contiguous, of its shape, any device and type.
    parts: Sequence[tuple[str, torch.Tensor]]
    shard: Shard | None = None  # what of the stored tensor is filled in; None: all of it


@dataclass(slots=True)
class _Piece:
    """A part of a stored tensor on its way."""

    extent: Extent
    stored: torch.dtype
    out: torch.Tensor  # flat
    chunk: torch.Tensor | None = None  # it is read there; None: straight into `out`
    read: Future[ReadTimes] | None = None

    @property
    def is_direct(self) -> bool:
        """Whether the bytes of the file are those of `out`."""
        return self.out.device.type == "cpu" and self.out.dtype == self.stored

    def convert(self) -> None:
        """Out of the chunk, into a tensor on the host."""
        assert self.chunk is not None, "it was read there"
        self.out.copy_(content_of(self.chunk, self.stored, self.out))


@dataclass(frozen=True, slots=True)
class _Unpickled:
    """A stored tensor that only torch can read."""

    name: str
    out: torch.Tensor
    shard: Shard | None


class TensorFiller:
    """Fills tensors from one checkpoint; `close` ends its threads.

    Args:
        source: says where the tensors lie.
        num_threads: that read.
        device: where the tensors are; one on the host among those of a GPU is filled as well.
        piece_bytes: of a stored tensor, at a time; a multiple of 8.
    """

    def __init__(
        self,
        source: TensorSource,
        *,
        num_threads: int,
        device: torch.device,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self.bytes_read = 0
        self._wall_s = 0.0
        # Seconds of work, of all threads together.
        self._read_s = 0.0
        self._convert_s = 0.0  # waiting until a GPU has taken a chunk included
        self._num_threads = torch.get_num_threads()  # for torch's operations
        self._max_pieces = num_threads * _PIECES_PER_READER
        self.buffers = ReadBuffers(self._max_pieces, piece_bytes, device)
        self._readers = FileReaders(num_threads, begin_thread=_compute_alone)
        self.source = source
        self._piece_bytes = piece_bytes
        self._num_begun = 0  # pieces that are read, or wait to be taken

    @property
    def convert_s(self) -> float:
        """The part of `fill`'s time that went into converting and sending, not into reading.

        Both go on at once: it is divided as the seconds of the threads are.
        """
        work_s = self._read_s + self._convert_s
        return self._wall_s * self._convert_s / work_s if work_s else 0.0

    def fill(self, fillings: Iterable[Filling]) -> Iterator[Filling]:
        """Each of `fillings` when it is full, in their order.

        Later ones are asked for ahead of that, by as much as keeps the readers busy.

        Raises:
            CheckpointError: a file cannot be read, or is shorter than its header says.
        """
        began_s = time.perf_counter()
        steps: deque[_Piece | _Unpickled | Filling] = deque()
        for filling in fillings:
            for name, out in filling.parts:
                for step in self._cut(name, out, filling.shard):
                    while isinstance(step, _Piece) and not self._begin(step):
                        yield from self._go_on(steps)
                    steps.append(step)
            steps.append(filling)
        while steps:
            yield from self._go_on(steps)
        self._wall_s += time.perf_counter() - began_s

    def _cut(
        self, name: str, out: torch.Tensor, shard: Shard | None
    ) -> Iterator[_Piece | _Unpickled]:
        """A stored tensor, or a part of it, in pieces."""
        entry = self.source.stored(name)
        if entry.extent is None:
            yield _Unpickled(name, out, shard)
            return
        stored: torch.dtype = getattr(torch, entry.dtype)
        flat = out.view(-1)
        if shard is not None and shard.dim == 1:
            yield from self._cut_columns(entry.extent, stored, out, shard)
            return
        skipped = 0 if shard is None else shard.index * flat.numel()  # parts lie row after row
        step = self._piece_bytes // stored.itemsize
        for begin in range(0, flat.numel(), step):
            part = flat[begin : begin + step]
            first = entry.extent.offset + (skipped + begin) * stored.itemsize
            extent = Extent(entry.extent.path, first, part.numel() * stored.itemsize)
            yield _Piece(extent, stored, part)

    def _cut_columns(
        self, whole: Extent, stored: torch.dtype, out: torch.Tensor, shard: Shard
    ) -> Iterator[_Piece]:
        """Of each row of a stored matrix a stretch: many rows a piece."""
        row_bytes = out.shape[1] * stored.itemsize
        stride = row_bytes * shard.count
        num_rows = self._piece_bytes // row_bytes
        assert num_rows, f"a row of {row_bytes} bytes is longer than a piece"
        for begin in range(0, out.shape[0], num_rows):
            part = out[begin : begin + num_rows].view(-1)
            first = whole.offset + begin * stride + shard.index * row_bytes
            num_bytes = part.numel() * stored.itemsize
            yield _Piece(Extent(whole.path, first, num_bytes, row_bytes, stride), stored, part)

    def _begin(self, piece: _Piece) -> bool:
        """Read it, if there is room for one more."""
        if self._num_begun == self._max_pieces:
            return False
        target, then = piece.out, None
        if not piece.is_direct:
            piece.chunk = self.buffers.take()
            if piece.chunk is None:
                return False
            target = piece.chunk[: piece.extent.num_bytes]
            then = piece.convert if piece.out.device.type == "cpu" else None
        piece.read = self._readers.read(piece.extent, target.view(torch.uint8).numpy().data, then)
        self._num_begun += 1
        return True

    def _go_on(self, steps: deque[_Piece | _Unpickled | Filling]) -> Iterator[Filling]:
        """The next step to its end; without one, wait until a GPU has taken a chunk."""
        step = steps.popleft() if steps else None
        if isinstance(step, Filling):
            self.buffers.settle()
            yield step
        elif isinstance(step, _Unpickled):
            content = self.source.unpickled(step.name)
            if step.shard is not None:
                dim = step.shard.dim
                content = content.narrow(dim, *step.shard.bounds(content.shape[dim]))
            step.out.copy_(content)
            self.bytes_read += content.numel() * content.element_size()
        elif step is not None:
            self._take(step)
        else:
            began_s = time.perf_counter()
            self.buffers.wait()
            self._convert_s += time.perf_counter() - began_s

    def _take(self, piece: _Piece) -> None:
        assert piece.read is not None, "begun before it became a step"
        times = piece.read.result()
        self._num_begun -= 1
        self.bytes_read += piece.extent.num_bytes
        self._read_s += times.read_s
        self._convert_s += 0.0 if piece.is_direct else times.then_s
        if piece.chunk is None:
            return
        if piece.out.device.type == "cpu":
            self.buffers.give_back(piece.chunk)
            return
        began_s = time.perf_counter()
        self.buffers.send(piece.chunk, piece.stored, piece.out)
        self._convert_s += time.perf_counter() - began_s

    def close(self) -> None:
        """Stop reading; wait for copies; free the staging buffer."""
        self._readers.close()
        self.buffers.close()
        torch.set_num_threads(self._num_threads)  # what threads to come begin with


def _compute_alone() -> None:
    """Operations of the calling thread use no other."""
    torch.set_num_threads(1)
