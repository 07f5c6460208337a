"""What a rank tells the planner of itself, with one default: a host without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Rank:
    rank: int
    world_size: int
    host: str = "node1"
    num_cores: int = 8
    memory_available_bytes: int = 16 * GIB
    gpu_index: int = -1
    gpu_name: str = ""
    gpu_uuid: str = ""
    gpu_capability: int = 0
    gpu_free_bytes: int = 0
    nccl_version: str = ""
    attention_backends: tuple[str, ...] = ()
    gpu_problem: str = ""
    gpu_pci: str = ""
    gpu_cpus: tuple[int, ...] = ()
    cores: tuple[tuple[int, ...], ...] = ()
    num_allowed_cpus: int = 0
