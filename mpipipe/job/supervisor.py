"""The process that watches over one rank: it starts the rank by forking, and ends as the rank ends.

A launcher knows of a rank that was killed no more than its number and the signal, and a rank that
is stopped, or whose launcher is gone, stays for ever. So the process that the launcher started
only waits: it hands signals on, says in a sentence what became of the rank, and exits with a code
that is documented. `supervision` decides and words the sentences.

Invariants: forked before any thread, MPI and torch. The rank watches over the supervisor too
(`watch_supervisor`), from a thread of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe.errors import EXIT_PEER_LOST
from mpipipe.job.supervision import End, Supervision
from mpipipe.run_folder.status_file import tell_end
from mpipipe.runtime.stop_switch import block_stop_signals
from mpipipe.topology.host import host_name
from mpipipe.topology.launcher import Launcher
from mpipipe.topology.leftovers import remove_leftovers

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from mpipipe.job.supervision import RankPage
    from mpipipe.runtime.stop_switch import StopSwitch
    from mpipipe.topology.launcher import LaunchInfo

__all__ = ["end_with", "supervise", "watch_supervisor"]

_OWN_SIGNALS = {signal.SIGCHLD, signal.SIGALRM}
_INTERVAL_S = 1.0
_TELL_S = 0.25  # a launcher drops text that it has not read when ranks end badly
_ABORT_LIMIT_S = 2.0
_PR_SET_PDEATHSIG = 1  # of prctl(2), Linux


def supervise(info: LaunchInfo, page: RankPage) -> int:
    """Split into a supervisor, in which this never returns, and the rank, which goes on.

    Returns the supervisor's process id, to the rank. Call it before any thread is started.
    """
    numbers = block_stop_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, _OWN_SIGNALS)
    launcher, kills = os.getppid(), _num_memory_kills()
    sys.stdout.flush()
    sys.stderr.flush()
    supervisor, child = os.getpid(), os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OWN_SIGNALS)
        return supervisor
    remove_leftovers(Path("/dev/shm"), Path("/proc"))
    name = f"rank {info.rank if info.rank is not None else '?'} on {host_name()}"
    watch = Supervision(page, name, info.launcher.value, time.monotonic())
    code, peak_bytes = _watch_over(child, watch, numbers, lambda: os.getppid() != launcher)
    was_short = _num_memory_kills() > kills
    _leave(watch.end(code, peak_bytes=peak_bytes, was_memory_short=was_short), info, page, code)
    raise AssertionError("the supervisor has left")


def _watch_over(
    child: int,
    watch: Supervision,
    numbers: AbstractSet[signal.Signals],
    launcher_is_gone: Callable[[], bool],
) -> tuple[int, int]:
    """Until the rank ends: its exit code, -n if signal n has killed it, and its peak memory."""
    # Not sigtimedwait: continued after a SIGSTOP, Python 3.11's returns what was in memory.
    signal.setitimer(signal.ITIMER_REAL, _INTERVAL_S, _INTERVAL_S)
    while True:
        taken = signal.sigwait({*numbers, *_OWN_SIGNALS})
        if taken not in _OWN_SIGNALS:
            watch.signalled(taken, time.monotonic())
            os.kill(child, taken)
        while True:
            pid, status, used = os.wait4(child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                break
            if os.WIFSTOPPED(status):
                watch.frozen(time.monotonic())
            elif os.WIFCONTINUED(status):
                watch.thawed()
            else:
                return os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024
        number = watch.look(time.monotonic(), launcher_is_gone=launcher_is_gone())
        if number is not None:
            os.kill(child, number)


def _leave(end: End, info: LaunchInfo, page: RankPage, code: int) -> None:
    if end.sentence:
        _tell(end, page)
    if code < 0 and info.launcher is Launcher.HYDRA and "PMI_FD" in os.environ:
        # Hydra ends the others as soon as our end of its connection closes, and may then report
        # their SIGKILL; what it is told as MPI_Abort would tell it, it reports.
        with contextlib.suppress(OSError, ValueError):  # hydra is gone, or no longer listens
            os.write(int(os.environ["PMI_FD"]), b"cmd=abort exitcode=%d\n" % end.exit_code)
            time.sleep(_ABORT_LIMIT_S)  # hydra kills this process
    os._exit(end.exit_code)


def watch_supervisor(supervisor: int, page: RankPage, stop: StopSwitch) -> Callable[[], None]:
    """What the rank calls every second: it ends without its supervisor, and wakes a stopped one."""
    frozen_s: float | None = None

    def watch() -> None:
        nonlocal frozen_s
        if os.getppid() != supervisor:
            sentence = (
                f"the process {supervisor} on {host_name()}, which watched over the rank of stage "
                f"{page.stage}, was killed, and the rank ends with it; start the run again with "
                "output.resume=true to go on"
            )
            _tell(End(EXIT_PEER_LOST, sentence), page)
            stop.exit_now(EXIT_PEER_LOST)
        now_s = time.monotonic()
        if _state(supervisor) != "T":
            frozen_s = None
        elif frozen_s is None:
            frozen_s = now_s
        elif 0 < page.silence_limit_s <= now_s - frozen_s:
            os.kill(supervisor, signal.SIGCONT)

    return watch


def end_with(supervisor: int) -> None:
    """Let the kernel end this rank with its supervisor, for when no thread watches any more.

    Its files are written by then. MPI's last words wait for an answer that a launcher does not give
    once the process that it had started, the supervisor, is gone.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != supervisor:  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)


def _tell(end: End, page: RankPage) -> None:
    """On standard error and, as the head may not live to do it, in `status.json`."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"mpipipe: error: {end.sentence}\n".encode())
    if page.run_folder is not None:
        tell_end(page.run_folder, end.state, end.sentence)
    time.sleep(_TELL_S)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _num_memory_kills() -> int:
    """How many processes of this host the kernel has killed for memory."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    except (OSError, ValueError, IndexError):
        return 0
