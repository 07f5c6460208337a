"""Checks the facts of all ranks: how they were started, each by itself, each host once. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from mpipipe.doctor.checks.gpu import check_gpu, check_gpus_of_host, wants_gpu
from mpipipe.doctor.checks.software import check_software
from mpipipe.doctor.facts import NodeFacts, RankFacts
from mpipipe.doctor.finding import Finding, fatal, ok, split_advice, warning
from mpipipe.errors import EnvironmentSetupError
from mpipipe.planning.memory import gib
from mpipipe.topology.launcher import Launcher
from mpipipe.topology.mpi_library import (
    MpiAbi,
    abi_of_file,
    abi_of_library,
    missing_abi,
    short_name,
)

__all__ = ["check_node", "check_ranks", "not_joined"]

# The MPI that a launcher belongs to, by the value of `topology.launcher.Launcher`.
_OF_LAUNCHER = {Launcher.OPENMPI.value: MpiAbi.OPEN_MPI, Launcher.HYDRA.value: MpiAbi.MPICH}
_SHORT_S = 600.0  # less is hardly enough to load a model and complete anything
# Docker's default of 64 MiB in all is too little for NCCL or MPI between several ranks.
_SHM_PER_RANK = 64 * 2**20
_MEMLOCK = 64 * 2**20  # what InfiniBand pins for queues and small buffers
_OPEN_FILES = 1024  # the usual default; connections, shards and logs of one rank stay far below
# The libraries alone take 0.4 GiB on a CPU, more with CUDA.
_LITTLE_MEMORY = 2 * 2**30


def check_ranks(ranks: Sequence[RankFacts], *, share_gpus: bool = False) -> Iterator[Finding]:
    """All findings that follow from the facts, in the order in which they are shown.

    Args:
        ranks: in rank order.
        share_gpus: pipeline.share_gpus.
    """
    hosts = _by_value(ranks, lambda rank: rank.host)
    for check in (_launcher, _mpi, _versions, _wall_time, _tools):
        yield from check(ranks)
    for rank in ranks:
        yield from (finding.at(rank.host, rank.rank) for finding in check_software(rank))
    for host, inside in hosts.items():
        yield from (f.at(host) for f in check_node(inside[0].node, num_ranks=len(inside)))
    for rank in ranks:
        yield from (finding.at(rank.host, rank.rank) for finding in check_gpu(rank))
    for host, inside in hosts.items():
        yield from (f.at(host) for f in check_gpus_of_host(inside, share=share_gpus))
    yield from _unequal_gpus(ranks)
    yield from _configurations(ranks)


def _by_value(
    ranks: Sequence[RankFacts], value: Callable[[RankFacts], str]
) -> dict[str, list[RankFacts]]:
    """The ranks of each value, in rank order."""
    found: dict[str, list[RankFacts]] = {}
    for rank in ranks:
        found.setdefault(value(rank), []).append(rank)
    return found


def _unequal_gpus(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Some ranks with a GPU and some without: the run would fall back to CPUs, or refuse."""
    without = [rank for rank in ranks if rank.gpu.rank_gpu.index < 0]
    if not without or len(without) == len(ranks) or any(wants_gpu(r.gpu) for r in without):
        return  # the last have a finding of their own
    first = without[0]
    yield fatal(
        "gpu.ranks",
        f"{len(ranks) - len(without)} of {len(ranks)} ranks have a GPU, rank {first.rank} "
        f"on {first.host} has none",
        "the job got different kinds of nodes, or GPUs for some of its tasks only",
        "ask for GPUs on every node (--gpus-per-node=N), or set pipeline.device = "
        '"cpu" to run on CPUs on purpose',
    ).at(first.host, first.rank)


def _configurations(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """The configuration as each rank reads it."""
    failed = [rank for rank in ranks if rank.config_problem]
    elsewhere = len(failed) < len(ranks)
    for rank in failed if elsewhere else failed[:1]:
        what, remedy = split_advice(rank.config_problem)
        cause = "the file or a setting is wrong"
        if elsewhere:
            cause = "the file is not on a file system that this host sees, though others do"
        yield fatal("job.config", what, cause, remedy or "mend the file", rank.config_exit_code).at(
            rank.host, rank.rank
        )
    if failed or len({rank.config_hash for rank in ranks}) < 2:
        return
    other = next(rank for rank in ranks if rank.config_hash != ranks[0].config_hash)
    yield fatal(
        "job.config",
        f"rank {other.rank} on {other.host} reads another configuration than rank 0 on "
        f"{ranks[0].host}",
        "the file, or one that it extends, differs between the hosts",
        "put it on a file system that all hosts share",
    ).at(other.host, other.rank)


# ---- launch --------------------------------------------------------------------------------------


def not_joined(error: EnvironmentSetupError, *, mpi_loaded: bool) -> Finding:
    """The ranks did not find each other: they run as singletons, or MPI did not load."""
    found = Finding.of_error("launch.mpi", error)
    if (abi := missing_abi(str(error))) is not None:
        cause = (
            f"mpi4py was built for the ABI of {abi.value}, and no library of that kind was found: "
            "the MPI module that is loaded is of another kind, or none is"
        )
        remedy = (
            f"load a module of {abi.value}, or build mpi4py for the MPI that is there: unset "
            "MPI4PY_MPIABI, pip install --no-binary=mpi4py --force-reinstall mpi4py"
        )
        return replace(found, cause=cause, remedy=remedy)
    cause = "srun's --mpi, or the mpirun that was used, is not of the kind of the MPI library"
    if not mpi_loaded:
        cause = "no MPI library is installed in this environment, or its module is not loaded"
    return replace(found, cause=cause)


def _launcher(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    first = ranks[0].launch
    per_host = _by_value(ranks, lambda rank: rank.host)
    where = ", ".join(f"{host}: {len(inside)}" for host, inside in per_host.items())
    how = "one process, no launcher" if first.launcher == "none" else f"started by {first.launcher}"
    if first.srun_mpi:
        how += f" --mpi={first.srun_mpi}"
    plural = "s" * (len(ranks) > 1)
    yield ok("launch.ranks", f"{len(ranks)} rank{plural} ({where}), {how}")
    if first.idle_nodes:
        yield warning(
            "launch.nodes",
            f"{first.idle_nodes} of the job's nodes get no rank",
            "fewer tasks were asked for than nodes",
            "ask for fewer nodes (--nodes=1), or for tasks on each (--ntasks-per-node=1)",
            num_idle_nodes=first.idle_nodes,
        )
    for host, inside in per_host.items():
        cores = max(rank.node.num_cores for rank in inside)
        if len(inside) > cores:
            yield warning(
                "launch.cores",
                f"{len(inside)} ranks on {host} share {cores} core{'s' * (cores > 1)}",
                "fewer cores were asked for than ranks, or the launcher binds all ranks "
                "to the same ones",
                "give each rank cores: srun --cpus-per-task=4, mpirun --bind-to none",
                num_ranks=len(inside),
                num_cores=cores,
            ).at(host)


def _mpi(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    libraries = _by_value(ranks, lambda rank: _name_and_version(rank.launch.mpi_library))
    launch = ranks[0].launch
    mixed = [found for rank in ranks if (found := _mixed_mpis(rank)) is not None]
    if len(libraries) > 1:
        level = warning if len({_series(text) for text in libraries}) == 1 else fatal
        yield level(
            "launch.mpi",
            f"the ranks run different MPI libraries: {_told(libraries)}",
            "the hosts have different modules, images or environments",
            "use one environment or image on all hosts, on a shared file system",
        )
    elif not launch.mpi_library:
        yield ok("launch.mpi", "not needed by a single rank")
    elif mixed:
        yield from mixed
    else:
        parts = [short_name(launch.mpi_library)]
        parts += [f"{launch.mpi_abi} ABI"] if launch.mpi_abi else []
        parts += [f"threads: {launch.thread_level}"] if launch.thread_level else []
        parts += [launch.mpi_path] if launch.mpi_path else []
        yield ok("launch.mpi", ", ".join(parts))


def _mixed_mpis(rank: RankFacts) -> Finding | None:
    """Two kinds of MPI in one rank. It has joined the others, so that they may work together."""
    launch = rank.launch
    name, kind = short_name(launch.mpi_library), abi_of_library(launch.mpi_library)
    loaded = [library.path for library in rank.software.loaded if library.name == "libmpi"]
    if launch.mpi_abi in {MpiAbi.MPICH, MpiAbi.OPEN_MPI} and kind not in {None, launch.mpi_abi}:
        found = warning(
            "launch.mpi",
            f"mpi4py calls MPI through the ABI of {launch.mpi_abi}, but the library is {name}",
            "a layer translates between them, or MPI4PY_MPIABI or MPI4PY_LIBMPI is set wrongly",
            "unset both, or build mpi4py for this library: pip install --no-binary=mpi4py "
            "--force-reinstall mpi4py",
        )
    elif {MpiAbi.MPICH, MpiAbi.OPEN_MPI} <= {abi_of_file(path) for path in loaded}:
        found = warning(
            "launch.mpi",
            f"libraries of two MPIs are loaded: {', '.join(loaded)}",
            "another package, LD_PRELOAD or LD_LIBRARY_PATH brings an MPI beside mpi4py's",
            f"load one MPI module, that of {name}, and keep the other's folder out of "
            "LD_LIBRARY_PATH",
        )
    elif launch.world_size == 1 and kind not in {None, _OF_LAUNCHER.get(launch.launcher, kind)}:
        found = warning(
            "launch.mpi",
            f"started by {launch.launcher}, but the MPI library is {name}",
            "PATH finds the launcher of one MPI, Python the library of another",
            f"use the mpiexec that belongs to {launch.mpi_path or name}: with the other one "
            "ranks do not meet",
        )
    else:
        return None
    return found.at(rank.host, rank.rank)


def _name_and_version(library: str) -> str:
    """Without who built it, where and when: those differ between hosts that fit each other."""
    name = short_name(library)
    found = re.match(r".*?\d+\.[\w.]+", name)
    return found[0] if found else name


def _series(text: str) -> str:
    """Without the patch level: "Open MPI v4.1.6" and "Open MPI v4.1.5" are one series."""
    return re.sub(r"(\d+\.\d+)[\w.]*$", r"\1", text)


def _versions(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    names = dict.fromkeys(name for rank in ranks for name in rank.software.versions)
    values = {
        name: _by_value(ranks, lambda rank, name=name: rank.software.versions.get(name, ""))  # type: ignore[misc]
        for name in names
    }
    differing = {name: found for name, found in values.items() if len(found) > 1}
    for name, found in differing.items():
        series = {_series(version) for version in found}
        apart = name == "mpipipe" or (name == "mpi4py" and len(series) > 1)
        level = fatal if apart else warning
        yield level(
            "launch.versions",
            f"{name} differs: {_told(found)}",
            "the hosts have different environments, or a user site folder is on one of them",
            "use one environment or image on all hosts; set PYTHONNOUSERSITE=1",
        )
    if not differing:
        shown = ranks[0].software.versions
        text = ", ".join(f"{name} {version}" for name, version in shown.items() if version)
        yield ok("launch.versions", text)


def _wall_time(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    left_s = ranks[0].launch.wall_left_s  # only the head asks
    if left_s is None:
        return
    if left_s >= _SHORT_S:
        yield ok("launch.time", f"{left_s / 60:.0f} minutes are left", wall_left_s=left_s)
        return
    yield warning(
        "launch.time",
        f"{left_s / 60:.1f} minutes of wall time left",
        "the job's time limit (sbatch --time) is short or nearly over",
        "ask for more (sbatch --time=04:00:00); with --requeue and output.resume the job goes "
        "on in its next run",
        wall_left_s=left_s,
    )


def _tools(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Profilers, of which any will do, and Slurm's accounting inside a job."""
    node = ranks[0].node
    if node.profilers:
        yield ok("launch.profilers", ", ".join(node.profilers))
    else:
        inside = " in this container" if node.container else ""
        yield warning(
            "launch.profilers",
            f"none of nsys, ncu, perf and py-spy is to be found{inside}",
            "the image or environment was built without them, or their module is not loaded",
            "nothing, if you do not profile; else load the module or add them to the image. "
            "mpipipe bench throughput --trace and --profile need none of them",
        )
    if not ranks[0].launch.slurm_job:
        return
    if node.sacct:
        yield ok("launch.sacct", "there")
    elif node.container:
        usual = "as usual in a container: the batch script outside asks it"
        yield ok("launch.sacct", f"not to be found, {usual}")
    else:
        remedy = "nothing: mpipipe's own metrics.json has memory and times; or ask the site for it"
        cause = "this node lacks Slurm's client programs"
        yield warning("launch.sacct", "not to be found", cause, remedy)


def _told(found: dict[str, list[RankFacts]]) -> str:
    """Each value with the first rank that has it."""
    return ", ".join(
        f"{value or 'none'} on {first.host} (rank {first.rank})"
        for value, (first, *_) in found.items()
    )


# ---- host ----------------------------------------------------------------------------------------


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
