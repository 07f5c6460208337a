"""Standard output and standard error that never end a command: the terminal is not the result.

A reader that goes away (`| head -1`), a full disk under a log, a closed terminal: what is printed
is dropped from then on, at the level of the descriptor, so that libraries, tracebacks and Python's
own last flush meet no error either. A reader that does not read holds a run up for a moment only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import select
import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Terminal", "guard_terminal", "is_broken_pipe"]

# While the head waits for a reader it hears no other rank; they wait for 10 s and longer.
_READER_LIMIT_S = 3.0


class Terminal:
    """What went wrong with standard output and standard error so far."""

    def __init__(self) -> None:
        self._listener: Callable[[str], object] | None = None
        self._untold: list[str] = []
        self.output_error: OSError | None = None  # of standard output

    @property
    def is_the_result(self) -> bool:
        """Whether what the command prints is all that it does."""
        return self._listener is None

    def listen(self, listener: Callable[[str], object]) -> None:
        """Tell `listener` each failure, those until now too; there is one per stream and kind."""
        self._listener = listener
        while self._untold:
            listener(self._untold.pop(0))

    def failed(self, name: str, error: OSError | None) -> None:
        """`name` cannot be written; `error` None: its reader does not read for now."""
        if name == "standard output" and error is not None:
            self.output_error = error
        if error is None:
            text = f"{name} is read too slowly: some of what the run prints is dropped"
        else:
            text = f"{name} cannot be written ({error.strerror}): nothing is printed from here on"
        self._untold.append(f"{text}; the results in the run folder are not touched by that")
        if self._listener is not None:
            self.listen(self._listener)


class _GuardedOutput(io.RawIOBase):
    """A descriptor whose errors go to a `Terminal`, never to the writer."""

    def __init__(self, descriptor: int, name: str, terminal: Terminal) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._name = name
        self._terminal = terminal
        self._is_stuck = self._was_stuck = False

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether a person may look."""
        return os.isatty(self._descriptor)

    def write(self, data: object) -> int:
        """Write all of `data`, or drop it; returns its length in either case."""
        left = whole = memoryview(data).cast("B")  # type: ignore[arg-type]
        until_s = time.monotonic() + (0.0 if self._is_stuck else _READER_LIMIT_S)
        try:
            while left and self._is_ready(until_s):
                with contextlib.suppress(BlockingIOError):
                    # A pipe that is ready takes so much without blocking.
                    left = left[os.write(self._descriptor, left[: select.PIPE_BUF]) :]
        except OSError as error:
            self._give_up(error)
        return len(whole)

    def _is_ready(self, until_s: float) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        left_ms = max(0.0, until_s - time.monotonic()) * 1000
        self._is_stuck = not poll.poll(left_ms)
        if self._is_stuck and not self._was_stuck:
            self._was_stuck = True
            self._terminal.failed(self._name, None)
        return not self._is_stuck

    def _give_up(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._descriptor)
        os.close(null)
        self._terminal.failed(self._name, error)


@functools.cache
def guard_terminal() -> Terminal:
    """Replace `sys.stdout` and `sys.stderr` of this process, once, by ones that raise no error."""
    terminal = Terminal()
    for name, title in (("stdout", "standard output"), ("stderr", "standard error")):
        stream = getattr(sys, name) or _opened(1 if name == "stdout" else 2)
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError):  # a test's own
            continue
        output = io.TextIOWrapper(
            io.BufferedWriter(_GuardedOutput(descriptor, title, terminal)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=bool(stream.line_buffering),
        )
        setattr(sys, name, output)
    return terminal


def _opened(descriptor: int) -> TextIO:
    """A stream in place of one that was closed (`>&-`): the next file would take its number."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    return open(descriptor, "w", closefd=False, encoding="utf-8")


def is_broken_pipe(error: OSError) -> bool:
    """Whether the reader went away, which needs no word: `| head -1` is meant so."""
    return error.errno == errno.EPIPE
