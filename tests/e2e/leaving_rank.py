"""One of two ranks that have ended in order: rank 1 leaves with work given up, rank 0 later.

For `test_stop`: run under mpiexec. Rank 0 says so when it is still there afterwards.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path

from mpipipe.clock import MonotonicClock
from mpipipe.control_plane.mpi import finalize
from mpipipe.errors import EXIT_REQUEUE
from mpipipe.progress import new_event_loop
from mpipipe.runtime.ranks import leave, open_ranks

LIMIT_S = 30.0
# The launcher kills within some milliseconds of the end of a rank that it takes for a dead one.
TIME_TO_KILL_S = 0.5


async def meet() -> int:
    """Meet the other rank and part from it; returns the process id of rank 1, on both."""
    async with open_ranks(MonotonicClock()) as ranks:
        pids = await ranks.mesh.gather("pids", str(os.getpid()).encode(), LIMIT_S)
        if ranks.is_head:
            assert pids is not None
            return int(pids[1])
        working = ranks.phase_thread.begin(threading.Event().wait)
        working.cancel()
        await asyncio.wait([working])
        return os.getpid()


def main() -> None:
    """Part; rank 0 outlives rank 1."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        second = runner.run(meet())
    if second != os.getpid():
        finalize()  # rank 1 waits for that in its own
        until_s = time.monotonic() + LIMIT_S
        while is_running(second) and time.monotonic() < until_s:
            time.sleep(0.01)
        time.sleep(TIME_TO_KILL_S)
        sys.stdout.write("rank 0 is still there\n")
        sys.stdout.flush()
    leave(EXIT_REQUEUE)


def is_running(pid: int) -> bool:
    """Whether the process has not ended yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


if __name__ == "__main__":
    main()
