from __future__ import annotations

import pytest

from mpipipe.errors import EnvironmentSetupError
from mpipipe.topology.launcher import (
    Launcher,
    LaunchInfo,
    check_pmi,
    check_world_size,
    detect,
    local_ranks,
)

# As recorded under Slurm 22.05 with two nodes, MPICH 5.0 and Open MPI 5.0.
SRUN = {
    "SLURM_JOB_ID": "1", "SLURM_LOCALID": "1", "SLURM_NNODES": "2", "SLURM_NODEID": "1",
    "SLURM_NPROCS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
SRUN_PMI2 = SRUN | {
    "PMI_FD": "13", "PMI_JOBID": "1.0", "PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_MPI_TYPE": "pmi2",
}  # fmt: skip
SRUN_PMIX = SRUN | {
    "PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.2.0", "SLURM_MPI_TYPE": "pmix",
}  # fmt: skip
BATCH = {
    "SLURM_JOB_ID": "4", "SLURM_LOCALID": "0", "SLURM_NNODES": "2", "SLURM_NODEID": "0",
    "SLURM_NPROCS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
SALLOC = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"}
HYDRA = {
    "HYDI_CONTROL_FD": "7", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1", "PMI_FD": "9",
    "PMI_RANK": "1", "PMI_SIZE": "2",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "PMIX_RANK": "1",
}  # fmt: skip
# What a rank of mpiexec sees in a batch job: the step is hydra's own proxies, one per node.
PROXY_STEP = SRUN | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}

MPICH_VERSION = "MPICH Version:      5.0.2\nMPICH Release date: x"
MPICH_WITH_PMIX = f"{MPICH_VERSION}\nMPICH configure: --prefix=/usr --with-pmix=/usr"
CRAY_VERSION = "MPI VERSION    : CRAY MPICH version 8.1.25.17 (ANL base 3.4a2)\nMPI BUILD INFO: x"
OPENMPI_VERSION = "Open MPI v5.0.11, package: Open MPI root@x, ident: 5.0.11"


@pytest.mark.parametrize("environ", [SRUN, SRUN_PMI2, SRUN_PMIX])
def test_srun_in_all_its_mpi_modes(environ: dict[str, str]) -> None:
    info = detect(environ)
    assert info.launcher is Launcher.SRUN
    assert (info.rank, info.world_size, info.local_rank) == (3, 4, 1)
    assert info.mpi_expected
    assert info.detail == environ.get("SLURM_MPI_TYPE", "")


def test_the_steps_own_task_count_wins_over_the_jobs() -> None:
    assert detect(SRUN | {"SLURM_NTASKS": "8"}).world_size == 4


@pytest.mark.parametrize("environ", [BATCH, SALLOC, BATCH | {"SLURM_STEP_ID": "4294967291"},
                                     SALLOC | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},
                                     {}])  # fmt: skip
def test_batch_script_and_allocation_shell_are_one_process(environ: dict[str, str]) -> None:
    info = detect(environ)
    assert info == LaunchInfo(launcher=Launcher.NONE)
    check_world_size(info, 1)


def test_mpich_mpiexec() -> None:
    info = detect(HYDRA)
    assert info == LaunchInfo(Launcher.HYDRA, 1, 2, 1, mpi_expected=True)


def test_open_mpi_mpirun() -> None:
    info = detect(OPENMPI)
    assert info == LaunchInfo(Launcher.OPENMPI, 1, 2, 0, mpi_expected=True)


def test_mpirun_inside_a_batch_job_wins_over_the_variables_of_its_daemons_step() -> None:
    assert detect(PROXY_STEP | HYDRA | {"PMI_SIZE": "4"}).world_size == 4
    assert detect(PROXY_STEP | HYDRA).launcher is Launcher.HYDRA
    assert detect(PROXY_STEP | OPENMPI).launcher is Launcher.OPENMPI
    assert detect(BATCH | HYDRA).launcher is Launcher.HYDRA


def test_torchrun_is_no_mpi_launch() -> None:
    info = detect(TORCHRUN)
    assert info.launcher is Launcher.TORCHRUN
    assert (info.rank, info.world_size) == (1, 2)
    assert not info.mpi_expected


def test_srun_with_torchrun_like_variables_is_srun() -> None:
    assert detect(SRUN_PMIX | TORCHRUN).launcher is Launcher.SRUN


def test_bare_pmix_launcher() -> None:
    info = detect({"PMIX_RANK": "2"})
    assert (info.launcher, info.rank, info.world_size) == (Launcher.PMIX, 2, None)


def test_nonsense_in_the_environment_is_unknown_not_a_crash() -> None:
    info = detect(HYDRA | {"PMI_RANK": "x", "PMI_SIZE": ""})
    assert (info.rank, info.world_size) == (None, None)
    check_world_size(info, 1)


@pytest.mark.parametrize("environ", [SRUN_PMI2, SRUN_PMIX, HYDRA, OPENMPI, TORCHRUN])
def test_a_world_of_the_right_size_is_fine(environ: dict[str, str]) -> None:
    info = detect(environ)
    assert info.world_size is not None
    check_world_size(info, info.world_size, MPICH_VERSION)


def failure(environ: dict[str, str], size: int, library: str = "") -> str:
    with pytest.raises(EnvironmentSetupError) as caught:
        check_world_size(detect(environ), size, library)
    return str(caught.value)


@pytest.mark.parametrize(
    ("environ", "library", "parts"),
    [
        (SRUN_PMIX, MPICH_VERSION, ["started 4 ranks", "alone", "--mpi=pmix does not fit",
                                    "MPICH Version: 5.0.2", "use srun --mpi=pmi2"]),
        (SRUN_PMI2, OPENMPI_VERSION, ["--mpi=pmi2 does not fit", "Open MPI v5.0.11)",
                                      "use srun --mpi=pmix"]),
        (SRUN, MPICH_VERSION, ["--mpi=none does not fit", "use srun --mpi=pmi2"]),
        (SRUN_PMI2, MPICH_WITH_PMIX, ["MPICH Version: 5.0.2)", "use srun --mpi=pmix"]),
        (SRUN, CRAY_VERSION, ["CRAY MPICH version 8.1.25.17", "use srun --mpi=cray_shasta"]),
        (SRUN, "", ["pmi2 for MPICH", "pmix for Open MPI"]),
    ],
)  # fmt: skip
def test_singletons_under_srun_name_the_right_flag(
    environ: dict[str, str], library: str, parts: list[str]
) -> None:
    message = failure(environ, 1, library)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("environ", "library", "part"),
    [(HYDRA, OPENMPI_VERSION, "Open MPI's mpirun"), (OPENMPI, MPICH_VERSION, "MPICH's mpiexec")],
)
def test_singletons_under_mpirun_mean_two_mpis(
    environ: dict[str, str], library: str, part: str
) -> None:
    message = failure(environ, 1, library)
    assert "two MPIs are mixed" in message
    assert part in message


def test_a_world_that_is_partly_connected_says_both_numbers() -> None:
    assert "started 4 ranks, but MPI sees 2" in failure(SRUN_PMI2, 2)


def test_torchrun_is_explained() -> None:
    message = failure(TORCHRUN, 1)
    assert "torchrun" in message
    assert "mpirun or srun" in message


def test_a_larger_world_than_one_step_is_a_heterogeneous_job() -> None:
    check_world_size(detect(SRUN_PMI2), 6)


PALS = {"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "2"}
JSRUN = {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "1"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1"}
FLUX = {"PMI_RANK": "3", "PMI_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1", "FLUX_TASK_RANK": "3"}


@pytest.mark.parametrize(
    ("environ", "launcher", "world_size"),
    [
        (PALS, Launcher.PALS, None),
        (JSRUN, Launcher.JSRUN, 4),
        (MVAPICH, Launcher.MVAPICH, 4),
        (FLUX, Launcher.FLUX, 4),
    ],
)
def test_launchers_with_variables_of_their_own(
    environ: dict[str, str], launcher: Launcher, world_size: int | None
) -> None:
    info = detect(environ | TORCHRUN)
    assert (info.launcher, info.rank, info.local_rank) == (launcher, 3, 1)
    assert info.world_size == world_size
    assert info.mpi_expected


def test_mpiexec_inside_of_another_launchers_job_wins() -> None:
    """An interactive shell of flux or PALS keeps their variables."""
    for outer in (PALS, FLUX, JSRUN):
        info = detect(outer | HYDRA)
        assert (info.launcher, info.local_rank) == (Launcher.HYDRA, 1)
        assert detect(outer | OPENMPI).launcher is Launcher.OPENMPI


def test_variables_of_a_launcher_that_a_shell_has_kept_in_part_start_no_mpi() -> None:
    assert detect({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "4"}).launcher is Launcher.NONE
    assert detect({"PALS_RANKID": "0"}).launcher is Launcher.NONE


@pytest.mark.parametrize(
    ("seats", "numbers"),
    [
        ([("a", 1), ("a", 0), ("b", 0)], [1, 0, 0]),  # as told
        ([("a", None), ("b", None), ("a", None), ("b", None)], [0, 0, 1, 1]),
        ([("a", 0), ("a", 0), ("b", 0)], [0, 1, 0]),  # an exported LOCAL_RANK
        ([("a", 1), ("a", None)], [0, 1]),
        ([("a", None)], [0]),
    ],
)
def test_local_ranks_are_told_or_counted(
    seats: list[tuple[str, int | None]], numbers: list[int]
) -> None:
    assert local_ranks(seats) == numbers


def test_mpich_under_pmix_is_refused_before_mpi_would_abort() -> None:
    info = LaunchInfo(Launcher.SRUN, rank=0, world_size=2, mpi_expected=True, detail="pmix")
    with pytest.raises(EnvironmentSetupError, match="srun --mpi=pmi2"):
        check_pmi(info, "MPICH Version:      5.0.2\nMPICH configure: --with-device=ch4:ucx")
    check_pmi(info, "MPICH Version: 5.0.2\nMPICH configure: --with-pmix=/usr")
    check_pmi(info, "Open MPI v5.0.11, package: x")
