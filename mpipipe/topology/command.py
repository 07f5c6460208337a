"""One small program run to its end, under a time limit: how Slurm and MPI are asked.

Callers take a `Runner`, so that tests answer in its place.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence

__all__ = ["Runner", "output_of", "run_child"]

Runner = Callable[[Sequence[str], float], "subprocess.CompletedProcess[str]"]


def run_child(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output is captured, its exit code the caller's to judge.

    Bytes of the output that are not UTF-8 (a job's name or folder) become replacement characters.

    Raises:
        OSError: it could not be started.
        subprocess.TimeoutExpired: it took longer than `limit_s` and was killed.
    """
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=limit_s,
        check=False,
    )


def output_of(run: Runner, command: Sequence[str], limit_s: float) -> str | None:
    """What `command` printed; None: it does not exist, failed, or hung."""
    try:
        result = run(command, limit_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
