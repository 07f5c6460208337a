"""Checks the GPUs of the ranks: driver, torch on it, memory, who shares what. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mpipipe.doctor.facts import RankFacts, RankGpu
from mpipipe.doctor.finding import Finding, fatal, ok, split_advice, warning
from mpipipe.planning.devices import BF16_CAPABILITY
from mpipipe.planning.memory import gib
from mpipipe.topology.nvml import GpuProcess

__all__ = ["check_gpu", "check_gpus_of_host", "wants_gpu"]

_ON_CPU = 'set pipeline.device = "cpu" to run on CPUs on purpose'
# The driver keeps some of a GPU for itself, and so does a desktop.
_OWN_USE = 2**30


def wants_gpu(facts: RankGpu) -> bool:
    """Whether a rank without a GPU would be a surprise."""
    if facts.wanted == "cpu":
        return False
    if facts.wanted == "auto" and facts.declined_by:
        return facts.rank_gpu.index >= 0  # torch has found one all the same, and a run uses it
    found = facts.kernel_driver or facts.device_files or facts.libcuda or facts.given_by_slurm
    return facts.wanted == "cuda" or bool(found)


def check_gpu(rank: RankFacts) -> list[Finding]:
    """Findings of the GPU of one rank."""
    facts = rank.gpu
    if facts.wanted == "cpu":
        return [ok("gpu.driver", 'not looked at: pipeline.device = "cpu"')]
    if not wants_gpu(facts):
        return [_without(rank)]
    if not facts.libcuda:
        return [_no_driver(rank)]
    findings = [*_driver_library(facts)]
    if facts.rank_gpu.problem:
        return [*findings, _unusable(rank)]
    if rank.software.torch_problem or facts.rank_gpu.index < 0:
        return findings
    return [*(findings or [_driver(facts)]), _numbers(rank), *_memory(rank)]


def _without(rank: RankFacts) -> Finding:
    """A rank that needs no GPU as it was started; a warning where the host has one."""
    facts = rank.gpu
    seen = facts.kernel_driver or facts.device_files or facts.libcuda
    if not (facts.declined_by and seen):
        return ok("gpu.driver", "the stages run on CPUs: there is no NVIDIA GPU on this host")
    if facts.declined_by != "Slurm":
        return ok("gpu.driver", f"the stages run on CPUs: {facts.declined_by} hides the GPUs")
    cause = "the job or the step has no --gpus-per-node or --gres=gpu"
    if rank.node.container == "apptainer" and not facts.libcuda:
        cause += "; or Slurm counts no GPUs here, and the container was started without --nv"
    return warning(
        "gpu.driver",
        "the stages run on CPUs: no GPU was asked for, though the host has an NVIDIA driver",
        cause,
        f"ask for as many GPUs per node as ranks (sbatch --gpus-per-node=N), or {_ON_CPU}",
    )


def _no_driver(rank: RankFacts) -> Finding:
    facts, container = rank.gpu, rank.node.container
    loaded = "an NVIDIA GPU"
    if facts.kernel_driver:
        loaded = f"the NVIDIA driver {facts.kernel_driver}"
    if not (facts.kernel_driver or facts.device_files):
        what = 'pipeline.device = "cuda", but this host shows no NVIDIA driver'
        if facts.given_by_slurm:
            what = f"Slurm gave this step GPU {facts.given_by_slurm}, but no NVIDIA driver shows"
        cause = "the step runs on a node without GPUs, or the container hides them"
        remedy = "ask for a GPU node (sbatch --partition=… --gpus-per-node=N),"
    elif not container:
        what = f"the host has {loaded}, but libcuda.so.1 cannot be loaded"
        cause = "the driver is installed in part, or its folder is not in the loader's cache"
        remedy = f"run ldconfig -p | grep libcuda on {rank.host}, and install the driver again;"
    else:
        what = f"the host has {loaded}, but libcuda.so.1 is not in this container"
        cause = "the container was started without access to the GPUs"
        if container == "apptainer":
            cause = (
                "the container was started without --nv, so the host's driver library is not bound"
            )
        remedy = "start it with --nv: apptainer exec --nv … (MPIPIPE_NV=on in launch/site.env);"
        if container == "docker":
            remedy = "start it with --gpus all: docker run --gpus all …;"
    return fatal("gpu.driver", what, cause, f"{remedy} or {_ON_CPU}")


def _driver(facts: RankGpu) -> Finding:
    version = facts.kernel_driver or _library_version(facts)
    return ok("gpu.driver", f"NVIDIA driver {version}, {facts.libcuda}")


def _library_version(facts: RankGpu) -> str:
    found = re.search(r"libcuda\.so\.(\d+\.\d+(?:\.\d+)?)$", facts.libcuda)
    return found[1] if found else ""


def _driver_library(facts: RankGpu) -> list[Finding]:
    """A libcuda that is not the running driver's."""
    leak = (
        "LD_LIBRARY_PATH, or a libcuda that was installed into the image, comes before the host's"
    )
    remedy = (
        f"unset LD_LIBRARY_PATH or take {Path(facts.libcuda).parent} out of it; in a container use "
        "--nv and remove libcuda from the image"
    )
    if "/stubs/" in facts.libcuda:
        what = f"{facts.libcuda} is a stub to link against, no driver"
        return [fatal("gpu.library", what, leak, remedy)]
    version = _library_version(facts)
    if not version or facts.kernel_driver in {"", "unknown", version}:
        return []
    what = f"libcuda is of driver {version} ({facts.libcuda}), the running one is " + (
        facts.kernel_driver
    )
    level = fatal if facts.rank_gpu.problem else warning  # CUDA's forward compatibility works so
    return [level("gpu.library", what, leak, remedy)]


def _unusable(rank: RankFacts) -> Finding:
    """Torch's reason, and what may be done about it."""
    facts = rank.gpu
    what, remedy = split_advice(facts.rank_gpu.problem)
    if "out of memory" in what:
        named = _named(facts.processes)
        cause = f"other processes fill the GPU{named and f': {named}'}"
        remedy = "end them, or ask Slurm for GPUs of your own (--gpus-per-node=N, --exclusive)"
    elif not rank.software.torch_cuda:
        cause = "a torch for CPUs was installed, or one in the user's site folder wins"
    elif facts.visible in {"", "-1", "NoDevFiles"}:
        cause = "CUDA_VISIBLE_DEVICES hides every GPU"
    else:
        cause = "driver, torch and GPU do not fit each other, or the GPU was not given to this rank"
    return fatal("gpu.torch", what, cause, f"{remedy}; or {_ON_CPU}")


def _numbers(rank: RankFacts) -> Finding:
    gpu = rank.gpu.rank_gpu
    bf16 = gpu.capability >= BF16_CAPABILITY
    types = "bfloat16 and float16" if bf16 else "float16 only: bfloat16 is emulated there"
    nccl = f"NCCL {gpu.nccl_version}" if gpu.nccl_version else "no NCCL"
    return ok(
        "gpu.torch",
        f"{gpu.name}, compute capability {gpu.capability // 10}.{gpu.capability % 10} ({types}), "
        f"torch for CUDA {rank.software.torch_cuda}, {nccl}",
        capability=gpu.capability,
    )


def _memory(rank: RankFacts) -> list[Finding]:
    """What others hold of this rank's GPU."""
    facts, gpu = rank.gpu, rank.gpu.rank_gpu
    free = facts.free_before_bytes
    free = gpu.free_bytes if free is None else free
    what = f"{gib(free)} of {gib(gpu.memory_bytes)} free"
    values = {"free_bytes": free, "memory_bytes": gpu.memory_bytes}
    others = [process for process in facts.processes if process.gpu_uuid == gpu.uuid != ""]
    if gpu.memory_bytes - free <= max(_OWN_USE, gpu.memory_bytes // 20) and not others:
        return [ok("gpu.memory", what, **values)]
    named = _named(others)
    cause = f"used by others: {named}" if named else "another process uses this GPU"
    remedy = "end it, or ask Slurm for GPUs of your own (--gpus-per-node=N, --exclusive)"
    return [warning("gpu.memory", what, cause, remedy, **values)]


def _named(processes: Sequence[GpuProcess]) -> str:
    return ", ".join(f"{process.name} (pid {process.pid})" for process in processes[:3])


def check_gpus_of_host(ranks: Sequence[RankFacts], *, share: bool = False) -> list[Finding]:
    """Which rank of one host has which GPU; `share`: pipeline.share_gpus."""
    using = [rank for rank in ranks if rank.gpu.rank_gpu.index >= 0]
    if not using:
        return []
    by_gpu: dict[str, list[RankFacts]] = {}
    for rank in using:
        gpu = rank.gpu.rank_gpu  # told apart as the plan does
        by_gpu.setdefault(gpu.uuid or f"index {gpu.index}", []).append(rank)
    shared = [inside for inside in by_gpu.values() if len(inside) > 1]
    if shared and not share:
        numbers = ", ".join(str(rank.rank) for rank in shared[0])
        visible = shared[0][0].gpu.visible
        seen = "all GPUs" if visible is None else f"CUDA_VISIBLE_DEVICES={visible}"
        return [
            fatal(
                "gpu.ranks",
                f"ranks {numbers} of {using[0].host} would share one GPU of {len(by_gpu)}",
                f"more ranks than GPUs on the host, or all ranks see the same one ({seen})",
                "start one rank per GPU (srun --ntasks-per-node=N --gpus-per-node=N; mpirun -n N), "
                "or set pipeline.share_gpus = true, which is slow and made for tests",
            )
        ]
    pairs = ", ".join(f"rank {rank.rank}: GPU {rank.gpu.rank_gpu.index}" for rank in using)
    idle = max(len(rank.gpu.host_gpus) for rank in using) - len(by_gpu)
    rest = f"; {idle} more on the host are not used" if idle > 0 else ""
    return [ok("gpu.ranks", pairs + rest)]
