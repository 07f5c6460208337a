"""Checks one host: memory, shared memory, limits, network. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from mpipipe.doctor.facts import NodeFacts
from mpipipe.doctor.finding import Finding, fatal, ok, warning
from mpipipe.planning.memory import gib

__all__ = ["check_node"]

# Docker's default of 64 MiB in all is too little for NCCL or MPI between several ranks.
_SHM_PER_RANK = 64 * 2**20
_MEMLOCK = 64 * 2**20  # what InfiniBand pins for queues and small buffers
_OPEN_FILES = 1024  # the usual default; connections, shards and logs of one rank stay far below
# The libraries alone take 0.4 GiB on a CPU, more with CUDA.
_LITTLE_MEMORY = 2 * 2**30


def check_node(node: NodeFacts, *, num_ranks: int) -> Iterator[Finding]:
    """Findings of a host on which `num_ranks` ranks run."""
    yield _memory(node, num_ranks)
    if node.oom_kills:
        yield warning(
            "node.oom",
            f"{node.oom_kills} processes of this job were killed for lack of memory already",
            "an earlier step or a neighbour in the same cgroup took more than its limit",
            "ask for more memory (sbatch --mem), or lower memory.kv_cache_bytes",
            num_oom_kills=node.oom_kills,
        )
    yield _shm(node, num_ranks)
    yield from _limits(node)


def _memory(node: NodeFacts, num_ranks: int) -> Finding:
    limit = "" if node.memory_limit is None else f", the cgroup's limit is {gib(node.memory_limit)}"
    what = f"{gib(node.memory_available)} of memory available{limit}"
    values = {"available_bytes": node.memory_available, "limit_bytes": node.memory_limit or 0}
    if node.memory_available >= _LITTLE_MEMORY * num_ranks:
        return ok("node.memory", f"{what}; {node.num_cores} cores", **values)
    cause = "the host is small or busy"
    remedy = "use a host with more memory, or end other processes"
    if node.memory_limit is not None:
        cause = "the job asked for little memory, and is killed when it takes more"
        remedy = "ask for more: sbatch --mem=32G (or --mem=0 for all of the node)"
    ranks = f"{num_ranks} rank{'s' * (num_ranks > 1)}"
    return warning("node.memory", f"{what}, for {ranks}", cause, remedy, **values)


def _shm(node: NodeFacts, num_ranks: int) -> Finding:
    if node.shm_free is None:
        level = fatal if num_ranks > 1 else warning
        return level(
            "node.shm",
            "/dev/shm is not there, or cannot be written",
            "the container does not mount it",
            "apptainer: leave out --no-mount dev; docker: --shm-size=1g or --ipc=host",
        )
    if node.shm_free < 0:
        return ok("node.shm", "/dev/shm has no limit of its own")
    what = f"{gib(node.shm_free)} free in /dev/shm"
    if num_ranks == 1 or node.shm_free >= _SHM_PER_RANK * num_ranks:
        return ok("node.shm", what, shm_free_bytes=node.shm_free)
    return warning(
        "node.shm",
        f"{what} for {num_ranks} ranks",
        "a container's default is 64 MiB, or other jobs left files there",
        "docker: --shm-size=1g or --ipc=host; else remove old files from /dev/shm",
        shm_free_bytes=node.shm_free,
    )


def _limits(node: NodeFacts) -> Iterator[Finding]:
    little_memlock = node.infiniband and 0 <= node.memlock < _MEMLOCK
    few_files = 0 <= node.max_open_files < _OPEN_FILES
    cause = "Slurm passes on the limits of the shell that submitted the job"
    if little_memlock:
        yield warning(
            "node.memlock",
            f"only {gib(node.memlock)} may be locked in memory (ulimit -l)",
            cause,
            "raise it there (ulimit -l unlimited), or srun --propagate=NONE; else InfiniBand "
            "falls back to TCP or fails",
            memlock_bytes=node.memlock,
        )
    if few_files:
        yield warning(
            "node.files",
            f"only {node.max_open_files} files may be open at once (ulimit -n)",
            cause,
            "raise it there: ulimit -n 4096",
            max_open_files=node.max_open_files,
        )
    if not little_memlock and not few_files:
        locked = "unlimited" if node.memlock < 0 else gib(node.memlock)
        files = "unlimited" if node.max_open_files < 0 else str(node.max_open_files)
        yield ok("node.limits", f"locked memory {locked}, open files {files}")
