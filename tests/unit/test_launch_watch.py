"""A start of MPI that does not return ends the process with a sentence, even with the GIL held."""

from __future__ import annotations

import signal
import subprocess
import sys

from mpipipe.control_plane.launch_watch import launch_watch
from mpipipe.errors import EXIT_ENVIRONMENT

HANGS = """
import ctypes
from mpipipe.control_plane.launch_watch import launch_watch
with launch_watch(0.2):
    ctypes.PyDLL(None).sleep(300)  # a C call that keeps the GIL, as MPI_Init through mpi4py does
"""


def test_a_hanging_start_ends_with_exit_code_5_and_says_what_to_do() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == EXIT_ENVIRONMENT
    assert "MPI did not start within 0.2 s" in ended.stderr
    assert "start all ranks with one mpirun or srun command" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_start_that_returns_goes_on_and_leaves_signals_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTRAP)
    with launch_watch(60):
        pass
    assert signal.getsignal(signal.SIGTRAP) == before
