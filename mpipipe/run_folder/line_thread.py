"""JSONL files that a thread of their own writes: what is told there never waits for a disk.

Twice a second the thread takes what was told, makes lines of it and appends them, so that what a
killed rank has told is on its way to the disk after a second. Lines are written whole, a few at a
time: the thread that computes wants the interpreter, too. These files are about a run and not its
results: where they cannot be written, or something goes wrong here, the run goes on, says so once,
and at the end how many lines are lost.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from io import FileIO

    from mpipipe.clock import Clock

__all__ = ["LineFile", "LineThread", "Lines"]

T = TypeVar("T")

_INTERVAL_S = 0.5
_LINES_PER_WRITE = 32  # 0.2 ms of the interpreter's time
_MOST_WAITING = 200_000
_BLOCK_BYTES = 1 << 20


class Lines(Protocol):
    """A file that a line thread writes."""

    path: Path
    num_lost: int  # lines that are not in it

    @property
    def told(self) -> Sized:
        """What waits to be written."""
        ...

    def write_told(self) -> None:
        """Append what was told so far."""
        ...

    def close(self) -> None:
        """The thread writes no more."""
        ...


class LineFile(Generic[T]):
    """One file; `tell` may be called from any thread, the rest is the writing thread's.

    Args:
        path: appended to; a torn last line of a rank that was killed is cut off.
        line_of: the line, with its end, of what is told.
        num_kept: the latest lines to keep at least, in this file and one beside it that has `.1`
            before its suffix; None: all. A file of more than twice as many, as one that kept all
            lines, stays whole: it gets `.all` (or `.all2` …) before its suffix.
    """

    def __init__(
        self, path: Path, line_of: Callable[[T], str], *, num_kept: int | None = None
    ) -> None:
        self.path = path
        self.num_lost = 0  # told too fast, or the disk did not take them
        self.told: deque[T] = deque()
        self._line_of = line_of
        self._num_kept = num_kept
        self._num_lines = 0
        self._file: FileIO | None = None

    def tell(self, item: T) -> None:
        """Have a line of it written soon; lost when very many wait already."""
        if len(self.told) < _MOST_WAITING:
            self.told.append(item)
        else:
            self.num_lost += 1

    def write_told(self) -> None:
        """Append what was told so far.

        Raises:
            Exception: the file takes no more (OSError), or what was told makes no line; the lines
                at hand are lost, later ones are tried by the next call.
        """
        for _ in range(-(-len(self.told) // _LINES_PER_WRITE)):
            items = [self.told.popleft() for _ in range(min(_LINES_PER_WRITE, len(self.told)))]
            try:
                self._append("".join(map(self._line_of, items)), len(items))
            except Exception:
                self.num_lost += len(items)
                raise

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _append(self, text: str, num_lines: int) -> None:
        lines = text.encode(errors="backslashreplace")  # half of a surrogate pair, in an id
        file = self._file or self._open()
        if self._num_kept is not None and self._num_lines >= self._num_kept:
            self.close()
            kept_all = self._num_lines > 2 * self._num_kept
            self.path.replace(self._free_name() if kept_all else self._beside(".1"))
            file = self._open()
        if file.write(lines) < len(lines):
            self.close()  # opening it again cuts the torn line off
            raise OSError(28, "the last line was not written as a whole")
        self._num_lines += num_lines

    def _open(self) -> FileIO:
        file = self.path.open("a+b", buffering=0)
        self._file = file
        size = file.seek(0, os.SEEK_END)
        whole_size = _size_of_whole_lines(file, size)
        if whole_size < size:
            file.truncate(whole_size)
        # More than twice as many are not told from still more.
        most = 0 if self._num_kept is None else 2 * self._num_kept + 1
        self._num_lines = _num_lines(file, most)
        return file

    def _beside(self, mark: str) -> Path:
        return self.path.with_suffix(f"{mark}{self.path.suffix}")

    def _free_name(self) -> Path:
        names = (self._beside(f".all{n}" if n > 1 else ".all") for n in itertools.count(1))
        return next(name for name in names if not name.exists())


def _size_of_whole_lines(file: FileIO, size: int) -> int:
    """Bytes up to the end of the last line that has one; a torn line may be of any length."""
    end = size
    while end:
        begin = max(0, end - _BLOCK_BYTES)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def _num_lines(file: FileIO, most: int) -> int:
    """The lines of `file`, or some number of at least `most`; a file may be larger than memory."""
    num_lines = 0
    file.seek(0)
    while num_lines < most and (block := file.read(_BLOCK_BYTES)):
        num_lines += block.count(b"\n")
    return num_lines


class LineThread:
    """Writes files, and does what is due, until it is closed.

    Args:
        files: to write.
        clock: monotonic seconds.
        work: called at the start, whenever `work_interval_s` has passed, and at the end; it may
            tell the files.
        work_interval_s: 0: `work` is not called.
        on_failure: told in a sentence, once each, that lines are lost and that `work` fails, from
            this thread; at the end how many lines are lost, by `close`.
    """

    def __init__(
        self,
        files: Sequence[Lines],
        *,
        clock: Clock,
        work: Callable[[], None] = lambda: None,
        work_interval_s: float = 0.0,
        on_failure: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._files = files
        self._clock = clock
        self._work = work
        self._work_interval_s = work_interval_s
        self._on_failure = on_failure
        self._told: set[str] = set()
        self._busy_s = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)

    @property
    def busy_s(self) -> float:
        """Seconds in which it made and wrote lines so far; `work` is not counted."""
        return self._busy_s

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self, limit_s: float) -> bool:
        """Write what was told and end; returns whether that was done within `limit_s`."""
        self._ending.set()
        self._thread.join(limit_s)
        lost = {file.path.name: file.num_lost + len(file.told) for file in self._files}
        counts = ", ".join(f"{name}: {num_lost:,}" for name, num_lost in lost.items() if num_lost)
        if counts:
            self._warn("lost", f"lines about the run are lost ({counts}); completions are not")
        return not self._thread.is_alive()

    def _run(self) -> None:
        due_s = self._clock.now_s()
        while not self._ending.is_set():
            self._write()  # first: what is told waits for no driver that does not answer
            if self._work_interval_s > 0 and self._clock.now_s() >= due_s:
                self._do_work()
                due_s += self._work_interval_s
                due_s = max(due_s, self._clock.now_s())  # after a time in which it stood still
            self._ending.wait(_INTERVAL_S)
        self._write()
        if self._work_interval_s > 0:
            self._do_work()
        for file in self._files:
            while file.told:  # a line that fails keeps no later one from the disk
                self._write_file(file)
            with self._timed(), suppress(OSError):  # what a network file system found out late
                file.close()

    def _do_work(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - drivers and the kernel may answer anything
            self._warn(
                "work",
                f"a sample cannot be taken ({type(error).__name__}: {error}): samples are missing "
                "until it can; completions are not touched by that",
            )

    def _write(self) -> None:
        for file in self._files:
            self._write_file(file)

    def _write_file(self, file: Lines) -> None:
        try:
            with self._timed():
                file.write_told()
        except Exception as error:  # noqa: BLE001 - what was told may be what JSON cannot hold
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self._warn(
                "write",
                f"{file.path} cannot be written ({reason}): lines about the run are lost until it "
                "can; completions are not touched by that",
            )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began_s = self._clock.now_s()
        try:
            yield
        finally:
            self._busy_s += self._clock.now_s() - began_s

    def _warn(self, kind: str, message: str) -> None:
        """Tell the first of each kind; the run goes on without the rest."""
        if kind not in self._told:
            self._told.add(kind)
            with suppress(OSError, ValueError):  # the terminal's disk may be full too, or closed
                self._on_failure(message)
