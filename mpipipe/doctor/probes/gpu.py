"""Reads what can be seen of NVIDIA GPUs, in the order in which they fail: module, library, torch.

A container without `--nv` sees the kernel's module and the device files, but no libcuda. Nothing
raises for a GPU that cannot be used: the facts say how far one gets. `probe_with_torch` makes a
CUDA context on the rank's own GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from mpipipe.doctor.facts import RankGpu
from mpipipe.doctor.probes.process import loaded_libraries
from mpipipe.topology.gpu import GpuFacts, container_kind
from mpipipe.topology.host import read_text
from mpipipe.topology.launcher import Launcher, detect
from mpipipe.topology.nvml import GpuProcess, query_host

__all__ = ["kernel_driver", "probe_before_torch", "probe_with_torch"]

_ROOT = Path("/")
_SLURM_GPUS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")  # indices; that of the step first
_SLURM_COUNT = "SLURM_GPUS_ON_NODE"
_NO_DEVICES = "NoDevFiles"  # what some versions make of CUDA_VISIBLE_DEVICES then

_GpusBefore = tuple[GpuFacts, ...]
"""The GPUs of the host as the driver lists them before this rank has touched one."""


def probe_before_torch(
    environ: Mapping[str, str],
    *,
    wanted: str,
    root: Path = _ROOT,
    query: Callable[[], tuple[_GpusBefore, tuple[GpuProcess, ...]]] = query_host,
) -> tuple[RankGpu, _GpusBefore]:
    """What shows without a CUDA context; nothing but `wanted` when CPUs were asked for."""
    if wanted == "cpu":
        return RankGpu(wanted=wanted), ()
    libcuda = _libcuda(root)
    gpus, processes = query() if libcuda else ((), ())
    given = _given_by_slurm(environ)
    facts = RankGpu(
        wanted=wanted,
        kernel_driver=kernel_driver(root),
        device_files=_device_files(root),
        libcuda=libcuda,
        visible=environ.get("CUDA_VISIBLE_DEVICES"),
        given_by_slurm=given,
        declined_by=_declined_by(environ, given, container=container_kind(environ, root)),
        host_gpus=tuple(gpu.uuid for gpu in gpus),
        processes=processes,
    )
    return facts, gpus


def _given_by_slurm(environ: Mapping[str, str]) -> str:
    """The GPUs of this step, or of the job; empty: none, or not in a job.

    A step inherits the variables of its job, even one that was given none of the job's GPUs
    (--gres=none): there the job's count only beside devices that Slurm has made visible.
    """
    in_step = detect(environ).launcher is Launcher.SRUN
    own_only = in_step and "CUDA_VISIBLE_DEVICES" not in environ
    for name in _SLURM_GPUS[:1] if own_only else _SLURM_GPUS:
        if environ.get(name):
            return environ[name]
    return "" if own_only or environ.get(_SLURM_COUNT) == "0" else environ.get(_SLURM_COUNT, "")


def _declined_by(environ: Mapping[str, str], given: str, *, container: str) -> str:
    """What says that this process is to have no GPU; empty: nothing does."""
    if container == "apptainer" and environ.get("MPIPIPE_NV") == "off":
        return "MPIPIPE_NV"
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible in {"", "-1"}:
        return "CUDA_VISIBLE_DEVICES"
    asked_for_none = visible == _NO_DEVICES or (visible is None and not given)
    return "Slurm" if environ.get("SLURM_JOB_ID") and asked_for_none else ""


def probe_with_torch(facts: RankGpu, gpus: _GpusBefore, local_rank: int) -> RankGpu:
    """`facts` with the GPU that torch would give this rank. Torch is imported already.

    Makes a CUDA context on that GPU; does nothing where no driver library loads.
    """
    if facts.wanted == "cpu" or not facts.libcuda:
        return facts
    from mpipipe.data_plane.device import read_gpu

    found = read_gpu(local_rank)
    free = [gpu.free_bytes for gpu in gpus if gpu.uuid == found.uuid != ""]
    return dataclasses.replace(
        facts,
        rank_gpu=found,
        free_before_bytes=free[0] if free else None,  # a MIG slice is not in the list
    )


def kernel_driver(root: Path = _ROOT) -> str:
    """The version of the loaded NVIDIA kernel module, which containers see too; or empty.

    E.g. `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar …`.
    """
    text = read_text(root / "proc/driver/nvidia/version")
    if not text:
        return ""
    found = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else "unknown"


def _device_files(root: Path) -> tuple[str, ...]:
    return tuple(sorted(f"/dev/{path.name}" for path in (root / "dev").glob("nvidia[0-9]*")))


def _libcuda(root: Path) -> str:
    """The file that the loader takes for the driver library; empty when there is none."""
    if root != _ROOT:
        found = sorted((root / "usr/lib").rglob("libcuda.so.[0-9]*"))
        return f"/{found[-1].relative_to(root)}" if found else ""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
    paths = [library.path for library in loaded_libraries() if library.name == "libcuda"]
    return str(Path(paths[0]).resolve()) if paths else ""
