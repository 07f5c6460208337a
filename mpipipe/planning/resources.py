"""What one rank has: where it runs and what it may use there. Planning reads nothing else of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from mpipipe.topology.disk import disk_bytes_per_s
from mpipipe.topology.gpu import GpuFacts
from mpipipe.topology.host import Core, allowed_cpus, cpus_near, read_host, usable_physical_cores
from mpipipe.topology.node import cpu_model

__all__ = ["RankResources", "absolute_offload_dir", "read_rank_resources"]


@dataclass(frozen=True, slots=True)
class RankResources:
    """One rank: where it runs and what it may use. It travels in the rank's `Hello`."""

    rank: int  # position in the world
    host: str  # ranks with equal names share cores and memory
    pid: int
    launcher: str  # topology.launcher.Launcher, e.g. "srun", "none"
    num_cores: int  # usable by this process (affinity, quota), not of the machine
    memory_available_bytes: int  # for this process: cgroup and MemAvailable considered
    gpu: GpuFacts = field(default_factory=GpuFacts)  # that this rank would use
    gpu_cpus: tuple[int, ...] = ()  # near the GPU (topology.host); empty: unknown
    cores: tuple[Core, ...] = ()  # physical cores of the affinity mask; empty: unknown
    num_allowed_cpus: int = 0  # that the job may use on this host; more than the mask's: bound
    attention_backends: tuple[str, ...] = ()  # optional ones that import on this rank
    # That the disk of `memory.offload_dir` reads, for all ranks of the host together; 0: not known.
    disk_bytes_per_s: int = 0
    processor: str = ""  # the CPU's model name; empty: not told

    @property
    def has_gpu(self) -> bool:
        """Whether this rank can compute on a GPU."""
        return self.gpu.index >= 0 and not self.gpu.problem


def read_rank_resources(
    rank: int,
    *,
    launcher: str,
    gpu: GpuFacts,
    attention_backends: tuple[str, ...],
    offload_dir: str = "",
) -> RankResources:
    """What `rank` has on this host, as this process is bound now.

    `mpipipe plan` reads it with the same function as a run. Needs neither torch nor MPI.

    Args:
        rank: its number.
        launcher: what started it (`topology.launcher.Launcher`).
        gpu: that it would use.
        attention_backends: optional ones that it has.
        offload_dir: `memory.offload_dir`, as configured; where the folder exists its disk is
            measured (`topology.disk`).
    """
    host = read_host()
    return RankResources(
        rank=rank,
        host=host.host,
        pid=os.getpid(),
        launcher=launcher,
        num_cores=host.usable_cores,
        memory_available_bytes=host.memory_available_bytes,
        gpu=gpu,
        gpu_cpus=cpus_near(gpu.pci),
        cores=usable_physical_cores(),
        num_allowed_cpus=len(allowed_cpus()),
        attention_backends=attention_backends,
        disk_bytes_per_s=disk_bytes_per_s(offload_dir and absolute_offload_dir(offload_dir)),
        processor=cpu_model(),
    )


def absolute_offload_dir(offload_dir: str) -> str:
    """The path that `memory.offload_dir` names: every rank uses the same, wherever it started."""
    return str(Path(offload_dir).expanduser().absolute())
