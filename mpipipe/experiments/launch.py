"""Starting ranks: the words of a launch, and one launch run to its end under a time limit.

Inside a Slurm allocation ranks start with srun and the `--mpi=` that fits the installed MPI, as
`launch/run.sh` chooses it; elsewhere with the mpirun beside this Python, else the one on PATH. The
only place of experiments that starts processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mpipipe.errors import ConfigError, EnvironmentSetupError
from mpipipe.experiments.recording import Launched
from mpipipe.topology.command import Runner, output_of, run_child
from mpipipe.topology.mpi_library import (
    MpiFamily,
    ask_library,
    choose_mpi,
    family_of,
    offered_types,
)

__all__ = ["RankLauncher", "choose_launcher", "run_launch"]

_ASK_LIMIT_S = 20.0
_END_LIMIT_S = 15.0  # a run that is told to stop finishes its steps and writes its files
_LEFTOVERS_LIMIT_S = 2.0  # a container may have no one who collects the dead
_POLL_S = 0.02
_LAST_BYTES = 4096
_PR_SET_PDEATHSIG = 1  # of prctl(2), Linux


@dataclass(frozen=True, slots=True)
class RankLauncher:
    """What starts ranks here."""

    program: str  # mpirun, mpiexec or srun
    words: tuple[str, ...] = ()  # that it always gets
    is_slurm: bool = False

    def command(self, num_ranks: int, num_nodes: int, command: Sequence[str]) -> tuple[str, ...]:
        """`command` on so many ranks.

        Raises:
            ConfigError: mpirun is not told which nodes there are.
        """
        if self.is_slurm:
            per_node = -(-num_ranks // num_nodes)
            spread = (f"--nodes={num_nodes}", f"--ntasks={num_ranks}")
            return (
                self.program, *spread, f"--ntasks-per-node={per_node}", *self.words, *command
            )  # fmt: skip
        if num_nodes > 1:
            raise ConfigError(
                f"--nodes {num_nodes}: without a Slurm allocation all ranks start on this host; "
                "use --sbatch, or give the command inside of salloc"
            )
        return (self.program, "-n", str(num_ranks), *self.words, *command)


def choose_launcher(
    environ: Mapping[str, str], run: Runner = run_child, *, equal_cores: bool = False
) -> RankLauncher:
    """The launcher of this place.

    equal_cores: give each rank of a Slurm job the cores of one task, also where it is alone on its
    node and Slurm would leave it those of others. mpirun binds nothing: see threads_per_rank.

    Raises:
        EnvironmentSetupError: there is none, or no `--mpi=` of srun fits the MPI library.
    """
    if environ.get("SLURM_JOB_ID"):
        return _srun(environ, run, "1" if equal_cores else "")
    beside = str(Path(sys.executable).parent)
    path = f"{beside}{os.pathsep}{environ.get('PATH', '')}"
    found = shutil.which("mpirun", path=path) or shutil.which("mpiexec", path=path)
    if found is None:
        raise EnvironmentSetupError(
            "neither mpirun nor mpiexec is beside this Python or on PATH, so no ranks can be "
            "started: install one with `pip install mpipipe[mpich]`, or load the site's MPI module"
        )
    told = output_of(run, (found, "--version"), _ASK_LIMIT_S) or ""
    is_open_mpi = family_of(told) is MpiFamily.OPEN_MPI or "OpenRTE" in told
    return RankLauncher(found, _open_mpi_words() if is_open_mpi else ())


def _open_mpi_words() -> tuple[str, ...]:
    """It binds one or two ranks to a core each, and counts a core as one place."""
    words = ("--bind-to", "none", "--oversubscribe")
    return (*words, "--allow-run-as-root") if os.geteuid() == 0 else words


def _srun(environ: Mapping[str, str], run: Runner, default_cpus: str) -> RankLauncher:
    flag = environ.get("MPIPIPE_SRUN_MPI", "auto")
    if flag == "auto":
        try:
            listed = run(("srun", "--mpi=list"), _ASK_LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EnvironmentSetupError(
                f"srun does not answer in this job ({error}): is Slurm's bin folder on PATH?"
            ) from error
        flag = choose_mpi(ask_library(run), offered_types(listed.stdout + listed.stderr))
    words = [f"--mpi={flag}", "--kill-on-bad-exit=1"]
    if cpus := environ.get("SLURM_CPUS_PER_TASK") or default_cpus:
        words.append(f"--cpus-per-task={cpus}")  # srun does not take it over from sbatch
    words += environ.get("MPIPIPE_SRUN_FLAGS", "").split()
    return RankLauncher("srun", tuple(words), is_slurm=True)


def run_launch(command: Sequence[str], log: Path, limit_s: float) -> Launched:
    """Run `command` to its end, its output into `log`; ranks included, it ends with this call.

    Killed, this process takes the launcher with it: the kernel sends it SIGTERM, as `_end` would.

    Raises:
        EnvironmentSetupError: it could not be started.
    """
    environ = {**os.environ, "SLURM_EXPORT_ENV": "ALL"}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    begin_s, parent, prctl = time.monotonic(), os.getpid(), ctypes.CDLL(None).prctl

    def end_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it was gone before
            os.kill(os.getpid(), signal.SIGKILL)

    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - no thread holds a lock here
            )
        except OSError as error:
            raise EnvironmentSetupError(f"{command[0]} could not be started: {error}") from error
        exit_code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                exit_code = process.wait(limit_s)
        finally:
            _end(process)
    wall_s = time.monotonic() - begin_s
    return Launched(tuple(command), started, exit_code, wall_s, _last_line(log))


def _end(process: subprocess.Popen[bytes]) -> None:
    """See to it that the launch has ended, with all of its process group."""
    try:
        if process.poll() is None:
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_LIMIT_S)
    finally:  # a second Ctrl-C has ended the wait
        limit_s = time.monotonic() + _LEFTOVERS_LIMIT_S
        while _signal(process, signal.SIGKILL) and time.monotonic() < limit_s:
            process.poll()
            time.sleep(_POLL_S)


def _signal(process: subprocess.Popen[bytes], sent: signal.Signals) -> bool:
    """Whether the group of `process` had anyone left to hear it."""
    try:
        os.killpg(process.pid, sent)
    except ProcessLookupError:
        return False
    return True


def _last_line(log: Path) -> str:
    """The last error that was printed, else the last line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LAST_BYTES))
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines or [""])[-1]
