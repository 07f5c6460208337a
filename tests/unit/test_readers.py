"""The threads that read weight files. What disks and servers may do is done by a `preadv`."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpipipe.errors import CheckpointError
from mpipipe.weights import readers
from mpipipe.weights.readers import Extent, FileReaders, num_readers

CONTENT = bytes(range(256)) * 4
DEADLINE_S = 30.0  # of what must happen
Preadv = Callable[[int, Sequence[memoryview], int], int]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(CONTENT)
    return path


@contextmanager
def opened(num_threads: int, preadv: Preadv = os.preadv) -> Iterator[FileReaders]:
    found = FileReaders(num_threads, preadv=preadv)
    try:
        yield found
    finally:
        found.close()


def assert_no_thread_reads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("read-weights"):
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def test_extents_are_read_whatever_their_order_and_file(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    other.write_bytes(CONTENT[::-1])
    extents = [Extent(path, 1000, 24), Extent(other, 0, 1024), Extent(path, 0, 7)]
    memory = [bytearray(extent.num_bytes) for extent in extents]
    with opened(3) as found:
        reads = [found.read(e, memoryview(m)) for e, m in zip(extents, memory, strict=True)]
        for read in reads:
            read.result(DEADLINE_S)
    assert memory == [CONTENT[1000:], CONTENT[::-1], CONTENT[:7]]


def test_a_read_that_comes_short_is_gone_on_with(path: Path) -> None:
    asked: list[int] = []

    def short(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        asked.append(offset)
        return os.preadv(file, [buffers[0][:100]], offset)

    memory = bytearray(250)
    with opened(1, short) as found:
        found.read(Extent(path, 10, 250), memoryview(memory)).result(DEADLINE_S)
    assert memory == CONTENT[10:260]
    assert asked == [10, 110, 210]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EIO, r"\(Input/output error\): the disk or the file server reports a fault: copy"),
        (errno.ESTALE, r"\(Stale file handle\): the file was replaced on its server while it was"),
        (errno.EACCES, r"\(Permission denied\): is the disk well, and may this user read the file"),
    ],
)
def test_what_a_disk_reports_is_told_with_the_name_of_the_file(
    path: Path, number: int, words: str
) -> None:
    def faulty(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(number, os.strerror(number))

    with opened(2, faulty) as found:
        read = found.read(Extent(path, 0, 8), memoryview(bytearray(8)))
        with pytest.raises(CheckpointError, match=f"{path.name} cannot be read {words}"):
            read.result(DEADLINE_S)


def test_a_file_that_is_gone_is_told_before_a_thread_reads(path: Path) -> None:
    path.unlink()
    with opened(1) as found, pytest.raises(CheckpointError, match="No such file or directory"):
        found.read(Extent(path, 0, 8), memoryview(bytearray(8)))


def test_a_file_shorter_than_its_header_says_is_told_before_a_byte_is_read(path: Path) -> None:
    def never(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise AssertionError("it was read")

    with opened(1, never) as found, pytest.raises(CheckpointError, match="ends at byte 1,024,"):
        found.read(Extent(path, 1000, 25), memoryview(bytearray(25)))


def test_a_file_that_shrinks_while_it_is_read(path: Path) -> None:
    def shrinking(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        os.truncate(path, 600)
        return os.preadv(file, buffers, offset)

    with opened(1, shrinking) as found:
        read = found.read(Extent(path, 500, 524), memoryview(bytearray(524)))
        with pytest.raises(CheckpointError, match=r"ends at byte 600, .* while it was read; copy"):
            read.result(DEADLINE_S)


def test_threads_read_at_once(path: Path) -> None:
    together = threading.Barrier(3)

    def meeting(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        together.wait(DEADLINE_S)
        return os.preadv(file, buffers, offset)

    with opened(3, meeting) as found:
        extents = [Extent(path, 8 * number, 8) for number in range(3)]
        for read in [found.read(e, memoryview(bytearray(8))) for e in extents]:
            read.result(DEADLINE_S)


def test_after_one_fault_the_others_stop(path: Path) -> None:
    is_reading, may_go_on = threading.Event(), threading.Event()
    offsets: list[int] = []

    def half_faulty(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        offsets.append(offset)
        if offset == 0:
            raise OSError(errno.EIO, "bad sector")
        is_reading.set()
        may_go_on.wait(DEADLINE_S)
        return os.preadv(file, [buffers[0][:1]], offset)

    found = FileReaders(2, preadv=half_faulty)
    slow = found.read(Extent(path, 100, 100), memoryview(bytearray(100)))
    assert is_reading.wait(DEADLINE_S)
    faulty = found.read(Extent(path, 0, 8), memoryview(bytearray(8)))
    with pytest.raises(CheckpointError, match="bad sector"):
        faulty.result(DEADLINE_S)
    blocker = found.read(Extent(path, 300, 8), memoryview(bytearray(8)))
    waiting = [found.read(Extent(path, 400, 8), memoryview(bytearray(8))) for _ in range(5)]
    closing = threading.Thread(target=found.close)
    closing.start()
    for read in waiting:
        while not read.cancelled():
            assert closing.is_alive(), "a read that had not begun was not given up"
    may_go_on.set()
    closing.join(DEADLINE_S)
    assert slow.done()
    assert blocker.done()
    assert offsets.count(100) == 1
    assert 101 not in offsets, "it went on with the rest of its extent"
    assert 400 not in offsets
    assert_no_thread_reads()


def test_no_file_and_no_thread_is_left(path: Path) -> None:
    with opened(2) as found:
        found.read(Extent(path, 0, 8), memoryview(bytearray(8))).result(DEADLINE_S)
    assert_no_thread_reads()
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    assert str(path) not in [os.readlink(link) for link in links if os.path.islink(link)]


def test_a_server_that_does_not_answer_keeps_its_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "GRACE_S", 0.05)
    answers = threading.Event()
    descriptors: list[int] = []

    def silent(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        descriptors.append(file)
        answers.wait(DEADLINE_S)
        return os.preadv(file, buffers, offset)

    with opened(1, silent) as found:
        read = found.read(Extent(path, 0, 8), memoryview(bytearray(8)))
        while not descriptors:
            assert not read.done()
    assert os.fstat(descriptors[0]).st_size == len(CONTENT)  # no other file can take its number
    answers.set()
    read.result(DEADLINE_S)
    found.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


@pytest.mark.parametrize(("num_cores", "expected"), [(1, 2), (2, 2), (6, 6), (8, 8), (64, 8)])
def test_a_few_threads_read_for_a_rank(num_cores: int, expected: int) -> None:
    assert num_readers(num_cores) == expected
