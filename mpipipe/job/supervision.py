"""What a rank lets its supervisor know, what that decides, and what it says became of the rank.

The rank tells through a page of memory that both have, written without a call. Deciding is pure:
told what happened and when, it says what to do. `supervisor` handles the processes.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from mpipipe.errors import EXIT_PEER_LOST
from mpipipe.run_folder.status_file import RunState
from mpipipe.runtime.stop_switch import stop_exit_code

__all__ = ["End", "RankPage", "RankPhase", "Supervision", "open_rank_page"]

_MAX_PATH_BYTES = 4096
_GAP_S = 4.0  # between two looks: this process was stopped itself, as by `scontrol suspend`
_SECOND_SIGNAL_S = 2.0  # as for the rank (`runtime.stop_switch`)
# Ranks that boot end together within 3 s of a signal; one that waits inside MPI_Init cannot.
_BOOT_LIMIT_S = 6.0
_AT_ONCE_LIMIT_S = 7.0  # an MPI_Abort that hangs is cut short after 5 s
_LAUNCHER_LIMIT_S = 5.0
# The other ranks name a frozen rank first, as they know its last step: up to 2 s after the limit on
# a busy machine (heartbeat interval, and the time in which they were deaf themselves).
_PEERS_FIRST_S = 3.0
_EXIT_LIMIT_S = 20.0


class RankPhase(enum.IntEnum):
    """How far a rank is."""

    BOOTING = 0  # nothing is lost when it is killed
    RUNNING = 1
    ENDED = 2  # its exit code is decided


class RankPage(ctypes.Structure):
    """What a rank tells; made by `open_rank_page`. Assigning a field tells it."""

    # -1: not known yet. Steps count from 0; the limit is in seconds.
    stage: int
    step: int
    phase: int
    exit_code: int
    silence_limit_s: float
    folder: bytes

    _fields_ = (
        ("stage", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("phase", ctypes.c_int64),
        ("exit_code", ctypes.c_int64),
        ("silence_limit_s", ctypes.c_double),
        ("folder", ctypes.c_char * _MAX_PATH_BYTES),
    )

    def opened(self, folder: Path, stage: int) -> None:
        """This rank computes `stage`, and the run folder is known."""
        path = os.fsencode(folder)
        self.folder = path if len(path) < _MAX_PATH_BYTES else b""
        self.stage = stage

    def ended(self, exit_code: int) -> None:
        """The exit code is decided."""
        self.exit_code = exit_code
        self.phase = RankPhase.ENDED

    @property
    def run_folder(self) -> Path | None:
        """The run folder; None: not known yet."""
        return Path(os.fsdecode(self.folder)) if self.folder else None


def open_rank_page() -> RankPage:
    """A page that this process and those that it forks share."""
    page = RankPage.from_buffer(mmap.mmap(-1, ctypes.sizeof(RankPage)))
    page.stage = page.step = -1
    page.silence_limit_s = 10.0
    return page


@dataclass(frozen=True, slots=True)
class End:
    """How a rank ended: the supervisor's exit code, and what is to be said; "": nothing."""

    exit_code: int
    sentence: str = ""
    state: RunState = RunState.FAILED  # for the run's `status.json`, when there is a sentence


class Supervision:
    """Decides what becomes of a rank.

    Args:
        page: what the rank tells.
        name: of the rank, e.g. "rank 1 on n2".
        launcher: what started it.
        now_s: monotonic seconds, as in all calls.
    """

    def __init__(self, page: RankPage, name: str, launcher: str, now_s: float) -> None:
        self._page = page
        self._name = name
        self._launcher = launcher
        self._looked_s = now_s
        self._stop_signal = ""
        self._stopping_s: float | None = None
        self._at_once_s: float | None = None
        self._frozen_s: float | None = None
        self._gone_s: float | None = None
        self._ended_s: float | None = None
        self._kill_end: End | None = None

    def signalled(self, number: int, now_s: float) -> None:
        """A stop signal came; the rank is handed it."""
        if self._stopping_s is None:
            self._stopping_s, self._stop_signal = now_s, signal.Signals(number).name
        elif self._at_once_s is None and now_s - self._stopping_s >= _SECOND_SIGNAL_S:
            self._at_once_s = now_s

    def frozen(self, now_s: float) -> None:
        """The rank was stopped (SIGSTOP)."""
        self._frozen_s = now_s

    def thawed(self) -> None:
        """The rank was continued."""
        self._frozen_s = None

    def look(self, now_s: float, *, launcher_is_gone: bool) -> signal.Signals | None:
        """The signal that the rank is to get now; None: none. Call it about every second."""
        if now_s - self._looked_s > _GAP_S and self._frozen_s is not None:
            self._frozen_s = now_s  # the rank may be continued a moment after this process
        self._looked_s = now_s
        if launcher_is_gone and self._gone_s is None:
            self._gone_s = now_s
            return signal.SIGHUP
        if self._page.phase == RankPhase.ENDED and self._ended_s is None:
            self._ended_s = now_s
        if self._kill_end is None:
            self._kill_end = self._overdue(now_s)
            return None if self._kill_end is None else signal.SIGKILL
        return None

    def _overdue(self, now_s: float) -> End | None:
        def past(since_s: float | None, limit_s: float) -> bool:
            return since_s is not None and now_s - since_s >= limit_s

        limit_s = self._page.silence_limit_s + _PEERS_FIRST_S
        if self._page.silence_limit_s > 0 and past(self._frozen_s, limit_s):
            return End(
                EXIT_PEER_LOST,
                f"{self._where()} was stopped (SIGSTOP) for {limit_s:g} s and is ended, as the "
                "other ranks wait for it; do not stop single ranks (`kill -CONT` continues one); "
                "start the run again with output.resume=true to go on",
            )
        if past(self._gone_s, _LAUNCHER_LIMIT_S):
            return self._launcher_end()
        if past(self._ended_s, _EXIT_LIMIT_S):
            return End(self._page.exit_code)
        is_booting = self._page.phase == RankPhase.BOOTING
        if past(self._at_once_s, _AT_ONCE_LIMIT_S) or (
            is_booting and past(self._stopping_s, _BOOT_LIMIT_S)
        ):
            sentence = (
                f"{self._where()} was told to stop ({self._stop_signal}) and did not end by itself "
                "in time: its supervisor has ended it; what is complete is kept, start the run "
                "again with output.resume=true to go on"
            )
            return End(stop_exit_code(self._stop_signal), sentence, RunState.STOPPED)
        return None

    def end(self, exit_code: int, *, peak_bytes: int, was_memory_short: bool) -> End:
        """What to say and how to exit, now that the rank has ended.

        Args:
            exit_code: of the rank; -n: signal n has killed it.
            peak_bytes: the most memory that it had.
            was_memory_short: the kernel has killed for memory on this host meanwhile.
        """
        if exit_code >= 0:
            return End(exit_code) if self._gone_s is None else self._launcher_end()
        if self._kill_end is not None:
            return self._kill_end
        if exit_code == -signal.SIGALRM:  # an abort that hung: the rank has said why
            if self._at_once_s is not None:  # the rank was told to stop, twice
                return End(stop_exit_code(self._stop_signal))
            return End(EXIT_PEER_LOST)
        name = signal.Signals(-exit_code).name
        return End(
            EXIT_PEER_LOST,
            f"{self._where()} was killed by {name}{_cause(name, peak_bytes, was_memory_short)}; "
            "start the run again with output.resume=true to go on",
        )

    def _launcher_end(self) -> End:
        return End(
            EXIT_PEER_LOST,
            f"{self._where()} ends because its launcher, {self._launcher}, is gone; most likely it "
            "was killed; start the run again with output.resume=true to go on",
        )

    def _where(self) -> str:
        stage = f" (stage {self._page.stage})" if self._page.stage >= 0 else ""
        if self._page.phase == RankPhase.BOOTING:
            return f"{self._name}{stage}, while booting,"
        if self._page.phase == RankPhase.ENDED:
            return f"{self._name}{stage}, after its work was done,"
        if self._page.step < 0:
            return f"{self._name}{stage}, before its first step,"
        return f"{self._name}{stage}, after step {self._page.step},"


def _cause(name: str, peak_bytes: int, was_memory_short: bool) -> str:
    used = f"it had used up to {peak_bytes / 2**30:.1f} GiB"
    if name == signal.SIGKILL.name:
        if was_memory_short:
            return f": the kernel ran out of memory ({used}); give the job more, or use more ranks"
        return f"; a person did that, or the job reached a limit on its memory ({used})"
    return (
        f" ({used}): a fault in native code, of a driver, a library or the memory itself; the "
        "lines above may show where"
    )
