"""Reads how this rank was started: launcher, MPI library, Slurm's limits. Neither torch nor MPI."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpipipe.doctor.facts import LaunchFacts, Library
from mpipipe.topology.launcher import detect
from mpipipe.topology.mpi_library import abi_of_file, abi_of_module
from mpipipe.topology.slurm import idle_nodes, read_job, wall_time_left_s

__all__ = ["MpiState", "loaded_libraries", "probe_launch"]

_ROOT = Path("/")
_WATCHED = re.compile(r"lib(cuda|cudart|nccl|cublas|cublasLt|cudnn|nvrtc)[-.]")
_MPI = re.compile(r"lib(mpi)(?:ch|_\w+)?\.so")  # libmpich of Debian, libmpi_cray, libmpi_abi


@dataclass(frozen=True, slots=True)
class MpiState:
    """This rank's place in MPI's world; one of one, without a library, where there is no MPI."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    library: str = ""
    module: str = ""  # file of mpi4py's
    thread_level: str = ""


def probe_launch(environ: Mapping[str, str], mpi: MpiState, root: Path = _ROOT) -> LaunchFacts:
    """The launch as this rank sees it, after it has joined the others.

    Only the head asks for the wall time: a thousand ranks would keep Slurm busy.
    """
    info = detect(environ)
    job = read_job(environ)
    left_s = wall_time_left_s(job, time.time()) if job is not None and mpi.rank == 0 else None
    files = [library.path for library in loaded_libraries(root) if library.name == "libmpi"]
    abi = abi_of_module(mpi.module)
    path = next((file for file in files if abi in {None, abi_of_file(file)}), "".join(files[:1]))
    abi = abi or abi_of_file(path)
    return LaunchFacts(
        launcher=info.launcher.value,
        world_size=mpi.world_size,
        local_rank=mpi.local_rank,
        srun_mpi=info.detail,
        mpi_library=mpi.library,
        mpi_abi=abi.value if abi is not None else "",
        mpi_path=path,
        thread_level=mpi.thread_level,
        slurm_job=job.label if job is not None else "",
        wall_left_s=left_s,
        idle_nodes=idle_nodes(environ, mpi.world_size) if job is not None else 0,
    )


def loaded_libraries(root: Path = _ROOT) -> tuple[Library, ...]:
    """The MPI and CUDA libraries that this process has mapped, each once, by name."""
    try:
        maps = (root / "proc/self/maps").read_text(errors="replace")
    except OSError:
        return ()
    found: dict[str, Library] = {}
    for line in maps.splitlines():
        words = line.split(maxsplit=5)
        if len(words) < 6 or not words[5].startswith("/"):
            continue
        path = Path(words[5])
        if match := _WATCHED.match(path.name) or _MPI.match(path.name):
            found.setdefault(str(path), Library(f"lib{match[1]}", str(path)))
    return tuple(sorted(found.values(), key=lambda library: (library.name, library.path)))
