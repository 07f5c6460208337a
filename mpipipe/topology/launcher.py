"""Who started this process, and as which of how many: read from the environment alone.

The variables are those seen under Slurm 22.05 (`srun --mpi=pmi2|pmix|none`, sbatch, salloc), hydra
of MPICH and mpirun of Open MPI; those of `_UNTRIED` are documented, not tried.

Invariant: the innermost launcher wins, because mpirun inside a Slurm job starts its own daemons
with srun, whose `SLURM_PROCID` and `SLURM_NTASKS` then count nodes, not ranks.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpipipe.errors import EnvironmentSetupError
from mpipipe.topology.mpi_library import MpiFamily, choose_mpi, family_of, short_name

__all__ = ["LaunchInfo", "Launcher", "check_pmi", "check_world_size", "detect", "local_ranks"]

# Slurm numbers its special steps (batch script, interactive shell, extern) from the top of uint32.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


class Launcher(str, enum.Enum):
    """The program that started the ranks."""

    SRUN = "srun"
    HYDRA = "mpiexec (hydra)"  # MPICH's and Intel MPI's
    OPENMPI = "mpirun (Open MPI)"
    PMIX = "a PMIx launcher"
    PALS = "mpiexec (PALS)"  # HPE Cray's
    FLUX = "flux run"
    JSRUN = "jsrun"
    MVAPICH = "mpirun_rsh"
    TORCHRUN = "torchrun"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class LaunchInfo:
    """The launch as the environment tells it; None: it does not say."""

    launcher: Launcher
    rank: int | None = None
    world_size: int | None = None
    local_rank: int | None = None
    mpi_expected: bool = False  # the ranks should find each other through MPI
    detail: str = ""  # srun's --mpi value


# The variables that tell rank, ranks and rank on this host; "": the launcher has none.
_VARIABLES = {
    Launcher.OPENMPI: (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    Launcher.HYDRA: ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    Launcher.MVAPICH: ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    Launcher.PALS: ("PALS_RANKID", "", "PALS_LOCAL_RANKID"),
    Launcher.JSRUN: ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    Launcher.FLUX: ("PMI_RANK", "PMI_SIZE", "FLUX_TASK_LOCAL_ID"),
    Launcher.PMIX: ("PMIX_RANK", "", "PMIX_LOCAL_RANK"),
    Launcher.TORCHRUN: ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
}
_UNTRIED = (Launcher.MVAPICH, Launcher.PALS, Launcher.JSRUN, Launcher.FLUX)


def detect(environ: Mapping[str, str]) -> LaunchInfo:
    """The innermost launcher of this process."""
    found = (
        _told(environ, Launcher.OPENMPI, "OMPI_COMM_WORLD_SIZE"),
        # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE too; only hydra adds MPI_LOCALRANKID.
        _told(environ, Launcher.HYDRA, "PMI_SIZE", "MPI_LOCALRANKID"),
        _srun(environ),
        *(_told(environ, name, *_VARIABLES[name][::2]) for name in _UNTRIED),
        _told(environ, Launcher.HYDRA, "PMI_SIZE"),
        _told(environ, Launcher.PMIX, "PMIX_RANK"),
        _told(environ, Launcher.TORCHRUN, "RANK", "WORLD_SIZE"),
    )
    return next((info for info in found if info is not None), LaunchInfo(Launcher.NONE))


def _told(environ: Mapping[str, str], launcher: Launcher, *needed: str) -> LaunchInfo | None:
    """What `launcher` tells; None where the environment lacks one of the variables `needed`."""
    if not set(needed) <= environ.keys():
        return None
    rank, world_size, local_rank = (_number(environ, name) for name in _VARIABLES[launcher])
    by_mpi = launcher is not Launcher.TORCHRUN
    return LaunchInfo(launcher, rank, world_size, local_rank, mpi_expected=by_mpi)


def local_ranks(seats: Sequence[tuple[str, int | None]]) -> list[int]:
    """Each rank's number among the ranks of its host.

    Args:
        seats: by rank, its host and the local rank that its launcher told, None where it did not.

    Without numbers, or where two ranks of a host have the same (a LOCAL_RANK that was exported to
    all), the ranks of a host are counted in order.
    """
    told = Counter(seats)
    distinct = all(told[seat] == 1 and seat[1] is not None for seat in seats)
    so_far: Counter[str] = Counter()
    counted = []
    for host, local_rank in seats:
        counted.append(local_rank if distinct and local_rank is not None else so_far[host])
        so_far[host] += 1
    return counted


def _srun(environ: Mapping[str, str]) -> LaunchInfo | None:
    """Of a task of srun; None for a batch script or an salloc shell, which are one process.

    A batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS, but no SLURM_STEP_ID.
    """
    step, rank = _number(environ, "SLURM_STEP_ID"), _number(environ, "SLURM_PROCID")
    if step is None or step >= _FIRST_SPECIAL_STEP or rank is None:
        return None
    return LaunchInfo(
        launcher=Launcher.SRUN,
        rank=rank,
        # SLURM_NTASKS is inherited from the job by some versions; the step's own count is exact.
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS") or _number(environ, "SLURM_NTASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        mpi_expected=True,
        detail=environ.get("SLURM_MPI_TYPE", ""),
    )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else None


def check_pmi(info: LaunchInfo, mpi_library: str) -> None:
    """Check, before MPI is started, what the library would end the process for in MPI_Init.

    MPICH 5.0 without PMIx aborts under `srun --mpi=pmix`, and names neither flag nor remedy.
    `mpi_library` is all that `MPI.Get_library_version()` says.

    Raises:
        EnvironmentSetupError: the library does not speak srun's PMIx, and which flag fits.
    """
    if info.launcher is not Launcher.SRUN or not info.detail.startswith("pmix"):
        return
    if family_of(mpi_library) is MpiFamily.MPICH and choose_mpi(mpi_library, ()) != "pmix":
        raise EnvironmentSetupError(
            f"srun started {info.world_size} ranks, but they cannot meet: "
            f"{_advice(info, mpi_library)}"
        )


def check_world_size(info: LaunchInfo, mpi_world_size: int, mpi_library: str = "") -> None:
    """Check that MPI connected as many ranks as were started.

    `mpi_library` is all that `MPI.Get_library_version()` says; it makes the advice exact.

    Raises:
        EnvironmentSetupError: ranks that do not see each other, and what to do about it.
    """
    if info.launcher is Launcher.TORCHRUN and mpi_world_size == 1 and info.world_size != 1:
        raise EnvironmentSetupError(
            f"RANK={info.rank} and WORLD_SIZE={info.world_size} look like torchrun, but the ranks "
            "meet through MPI: start with mpirun or srun instead (or unset RANK and WORLD_SIZE)"
        )
    if not info.mpi_expected or info.world_size is None or mpi_world_size >= info.world_size:
        return
    seen = "each is alone in MPI" if mpi_world_size == 1 else f"MPI sees {mpi_world_size}"
    raise EnvironmentSetupError(
        f"{info.launcher.value} started {info.world_size} ranks, but {seen}: "
        f"{_advice(info, mpi_library)}"
    )


def _advice(info: LaunchInfo, mpi_library: str) -> str:
    named = f" ({short_name(mpi_library)})" if mpi_library else ""
    if info.launcher is Launcher.SRUN:
        used = f"--mpi={info.detail or 'none'}"
        fits = "srun --mpi=pmi2 for MPICH, or srun --mpi=pmix for Open MPI"
        if mpi_library:
            fits = f"srun --mpi={choose_mpi(mpi_library, ())}"
        return f"{used} does not fit the MPI library{named}; use {fits}"
    other = "MPICH's mpiexec" if info.launcher is Launcher.OPENMPI else "Open MPI's mpirun"
    return (
        f"two MPIs are mixed: this mpiexec and the MPI library of Python{named} are not of one "
        f"kind; use the mpiexec beside the library (perhaps {other}), and install only one MPI in "
        "the environment"
    )
