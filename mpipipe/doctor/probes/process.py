"""Reads what this rank's process runs with: launcher and MPI, host and limits, Python and CUDA.

The traps of containers: a torch or CUDA wheel in the user's site folder that wins over the image's,
and folders on LD_LIBRARY_PATH that put other CUDA libraries before torch's own. Importing torch
happens here (`import_torch`), late, and its failure is a fact, not an error. Readers take the root
folder, the environment and PATH lookups, so that tests fake them.

Which way NCCL goes between two ranks is read from its own log: nothing else tells. It reads its
settings once per process, at its first communicator. A user's own NCCL_DEBUG is left alone, and
then nothing is known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import resource
import shutil
import site
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mpipipe._version import __version__
from mpipipe.doctor.facts import LaunchFacts, Library, NodeFacts, SoftwareFacts, Wheel
from mpipipe.doctor.probes.folders import free_space_bytes
from mpipipe.topology.gpu import container_kind
from mpipipe.topology.host import (
    memory_available_bytes,
    memory_limit_bytes,
    num_oom_kills,
    read_text,
    usable_cores,
)
from mpipipe.topology.launcher import detect
from mpipipe.topology.mpi_library import abi_of_file, abi_of_module
from mpipipe.topology.packages import package_versions
from mpipipe.topology.slurm import idle_nodes, read_job, wall_time_left_s

__all__ = [
    "cuda_libraries_in",
    "import_torch",
    "loaded_libraries",
    "nccl_routes",
    "nvidia_wheels",
    "probe_launch",
    "probe_node",
    "probe_software",
    "recorded_nccl",
]

_ROOT = Path("/")
_PROFILERS = ("nsys", "ncu", "perf", "py-spy")
_PACKAGES = ("torch", "transformers", "mpi4py", "triton", "flashinfer-python", "safetensors")
_CUDA = r"lib(cuda|cudart|nccl|cublas|cublasLt|cudnn|nvrtc)"
_CUDA_LIBRARY = re.compile(_CUDA + r"\.so(\.\d+)*")
_LOADED_CUDA = re.compile(_CUDA + r"[-.]")  # torch's own have a hash after the name
_LOADED_MPI = re.compile(r"lib(mpi)(?:ch|_\w+)?\.so")  # libmpich of Debian, libmpi_cray, libmpi_abi
_PIN = re.compile(r"(nvidia-[\w-]+)\s*\(?==\s*([\w.]+)")
_NCCL_SETTINGS = ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE")
# `Channel 00/0 : 0[0] -> 1[1] [send] via NET/Socket/0`; the numbers before brackets are ranks.
_NCCL_CHANNEL = re.compile(
    r"Channel \d+(?:/\d+)? : (\d+)\[[^\]]*\] -> (\d+)\[[^\]]*\](?: \[\w+\])? via (\S+)"
)


# ---- launch --------------------------------------------------------------------------------------


def probe_launch(
    environ: Mapping[str, str],
    joined: LaunchFacts,
    *,
    is_head: bool,
    mpi_module: str = "",
    root: Path = _ROOT,
) -> LaunchFacts:
    """The launch as this rank sees it, after it has joined the others.

    Args:
        environ: tells of launcher and Slurm.
        joined: what MPI has told.
        is_head: only the head asks for the wall time: a thousand ranks would keep Slurm busy.
        mpi_module: the file of mpi4py's module; empty without MPI.
        root: of the file system.
    """
    info = detect(environ)
    job = read_job(environ)
    files = [library.path for library in loaded_libraries(root) if library.name == "libmpi"]
    abi = abi_of_module(mpi_module)
    path = next((file for file in files if abi in {None, abi_of_file(file)}), "".join(files[:1]))
    abi = abi or abi_of_file(path)
    return dataclasses.replace(
        joined,
        launcher=info.launcher.value,
        srun_mpi=info.detail,
        mpi_abi=abi.value if abi is not None else "",
        mpi_path=path,
        slurm_job=job.label if job is not None else "",
        wall_left_s=wall_time_left_s(job, time.time()) if job is not None and is_head else None,
        idle_nodes=idle_nodes(environ, joined.world_size) if job is not None else 0,
    )


def loaded_libraries(root: Path = _ROOT) -> tuple[Library, ...]:
    """The MPI and CUDA libraries that this process has mapped, each once, by name."""
    found: dict[str, Library] = {}
    for line in read_text(root / "proc/self/maps").splitlines():
        words = line.split(maxsplit=5)
        if len(words) < 6 or not words[5].startswith("/"):
            continue
        path = Path(words[5])
        if match := _LOADED_CUDA.match(path.name) or _LOADED_MPI.match(path.name):
            found.setdefault(str(path), Library(f"lib{match[1]}", str(path)))
    return tuple(sorted(found.values(), key=lambda library: (library.name, library.path)))


# ---- host ----------------------------------------------------------------------------------------


def probe_node(
    environ: Mapping[str, str],
    root: Path = _ROOT,
    which: Callable[[str], str | None] = shutil.which,
) -> NodeFacts:
    """The host of this process now."""
    return NodeFacts(
        num_cores=usable_cores(root),
        memory_available=memory_available_bytes(root),
        memory_limit=memory_limit_bytes(root),
        oom_kills=num_oom_kills(root),
        shm_free=_free_bytes(root / "dev/shm"),
        memlock=_soft_limit(resource.RLIMIT_MEMLOCK),
        max_open_files=_soft_limit(resource.RLIMIT_NOFILE),
        container=container_kind(environ, root),
        infiniband=any((root / "sys/class/infiniband").glob("*")),
        default_route=_has_default_route(root),
        profilers=tuple(name for name in _PROFILERS if which(name)),
        sacct=which("sacct") is not None,
    )


def _free_bytes(folder: Path) -> int | None:
    """Of a file system that we may write to; -1: it has no limit, as a tmpfs of size 0."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    free = free_space_bytes(found)
    return -1 if free is None else free


def _soft_limit(which: int) -> int:
    limit = resource.getrlimit(which)[0]
    return -1 if limit == resource.RLIM_INFINITY else limit


def _has_default_route(root: Path) -> bool:
    """Whether packets can leave the cluster's network at all; True where the kernel does not say.

    /proc/net/route: the second column is the destination in hex, the eighth its mask. In
    /proc/net/ipv6_route it is the first and the second, and "lo" stands for "unreachable".
    """
    v4 = read_text(root / "proc/net/route").splitlines()
    v6 = read_text(root / "proc/net/ipv6_route").splitlines()
    if not v4 and not v6:
        return True
    words4 = [line.split() for line in v4[1:]]
    words6 = [line.split() for line in v6]
    return any(w[1] == "00000000" and w[7] == "00000000" for w in words4 if len(w) > 7) or any(
        w[0] == "0" * 32 and w[1] == "00" and w[-1] != "lo" for w in words6 if w
    )


# ---- Python and CUDA -----------------------------------------------------------------------------


def import_torch() -> SoftwareFacts:
    """Import torch, which takes seconds; where it comes from, or why it cannot be imported."""
    start_s = time.perf_counter()
    try:
        import torch
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # OSError: ctypes could not load a library; AttributeError: half an installation.
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        return SoftwareFacts(torch_problem=line)
    return SoftwareFacts(
        torch_path=str(Path(torch.__file__).parent),
        torch_cuda=torch.version.cuda or "",
        torch_import_s=round(time.perf_counter() - start_s, 2),
    )


def probe_software(environ: Mapping[str, str], imported: SoftwareFacts) -> SoftwareFacts:
    """The packages of this Python, after torch was `imported`, or failed to be."""
    copies = _copies("torch", sys.path)
    folders = [folder for folder in environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    wheels = nvidia_wheels(importlib.metadata.distributions())
    return dataclasses.replace(
        imported,
        versions={
            "python": sys.version.split()[0],
            "mpipipe": __version__,
            **{name: version or "" for name, version in package_versions(_PACKAGES).items()},
        },
        user_site=site.getusersitepackages() if site.ENABLE_USER_SITE else "",
        torch_path=imported.torch_path or (copies[0] if copies else ""),
        torch_copies=copies,
        nvidia_wheels=wheels,
        bundled=_bundled(copies[:1], wheels),
        loaded=loaded_libraries(),
        search_path=tuple(folders),
        on_search_path=cuda_libraries_in(folders),
        hub_offline=environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"},
    )


def _copies(package: str, search: Sequence[str]) -> tuple[str, ...]:
    """Every folder on `search` that holds the package, in the order in which Python looks."""
    found = [Path(entry or ".") / package for entry in search]
    return tuple(dict.fromkeys(str(path) for path in found if (path / "__init__.py").exists()))


def nvidia_wheels(found: Iterable[importlib.metadata.Distribution]) -> tuple[Wheel, ...]:
    """The `nvidia-…` packages, as often as they are installed, with the version torch pins."""
    wheels: dict[tuple[str, str], str] = {}  # name and folder → version
    pins: dict[str, str] = {}
    for distribution in found:
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name == "torch" and not pins:  # the first on the path is the one that counts
            pinned = map(_PIN.match, distribution.requires or ())
            pins = {match[1]: match[2] for match in pinned if match}
        if name.startswith("nvidia-"):
            wheels.setdefault((name, str(distribution.locate_file(""))), distribution.version)
    return tuple(
        Wheel(name, version, folder, pins.get(name, ""))
        for (name, folder), version in sorted(wheels.items())
    )


def _bundled(torch_folders: Sequence[str], wheels: Sequence[Wheel]) -> tuple[str, ...]:
    """Names of the CUDA libraries that torch brings along, in its own folder or in wheels."""
    folders = [Path(folder) / "lib" for folder in torch_folders]
    for root in {wheel.folder for wheel in wheels}:
        folders.extend(Path(root).glob("nvidia/*/lib"))
    names = {library.name for library in cuda_libraries_in(list(map(str, folders)))}
    return tuple(sorted(names))


def cuda_libraries_in(folders: Sequence[str]) -> tuple[Library, ...]:
    """The CUDA libraries in these folders, one path for each name and folder."""
    found: dict[tuple[str, str], Library] = {}
    for folder in folders:
        try:
            paths = sorted(Path(folder).iterdir())
        except OSError:
            continue
        for path in paths:
            if match := _CUDA_LIBRARY.fullmatch(path.name):
                name = f"lib{match[1]}"
                found.setdefault((name, folder), Library(name, str(path)))
    return tuple(found.values())


# ---- NCCL ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded_nccl() -> Iterator[Path]:
    """The file that NCCL logs to meanwhile; it may stay empty. Removed at the end."""
    with tempfile.TemporaryDirectory(prefix="mpipipe-doctor-") as folder:
        path = Path(folder) / "nccl.log"
        if any(name in os.environ for name in _NCCL_SETTINGS):
            yield path
            return
        values = ("INFO", "INIT,P2P,SHM,NET", str(path))
        os.environ.update(zip(_NCCL_SETTINGS, values, strict=True))
        try:
            yield path
        finally:
            for name in _NCCL_SETTINGS:
                os.environ.pop(name, None)


def nccl_routes(path: Path) -> dict[tuple[int, int], str]:
    """(source, target) → e.g. "P2P/CUMEM", "SHM/direct/direct", "NET/Socket/0", "NET/IB/0"."""
    found = _NCCL_CHANNEL.finditer(read_text(path))
    return {(int(match[1]), int(match[2])): match[3] for match in found}
