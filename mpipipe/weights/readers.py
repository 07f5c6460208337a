"""Threads that read stretches of weight files into memory that the caller owns.

What the bytes mean, and which are wanted, is said elsewhere; a call may follow each read, in its
thread. Plain `preadv` at known offsets: no byte is read that was not asked for, no page is mapped.
One thread waits for one answer of a disk or a server at a time; several keep it busy, and copy out
of the page cache at once. The threads inherit the CPUs that the rank is bound to.

Invariants: a read fills its memory or raises `CheckpointError`; after `close` no file is open and
no thread writes, but where a file server has not answered for `GRACE_S`.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mpipipe.errors import CheckpointError

__all__ = ["GRACE_S", "Extent", "FileReaders", "ReadTimes", "num_readers"]

GRACE_S = 5.0  # what a read that has begun may take to end, once another has failed
_FEW, _MANY = 2, 8
_CAUSES = {
    errno.ESTALE: "the file was replaced on its server while it was read: start the run again",
    errno.EIO: "the disk or the file server reports a fault: copy the model to another disk",
}


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of a file, or stretches of equal length at equal distances."""

    path: Path
    offset: int
    num_bytes: int  # of all stretches
    row_bytes: int = 0  # of each; 0: there is one
    stride: int = 0  # from the beginning of one to that of the next

    @property
    def end(self) -> int:
        """Behind its last byte."""
        if not self.row_bytes:
            return self.offset + self.num_bytes
        return self.offset + (self.num_bytes // self.row_bytes - 1) * self.stride + self.row_bytes

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Of each, its place in the file and in what is read."""
        step = self.row_bytes or max(1, self.num_bytes)
        for number, begin in enumerate(range(0, self.num_bytes, step)):
            yield self.offset + number * self.stride, begin


class ReadTimes(NamedTuple):
    """What a thread did for one extent."""

    read_s: float
    then_s: float  # in the call that followed


def num_readers(num_cores: int) -> int:
    """Threads that read for a rank with `num_cores` cores.

    Two at least, as a disk answers while the other copies. Eight copy out of the page cache as fast
    as a PCIe 5 link takes it.
    """
    return min(_MANY, max(_FEW, num_cores))


class FileReaders:
    """Reads extents, a few at a time.

    Args:
        num_threads: that read.
        begin_thread: called first in each of them.
        preadv: `os.preadv`, or what a test puts in its place.
    """

    def __init__(
        self,
        num_threads: int,
        *,
        begin_thread: Callable[[], object] | None = None,
        preadv: Callable[[int, Sequence[memoryview], int], int] = os.preadv,
    ) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "read-weights", begin_thread)
        self._preadv = preadv
        self._files: dict[Path, tuple[int, int]] = {}  # descriptor, bytes
        self._reads: set[Future[ReadTimes]] = set()
        self._closing = False

    def read(
        self, extent: Extent, into: memoryview, then: Callable[[], object] | None = None
    ) -> Future[ReadTimes]:
        """Begin to fill `into` (bytes, as long as `extent`), then call `then` in the same thread.

        Reads begin in the order of calls.

        Raises:
            CheckpointError: the file cannot be opened, or ends before the extent does. The same of
                the answer, where reading shows it.
        """
        file, size = self._open(extent.path)
        if size < extent.end:
            raise _shortened(extent.path, size)
        read = self._pool.submit(self._run, file, extent, into, then)
        self._reads.add(read)
        read.add_done_callback(self._reads.discard)
        return read

    def _open(self, path: Path) -> tuple[int, int]:
        if path not in self._files:
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._files[path] = file, os.fstat(file).st_size
            except OSError as error:
                raise _unreadable(path, error) from error
        return self._files[path]

    def _run(
        self, file: int, extent: Extent, into: memoryview, then: Callable[[], object] | None
    ) -> ReadTimes:
        began_s = time.perf_counter()
        self._fill(file, extent, into)
        read_s = time.perf_counter()
        if then is not None and not self._closing:
            then()
        return ReadTimes(read_s - began_s, time.perf_counter() - read_s)

    def _fill(self, file: int, extent: Extent, into: memoryview) -> None:
        length = extent.row_bytes or extent.num_bytes
        for offset, begin in extent.stretches():
            self._fill_one(file, extent.path, offset, into[begin : begin + length])

    def _fill_one(self, file: int, path: Path, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into) and not self._closing:
            try:
                count = self._preadv(file, [into[done:]], offset + done)
            except OSError as error:
                raise _unreadable(path, error) from error
            if not count:
                raise _shortened(path, offset + done)
            done += count

    def close(self) -> None:
        """Begin no more reads, let those that have begun end, close the files."""
        self._closing = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if wait(list(self._reads), GRACE_S).not_done:
            return  # a closed descriptor may become another file's, which that thread would read
        for file, _ in self._files.values():
            os.close(file)
        self._files.clear()


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    cause = _CAUSES.get(error.errno or 0, "is the disk well, and may this user read the file?")
    return CheckpointError(f"{path} cannot be read ({error.strerror or error}): {cause}")


def _shortened(path: Path, size: int) -> CheckpointError:
    return CheckpointError(
        f"{path} ends at byte {size:,}, which its header does not say: the file was shortened "
        "while it was read; copy it again"
    )
