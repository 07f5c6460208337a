"""Ends this process with a sentence when MPI_Init does not return.

MPI_Init waits for all ranks of the launch, for ever when some were not started, and mpi4py holds
the GIL meanwhile, so that no Python thread could watch it. Hence a small child process watches: it
waits for its standard input to close, and when that takes too long it writes the sentence and sends
SIGTRAP. That signal is number 5, and its C-level handler is `_exit`, which makes the exit code
EXIT_ENVIRONMENT without needing the GIL.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from mpipipe.errors import EXIT_ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["launch_watch"]

_EXITING_SIGNAL = signal.SIGTRAP
assert int(_EXITING_SIGNAL) == EXIT_ENVIRONMENT, (
    "a handler gets the signal's number as its argument"
)

_WATCHER = """
import os, select, sys
pid, limit_s, signal, sentence = sys.argv[1:]
if not select.select([0], [], [], float(limit_s))[0]:
    os.write(2, (sentence + "\\n").encode(errors="replace"))
    os.kill(int(pid), int(signal))
"""


@contextlib.contextmanager
def launch_watch(limit_s: float) -> Iterator[None]:
    """End the process with exit code 5 when the body takes longer than `limit_s` seconds.

    Costs one short-lived child process (about 20 ms). Main thread only.
    """
    sentence = (
        f"mpipipe: MPI did not start within {limit_s:g} s; most likely only some of the ranks were "
        "started, or by a launcher of another MPI (with srun, MPICH needs --mpi=pmi2 and Open MPI "
        "--mpi=pmix): start all ranks with one mpirun or srun command that belongs to this MPI"
    )
    arguments = [str(os.getpid()), str(limit_s), str(int(_EXITING_SIGNAL)), sentence]
    command = [sys.executable, "-I", "-S", "-c", _WATCHER, *arguments]
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    exit_now = ctypes.cast(libc._exit, ctypes.c_void_p)
    previous = libc.signal(int(_EXITING_SIGNAL), exit_now)
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE):
            yield  # leaving closes the pipe, which is what the watcher waits for
    finally:
        libc.signal(int(_EXITING_SIGNAL), previous)
