"""Where weights stand that do not stay on their stage's device: host memory, or a file on a disk.

The file belongs to one rank of one job. Its name is removed as soon as it is open, so that nothing
is left of it when the process ends, however it ends; its bytes live as long as the process has it
open, also when the folder is removed. Where the name cannot be removed at once, `close` does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from mpipipe.errors import EnvironmentSetupError
from mpipipe.planning.memory import gib
from mpipipe.topology.usage import name_thread
from mpipipe.weights.layer_layout import ALIGNMENT

if TYPE_CHECKING:
    from mpipipe.types import Tier

__all__ = ["FileRegion", "HostRegion", "OffloadFile", "Region"]

_PIECE_BYTES = 8 << 20  # that one thread reads at a time
# Preallocating is not to be had everywhere; then the file grows as it is written.
_NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


class Region(Protocol):
    """Some bytes that stay where they are."""

    @property
    def tier(self) -> Tier:
        """Where they are."""
        ...

    @property
    def num_bytes(self) -> int:
        """How many."""
        ...

    def write(self, offset: int, tensor: torch.Tensor) -> None:
        """Keep the bytes of a contiguous CPU `tensor` from `offset` on."""
        ...

    def read_into(self, offset: int, out: torch.Tensor) -> None:
        """Fill `out`, uint8 [n] in host memory, with the bytes from `offset` on."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class HostRegion:
    """Host memory; pinned for a GPU, where that can be had."""

    memory: torch.Tensor  # uint8 [num_bytes]
    tier: Tier = "host"

    @property
    def num_bytes(self) -> int:
        """Of the memory."""
        return self.memory.numel()

    def write(self, offset: int, tensor: torch.Tensor) -> None:
        """See `Region.write`."""
        source = _bytes_of(tensor)
        target = self.memory[offset : offset + source.numel()]
        if target.data_ptr() != source.data_ptr():  # else it was filled in its place
            target.copy_(source)

    def read_into(self, offset: int, out: torch.Tensor) -> None:
        """See `Region.read_into`."""
        out.copy_(self.memory[offset : offset + out.numel()])


@dataclass(frozen=True, slots=True, eq=False)
class FileRegion:
    """A part of an `OffloadFile`."""

    file: OffloadFile
    start: int
    num_bytes: int
    tier: Tier = "disk"

    def write(self, offset: int, tensor: torch.Tensor) -> None:
        """See `Region.write`."""
        self.file.write(self.start + offset, tensor)

    def read_into(self, offset: int, out: torch.Tensor) -> None:
        """See `Region.read_into`."""
        self.file.read_into(self.start + offset, out)


class OffloadFile:
    """One private file of weights, made by `open`. Several threads may read it at once.

    A large read is done by several threads: one waits for one answer of the disk at a time, and
    copies out of the page cache no faster than a core does.
    """

    def __init__(
        self, folder: Path, descriptor: int, path: Path | None, *, num_threads: int
    ) -> None:
        self._folder = folder
        self._descriptor = descriptor
        self._path = path  # None: it has no name any more
        self._readers = ThreadPoolExecutor(num_threads, "offload", name_thread, ("offload",))
        self._num_bytes = 0
        self._counting = threading.Lock()
        self.read_bytes = 0  # so far
        self.read_s = 0.0

    @classmethod
    def open(cls, folder: Path, name: str, *, num_threads: int = 1) -> OffloadFile:
        """A new, empty file in `folder`, which no other process sees.

        Args:
            folder: on a local disk.
            name: what its name begins with; names job and rank.
            num_threads: that read; they start with the first large read.

        Raises:
            EnvironmentSetupError: no file can be made there.
        """
        try:
            descriptor, path = tempfile.mkstemp(".weights", f"{name}-", folder)
        except OSError as error:
            raise EnvironmentSetupError(
                f"no file for offloaded weights can be made in {folder} ({error.strerror}): "
                "memory.offload_dir must be a folder that exists on each node and that you may "
                "write to"
            ) from error
        try:
            os.unlink(path)
        except OSError:  # e.g. a network file system that keeps the names of open files
            return cls(folder, descriptor, Path(path), num_threads=num_threads)
        return cls(folder, descriptor, None, num_threads=num_threads)

    def reserve(self, num_bytes: int) -> FileRegion:
        """Room for `num_bytes` more.

        Raises:
            EnvironmentSetupError: the disk is full.
        """
        region = FileRegion(self, self._num_bytes, num_bytes)
        try:
            os.posix_fallocate(self._descriptor, region.start, num_bytes)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise self._unwritten(error, num_bytes) from error
        self._num_bytes += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return region

    def write(self, offset: int, tensor: torch.Tensor) -> None:
        """Write a contiguous CPU `tensor`.

        Raises:
            EnvironmentSetupError: the disk is full or ill.
        """
        view = _bytes_of(tensor).numpy().data
        try:
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._unwritten(error, len(view)) from error

    def read_into(self, offset: int, out: torch.Tensor) -> None:
        """Fill `out`, uint8 [n] in host memory.

        Raises:
            EnvironmentSetupError: the disk is ill, or the file has become shorter.
        """
        began_s = time.perf_counter()
        pieces = out.split(_PIECE_BYTES)
        if len(pieces) == 1:
            self._read(offset, out)
        else:
            offsets = range(offset, offset + out.numel(), _PIECE_BYTES)
            list(self._readers.map(self._read, offsets, pieces))
        with self._counting:
            self.read_bytes += out.numel()
            self.read_s += time.perf_counter() - began_s

    def _read(self, offset: int, out: torch.Tensor) -> None:
        view = out.numpy().data
        try:
            while view:
                count = os.preadv(self._descriptor, [view], offset)
                if not count:
                    raise EnvironmentSetupError(
                        f"the file of offloaded weights in {self._folder} ended {len(view)} bytes "
                        "too early: most likely the file system was taken away or is damaged; "
                        "choose another memory.offload_dir"
                    )
                view, offset = view[count:], offset + count
        except OSError as error:
            raise EnvironmentSetupError(
                f"the offloaded weights in {self._folder} cannot be read ({error.strerror}): is "
                "the disk well? choose another memory.offload_dir"
            ) from error

    def _unwritten(self, error: OSError, num_bytes: int) -> EnvironmentSetupError:
        free = ""
        with contextlib.suppress(OSError):
            status = os.statvfs(self._folder)
            free = f", {gib(status.f_bavail * status.f_frsize)} are free"
        return EnvironmentSetupError(
            f"{self._folder} does not take the weights that are offloaded there "
            f"({error.strerror}; {gib(self._num_bytes)} stand there, {gib(num_bytes)} more are to "
            f"come{free}): make room, choose another memory.offload_dir, or raise "
            "memory.device_bytes or memory.host_bytes"
        )

    def close(self) -> None:
        """Let go of the file and its bytes. Idempotent."""
        self._readers.shutdown(cancel_futures=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [n], the same memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)
