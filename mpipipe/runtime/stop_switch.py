"""Stopping in order: a signal, or the end of the wall time, ends a run so that it can go on later.

`StopSwitch` is this rank's: tripped once, never reset, from any thread. `shared_stop` tells the
other ranks; `job.supervisor` is the process that watches over this one.

Invariants: launchers forward a signal to all ranks, and some send it twice at once, so a second
one counts only after `_SECOND_SIGNAL_S`; it ends the job there and then. The first one gives up a
boot phase (`ranks.in_phase`), and interrupts nothing else. Signals are blocked in every thread and
waited for in one: a library that replaces a handler (LLVM takes SIGUSR1 at the first Triton
compilation) does not get them, and a long call into C does not delay them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from mpipipe.errors import (
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    StoppedByUserError,
    StoppedError,
)
from mpipipe.topology.command import Runner, run_child
from mpipipe.topology.launcher import detect
from mpipipe.topology.slurm import read_job, wall_time_left_s

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet
    from types import FrameType

__all__ = [
    "StopSwitch",
    "block_stop_signals",
    "keep_wall_time",
    "stop_exit_code",
    "stop_signals",
]

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_SECOND_SIGNAL_S = 2.0
_WATCH_INTERVAL_S = 1.0
# Finishing the steps in flight and writing the files takes seconds; Slurm's end is up to 30 s off.
_MARGIN_S = 60.0
_MARGIN_SHARE = 0.1  # of a short job's time


class StopSwitch:
    """Whether this rank was told to stop.

    Args:
        seconds_left: of the job's wall time from now on, less the margin that stopping needs; None:
            no limit is known.
        now_s: monotonic seconds.
    """

    def __init__(
        self, seconds_left: float | None = None, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._now_s = now_s
        self._ends_s = None if seconds_left is None else now_s() + seconds_left
        self._first = threading.Lock()  # taken once, by what trips the switch first
        self._reason = ""
        self._signalled_s: float | None = None  # when the first signal came
        self._listeners: set[Callable[[], None]] = set()
        self.exit_now: Callable[[int], object] = os._exit

    @property
    def reason(self) -> str:
        """Why the run stops, e.g. "SIGTERM"; empty: it does not."""
        if not self._reason and self.seconds_left == 0.0:
            self.trip("the job's wall time ends")
        return self._reason

    @property
    def seconds_left(self) -> float | None:
        """Until the switch trips by itself; None: never."""
        return None if self._ends_s is None else max(0.0, self._ends_s - self._now_s())

    def ends_in(self, seconds: float) -> None:
        """Trip by itself so many seconds from now."""
        self._ends_s = self._now_s() + seconds

    @property
    def exit_code(self) -> int:
        """Of a run that stops for `reason`."""
        return stop_exit_code(self.reason)

    def trip(self, reason: str) -> None:
        """Stop the run; only the first reason counts. From any thread."""
        if self._first.acquire(blocking=False):
            self._reason = reason
            for wake in tuple(self._listeners):
                wake()

    def signalled(self, number: int) -> None:
        """Take a signal, in any thread: the first stops the run, a later one ends it at once."""
        name = signal.Signals(number).name
        self.trip(name)
        now_s = self._now_s()
        if self._signalled_s is None:  # also where the wall time or another rank came before
            self._signalled_s = now_s
        elif now_s - self._signalled_s >= _SECOND_SIGNAL_S:
            # Not through sys.stderr, which another thread may hold.
            os.write(2, f"mpipipe: {name} after {self._reason}: the job ends at once\n".encode())
            self.exit_now(stop_exit_code(name))

    def check(self) -> None:
        """Go on, or not.

        Raises:
            StoppedError: the switch is tripped.
        """
        if self.reason:
            kind = StoppedByUserError if self.exit_code == EXIT_INTERRUPTED else StoppedError
            raise kind(_sentence(self.reason))

    async def tripped(self) -> str:
        """Wait until the switch is tripped, by a signal, a rank or time; returns the reason."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(woken.set)  # ends the loop's pause

        self._listeners.add(wake)
        try:
            while not self.reason:
                try:
                    async with asyncio.timeout(self.seconds_left):
                        await woken.wait()
                except TimeoutError:
                    continue
            return self.reason
        finally:
            self._listeners.discard(wake)


def keep_wall_time(switch: StopSwitch, environ: Mapping[str, str], run: Runner = run_child) -> None:
    """Let the head's switch trip by itself before the job's wall time ends; asks Slurm if need be.

    A site's `--signal` may come earlier; not every script has one.
    """
    job = read_job(environ)
    if job is None or detect(environ).rank not in (None, 0):
        return
    left_s = wall_time_left_s(job, time.time(), run)
    if left_s is not None:
        switch.ends_in(left_s - min(_MARGIN_S, left_s * _MARGIN_SHARE))


def _sentence(reason: str) -> str:
    return (
        f"told to stop ({reason}) while the run was starting: nothing is lost; start it again to "
        "go on"
    )


def stop_exit_code(reason: str) -> int:
    """Of a run that stops for `reason`, a signal's name first: 130 after Ctrl-C, else 75."""
    return EXIT_INTERRUPTED if reason.startswith(signal.SIGINT.name) else EXIT_REQUEUE


def block_stop_signals() -> AbstractSet[signal.Signals]:
    """Keep the signals that stop a run from this thread and all that it starts; returns them.

    SIGHUP is left alone where it is ignored: that is what nohup asks for.
    """
    is_deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    taken = {number for number in _SIGNALS if number != signal.SIGHUP or not is_deaf}
    signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    return taken


@contextmanager
def stop_signals(switch: StopSwitch, watch: Callable[[], object] | None = None) -> Iterator[None]:
    """Let signals trip `switch`; for a command's main thread, until it ends.

    Call it before any other thread is started. Afterwards the signals are ignored: the exit code
    is decided, and `srun --kill-on-bad-exit` sends SIGTERM to ranks that are a moment later in
    leaving, whose end would then count as a kill.

    Args:
        switch: what they trip.
        watch: called every second in a thread of its own.
    """
    ended = threading.Event()

    def take(number: int, _: FrameType | None = None) -> None:
        if not ended.is_set():
            switch.signalled(number)

    def wait() -> None:
        # Not sigtimedwait: continued after a SIGSTOP, Python 3.11's returns what was in memory.
        while not ended.is_set():
            take(signal.sigwait(numbers))

    def keep_watch() -> None:
        while watch is not None and not ended.wait(_WATCH_INTERVAL_S):
            watch()

    numbers = block_stop_signals()
    for number in numbers:  # in case a library's thread unblocks it
        signal.signal(number, take)
    for work, name in ((wait, "signals"), (keep_watch, "supervisor watch")):
        threading.Thread(target=work, name=name, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
