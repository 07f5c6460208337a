"""Which binary interface (ABI) MPI is called through: a library of another kind cannot be used.

Pure: names of files and what libraries call themselves. mpi4py's wheels hold one module for each
ABI and take the one of the library that loads; one that was built from source fits the library it
was built with. Not here: which `--mpi=` of srun a library needs (`srun_mpi`).
"""

from __future__ import annotations

import enum
import re

from mpipipe.topology.srun_mpi import MpiFamily, family_of

__all__ = ["MpiAbi", "abi_of_file", "abi_of_library", "abi_of_module", "missing_abi"]

_FILE = re.compile(r"libmpi(?:ch|_\w+)?\.so\.(\d+)")


class MpiAbi(str, enum.Enum):
    """What programs are built for."""

    MPICH = "MPICH"  # Intel MPI, Cray MPICH and MVAPICH too
    OPEN_MPI = "Open MPI"
    STANDARD = "MPI 5"  # of the standard itself: libmpi_abi


# The second part of the name of mpi4py's module.
_OF_MODULE = {"mpich": MpiAbi.MPICH, "openmpi": MpiAbi.OPEN_MPI, "mpiabi": MpiAbi.STANDARD}
_OF_NUMBER = {"12": MpiAbi.MPICH, "20": MpiAbi.OPEN_MPI, "40": MpiAbi.OPEN_MPI}
_OF_FAMILY = {
    MpiFamily.MPICH: MpiAbi.MPICH,
    MpiFamily.CRAY: MpiAbi.MPICH,
    MpiFamily.INTEL: MpiAbi.MPICH,
    MpiFamily.OPEN_MPI: MpiAbi.OPEN_MPI,
}


def abi_of_module(path: str) -> MpiAbi | None:
    """That of mpi4py's module, e.g. `MPI.mpich.cpython-312-x86_64-linux-gnu.so`; None: unsaid."""
    return _OF_MODULE.get(path.rpartition("/")[2].removeprefix("MPI.").partition(".")[0])


def abi_of_file(path: str) -> MpiAbi | None:
    """That of a library by its file, e.g. `libmpi.so.40.30.6`; None: not known."""
    name = path.rpartition("/")[2]
    if name.startswith("libmpi_abi."):
        return MpiAbi.STANDARD
    found = _FILE.match(name)
    return _OF_NUMBER.get(found[1]) if found else None


def abi_of_library(library: str) -> MpiAbi | None:
    """That of the library that calls itself `library` (MPI_Get_library_version)."""
    return _OF_FAMILY.get(family_of(library))


def missing_abi(problem: str) -> MpiAbi | None:
    """What the loader has missed where it says so, e.g. `libmpi.so.40: cannot open …`."""
    if "undefined symbol: ompi_" in problem:
        return MpiAbi.OPEN_MPI
    found = re.search(r"(libmpi\S*): cannot open", problem)
    return abi_of_file(found[1]) if found else None
