"""What each rank may take on its device and its host for weights, cache and work space. Pure.

Ranks that share a host share its memory, those that share a GPU the GPU's. `memory` checks that
what is planned fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpipipe.config.schema import MemoryConfig
from mpipipe.errors import PlanError
from mpipipe.planning.links import compute_ceilings, link_rates
from mpipipe.planning.memory import gib
from mpipipe.planning.offload_search import RankRoom
from mpipipe.planning.placement import StageSpeed
from mpipipe.planning.resources import RankResources

__all__ = [
    "CPU_LIBRARY_BYTES",
    "GPU_LIBRARY_BYTES",
    "check_settings",
    "gpu_bytes",
    "gpu_limit",
    "kv_host_room",
    "most_host_bytes",
    "rank_rooms",
    "stage_rooms",
]

# Share of a host's available memory that may be pinned by itself: pinned pages cannot be swapped
# out, and reading the checkpoint, Python and its libraries need some.
_HOST_SHARE = 0.7
# Keeps estimates honest: norms, biases and alignment are not in the sizes of `cost`.
_MARGIN = 1 / 256
# What Python's libraries take of each rank on a CPU, most of it after it was asked what is free.
CPU_LIBRARY_BYTES = 2**29
# The same with CUDA, a guess: contexts, cuBLAS and pinned buffers come on top.
GPU_LIBRARY_BYTES = 3 * 2**29
_AUTO_CACHE_FACTOR = 4  # of what is free beside the weights, a quarter is cache (`memory`)


def check_settings(memory: MemoryConfig, *, on_gpus: bool) -> None:
    """Refuse what means nothing on this kind of device.

    A limit that is silently ignored would be taken for one that holds.

    Raises:
        PlanError: `memory.host_bytes` for ranks on CPUs.
    """
    if not on_gpus and isinstance(memory.host_bytes, int) and memory.host_bytes > 0:
        raise PlanError(
            f"memory.host_bytes = {memory.host_bytes} ({gib(memory.host_bytes)}) is for ranks on "
            "GPUs, but these compute on CPUs, whose weights stand in host memory anyway: set "
            "memory.device_bytes, which limits them, and leave memory.host_bytes at 0 or "
            '"auto"'
        )


def gpu_bytes(memory: MemoryConfig, rank: RankResources, ranks: Sequence[RankResources]) -> int:
    """What all ranks on the GPU of `rank` may take of it together."""
    free = int(rank.gpu.free_bytes * memory.gpu_memory_fraction)
    if not isinstance(memory.device_bytes, int):
        return free
    return min(free, memory.device_bytes * _num_on_gpu(rank, ranks))


def gpu_limit(memory: MemoryConfig, rank: RankResources, ranks: Sequence[RankResources]) -> str:
    """The setting that `gpu_bytes` follows from."""
    if gpu_bytes(memory, rank, ranks) < gpu_bytes(
        replace(memory, device_bytes="auto"), rank, ranks
    ):
        return "memory.device_bytes"
    return "memory.gpu_memory_fraction of what is free"


def most_host_bytes(rank: RankResources, ranks: Sequence[RankResources]) -> int:
    """What a rank on a GPU may pin at most: its share of its host's memory beside its libraries."""
    share = _available_bytes(rank, ranks) // _num_on_host(rank, ranks)
    return max(0, share - GPU_LIBRARY_BYTES)


def kv_host_room(
    rank: RankResources, ranks: Sequence[RankResources], *, on_gpus: bool, most: bool
) -> int:
    """A rank's share of its host's memory for weights and KV pages there; `most`: if asked for."""
    share = _available_bytes(rank, ranks) // _num_on_host(rank, ranks)
    library_bytes = GPU_LIBRARY_BYTES if on_gpus else CPU_LIBRARY_BYTES
    return min(share if most else int(share * _HOST_SHARE), share - library_bytes)


def rank_rooms(
    memory: MemoryConfig,
    ranks: Sequence[RankResources],
    world: Sequence[RankResources],
    *,
    on_gpus: bool,
    num_threads: int,
) -> tuple[RankRoom, ...]:
    """By rank, in the order given.

    Args:
        memory: what is asked for.
        ranks: of a replica, which share what memory there is for it.
        world: all ranks of the job, which share links and disks.
        on_gpus: they compute there.
        num_threads: of each on a CPU.
    """
    make = _on_gpu if on_gpus else _on_cpu
    return tuple(make(memory, rank, ranks, num_threads, world) for rank in ranks)


def stage_rooms(rooms: Sequence[RankRoom], num_lanes: int) -> tuple[RankRoom, ...]:
    """What each of the lanes of a stage has, whose weights are placed alike; `rooms`: of ranks."""
    stages = [rooms[first : first + num_lanes] for first in range(0, len(rooms), num_lanes)]
    return tuple(
        replace(
            lanes[0],
            device_bytes=min(room.device_bytes for room in lanes),
            host_bytes=min(room.host_bytes for room in lanes),
            kv_host_bytes=min(room.kv_host_bytes for room in lanes),
            pool_bytes=min(room.pool_bytes for room in lanes),
        )
        for lanes in stages
    )


def _on_gpu(
    memory: MemoryConfig,
    rank: RankResources,
    ranks: Sequence[RankResources],
    num_threads: int,
    world: Sequence[RankResources],
) -> RankRoom:
    on_host, on_gpu = _num_on_host(rank, ranks), _num_on_gpu(rank, ranks)
    unasked = int(_available_bytes(rank, ranks) * _HOST_SHARE) // on_host
    host_bytes = memory.host_bytes if isinstance(memory.host_bytes, int) else unasked
    kv_host_bytes = memory.kv_host_bytes if isinstance(memory.kv_host_bytes, int) else unasked
    # What is asked for of either is beside the other.
    asked = sum(size for size in (memory.host_bytes, memory.kv_host_bytes) if isinstance(size, int))
    most = most_host_bytes(rank, ranks)
    return RankRoom(
        device_bytes=_less_margin(gpu_bytes(memory, rank, ranks) // on_gpu),
        weight_limit_bytes=None,
        cache_factor=1,
        host_bytes=_less_margin(min(host_bytes, most)),
        has_disk=memory.offload_dir != "",
        speed=StageSpeed(
            compute_ceilings(rank.gpu, num_threads),
            link_rates(rank.gpu, rank.disk_bytes_per_s).shared_by(
                _num_on_gpu(rank, world), _num_on_host(rank, world)
            ),
        ),
        pins_staging=True,
        kv_host_bytes=_less_margin(min(kv_host_bytes, most)),
        pool_bytes=_less_margin(min(max(unasked, asked), most)),
    )


def _on_cpu(
    memory: MemoryConfig,
    rank: RankResources,
    ranks: Sequence[RankResources],
    num_threads: int,
    world: Sequence[RankResources],
) -> RankRoom:
    on_host = _num_on_host(rank, ranks)
    limit = memory.device_bytes if isinstance(memory.device_bytes, int) else None
    return RankRoom(
        device_bytes=_less_margin(_available_bytes(rank, ranks) // on_host) - CPU_LIBRARY_BYTES,
        weight_limit_bytes=None if limit is None else _less_margin(limit),
        cache_factor=1 if _has_pages(memory) else _AUTO_CACHE_FACTOR,
        host_bytes=0,
        has_disk=memory.offload_dir != "",
        speed=StageSpeed(
            compute_ceilings(None, num_threads),
            link_rates(None, rank.disk_bytes_per_s).shared_by(1, _num_on_host(rank, world)),
        ),
    )


def _has_pages(memory: MemoryConfig) -> bool:
    """Whether the size of the cache is configured."""
    return isinstance(memory.num_kv_pages, int) or isinstance(memory.kv_cache_bytes, int)


def _less_margin(num_bytes: int) -> int:
    return num_bytes - int(num_bytes * _MARGIN)


def _available_bytes(rank: RankResources, ranks: Sequence[RankResources]) -> int:
    return min(other.memory_available_bytes for other in ranks if other.host == rank.host)


def _num_on_host(rank: RankResources, ranks: Sequence[RankResources]) -> int:
    return sum(other.host == rank.host for other in ranks)


def _num_on_gpu(rank: RankResources, ranks: Sequence[RankResources]) -> int:
    gpu = (rank.host, rank.gpu.uuid or rank.gpu.index)
    return sum((other.host, other.gpu.uuid or other.gpu.index) == gpu for other in ranks)
