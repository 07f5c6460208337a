"""What weights that stream from a disk are held against: the disk itself, past the page cache.

Where memory is plenty the page cache keeps offloaded weights after their first pass. `forget` has
the host drop them again and again while a run reads, by descriptors of the run's own files, which
needs no root; what the kernel counted as read from the disk says whether it did.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["ColdFiles", "disk_record", "plain_rates"]

_BLOCK_BYTES = 8 << 20  # as offloaded weights are read
_NUM_THREADS = 8
_SUFFIX = ".weights"  # of `weights.layer_store.OffloadFile`


def plain_rates(folder: Path, num_bytes: int) -> dict[str, float]:
    """Bytes per second at which a new file in `folder` is read cold: by one thread, and by eight.

    Raises:
        OSError: it cannot be written there.
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        block = os.urandom(_BLOCK_BYTES)
        offsets = range(0, num_bytes, _BLOCK_BYTES)
        for _ in offsets:
            file.write(block)
        os.fsync(file.fileno())
        return {
            f"{number}_threads": _read_rate(file.fileno(), offsets, number)
            for number in (1, _NUM_THREADS)
        }


def _read_rate(descriptor: int, offsets: range, num_threads: int) -> float:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(offset: int) -> int:
        return len(os.pread(descriptor, _BLOCK_BYTES, offset))

    with ThreadPoolExecutor(num_threads) as threads:
        began_s = time.perf_counter()
        num_bytes = sum(threads.map(read, offsets))
        return num_bytes / max(time.perf_counter() - began_s, 1e-9)


class ColdFiles:
    """The files of offloaded weights in `folder` that processes of this user have open.

    Args:
        folder: their names are gone, but their processes' links still say it.
        processes: where the kernel tells of them.
    """

    def __init__(self, folder: Path, processes: Path = Path("/proc")) -> None:
        self._begin = f"{folder.resolve()}/"
        self._processes = processes
        self._read_bytes: dict[str, int] = {}  # by process

    def forget(self) -> int:
        """Have the host drop what it has cached of them; how many there are."""
        number = 0
        for link in self._links():
            try:
                descriptor = os.open(link, os.O_RDONLY)
            except OSError:
                continue  # it was closed in between
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
            self._count(link.parents[1])
            number += 1
        return number

    @property
    def read_bytes(self) -> int:
        """What the disks gave their processes so far, files of other kinds included."""
        return sum(self._read_bytes.values())

    def _links(self) -> Iterator[Path]:
        for process in self._processes.glob("[0-9]*"):
            try:
                links = list((process / "fd").iterdir())
            except OSError:
                continue  # another user's, or it has ended
            for link in links:
                try:
                    target = os.readlink(link)
                except OSError:
                    continue
                if target.startswith(self._begin) and _SUFFIX in target:
                    yield link

    def _count(self, process: Path) -> None:
        try:
            counters = (process / "io").read_text()
        except OSError:
            return  # a kernel without them
        for line in counters.splitlines():
            if line.startswith("read_bytes: "):
                self._read_bytes[process.name] = int(line.partition(" ")[2])


def disk_record(
    record: Mapping[str, Any], plain: Mapping[str, float], read_bytes: int
) -> dict[str, Any]:
    """What a record of `bench throughput` says of the disk, beside the disk itself.

    `rate`: bytes per second that came for the timed job; `passes_before`: over all streamed
    weights, before it; `from_disk`: of all bytes that were asked for since the start, those that
    the kernel had to read.
    """
    stages = [stage for stage in record["stages"] if stage.get("offload")]
    per_step = sum(stage["offload"]["bytes_per_step"] for stage in stages)
    asked = sum(stage["offload"]["disk_bytes"] for stage in stages)
    timed = sum(stage["offload"]["bytes_per_step"] * stage["num_steps"] for stage in stages)
    rate = timed / record["elapsed_s"]
    return {
        "bytes_per_step": per_step,
        "rate": rate,
        "plain": dict(plain),
        "of_plain": rate / max(plain.values()),
        "passes_before": (asked - timed) / per_step if per_step else None,
        "from_disk": read_bytes / asked if asked else None,
    }
