"""A rank's end of the process that compiles its host's kernels (`kernel_process`).

One rank of a host has it. It costs the import of torch on a core that the ranks do not use, and
saves the seconds in which each rank would compile one kernel after the other. Where all that a plan
launches was compiled before, it is ended at once: with a warm cache on a host with an H100 it took
5.5 s, and the ranks waited 2 to 6 s for it.
"""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe.plain_values import from_json, to_json
from mpipipe.planning.compiled_kernels import compiled_note
from mpipipe.runtime.kernel_process import Compiled, Order
from mpipipe.topology.gpu import driver_in_sight, told_local_rank

if TYPE_CHECKING:
    from mpipipe.planning.plan import PipelinePlan

__all__ = ["KernelProcess", "kernels_ahead"]

_MOST_PROCESSES = 10  # the longest kernel of a plan takes a tenth of the time of all
_LIMIT_S = 120.0  # ten times what one core needs for all kernels of a stage
# Of launchers: a process that has them might be taken for a rank.
_RANK_VARIABLES = ("PMI", "OMPI_", "MPI", "HYDRA", "HYDI", "TRITON_INTERPRET")


class KernelProcess:
    """The process, from its start to its end."""

    def __init__(self, process: subprocess.Popen[str], num_processes: int) -> None:
        self._process = process
        self._num_processes = num_processes
        self._ordered = False
        self._note: Path | None = None  # see `compiled_note`
        self.found_compiled = False  # all that was ordered was compiled before

    def order(
        self,
        plan: PipelinePlan,
        stages: Sequence[int],
        capability: tuple[int, int],
        processors: int,
    ) -> None:
        """Let it compile the kernels of `stages` of `plan`, for GPUs like this."""
        order = Order(plan, tuple(stages), capability, processors, self._num_processes)
        with suppress(OSError, RuntimeError):  # a file that cannot be read, no home folder
            self._note = compiled_note(plan, stages, capability, processors)
            if self._note.exists():
                self.found_compiled = True
                self.close()
                return
        with suppress(OSError):  # it has ended: `wait` says so
            assert self._process.stdin is not None
            self._process.stdin.write(to_json(order) + "\n")
            self._process.stdin.flush()
        self._ordered = True

    def wait(self, limit_s: float = _LIMIT_S) -> Compiled | None:
        """What came of the order; None: there was none. Takes `limit_s` at most."""
        if not self._ordered:
            return None
        self._ordered = False
        answers = self._process.stdout
        assert answers is not None
        if not select.select([answers], [], [], limit_s)[0]:
            return Compiled(0, limit_s, "they are not compiled after so long a time")
        try:
            compiled = from_json(Compiled, answers.readline())
        except (OSError, ValueError):
            return Compiled(0, 0.0, "the process that compiles them has ended")
        if self._note is not None and not compiled.problem:  # also where none is known ahead
            with suppress(OSError):
                self._note.touch()
        return compiled

    def close(self) -> None:
        """End it, and what it started. Idempotent."""
        if self._process.poll() is None:  # first: a thread may be reading from it
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._process.wait()


@contextmanager
def kernels_ahead(device: str) -> Iterator[KernelProcess | None]:
    """The process, where this rank is to have one: kernels are compiled for a GPU of this host.

    Args:
        device: `pipeline.device`.
    """
    spare = len(os.sched_getaffinity(0)) - 1
    wanted = device in {"auto", "cuda"} and told_local_rank(os.environ) in {0, None} and spare > 0
    if not (wanted and driver_in_sight() and importlib.util.find_spec("triton")):
        yield None
        return
    process = _start(os.environ, min(spare, _MOST_PROCESSES))
    try:
        yield process
    finally:
        if process is not None:
            process.close()


def _start(environ: Mapping[str, str], num_processes: int) -> KernelProcess | None:
    """None: this host starts no more processes."""
    kept = {name: text for name, text in environ.items() if not name.startswith(_RANK_VARIABLES)}
    places = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    command = [sys.executable, "-P", "-m", "mpipipe.runtime.kernel_process"]
    own = {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**kept, **own},
            encoding="ascii",
            start_new_session=True,  # a group of its own, with the processes that it forks
        )
    except OSError:
        return None
    return KernelProcess(process, num_processes)
