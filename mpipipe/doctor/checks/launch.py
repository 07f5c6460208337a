"""Checks how the ranks were started and whether they run the same thing. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from mpipipe.doctor.facts import RankFacts
from mpipipe.doctor.finding import Finding, fatal, ok, warning
from mpipipe.errors import EnvironmentSetupError
from mpipipe.topology.launcher import Launcher
from mpipipe.topology.mpi_library import (
    MpiAbi,
    abi_of_file,
    abi_of_library,
    missing_abi,
    short_name,
)

__all__ = ["check_launch", "not_joined"]

# The MPI that a launcher belongs to, by the value of `topology.launcher.Launcher`.
_OF_LAUNCHER = {
    Launcher.OPENMPI.value: MpiAbi.OPEN_MPI,
    Launcher.HYDRA.value: MpiAbi.MPICH,
}
_SHORT_S = 600.0  # less is hardly enough to load a model and complete anything


def check_launch(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Launcher, MPI, versions, wall time; findings of all ranks together."""
    for check in (_launcher, _mpi, _versions, _wall_time, _tools):
        yield from check(ranks)


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
    hosts = dict.fromkeys(rank.host for rank in ranks)
    per_host = {host: [rank for rank in ranks if rank.host == host] for host in hosts}
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
    alike = True
    for name in names:
        found = _by_value(ranks, lambda rank, name=name: rank.software.versions.get(name, ""))  # type: ignore[misc]
        if len(found) < 2:
            continue
        alike = False
        apart = name == "mpipipe" or (
            name == "mpi4py" and len({_series(version) for version in found}) > 1
        )
        level = fatal if apart else warning
        yield level(
            "launch.versions",
            f"{name} differs: {_told(found)}",
            "the hosts have different environments, or a user site folder is on one of them",
            "use one environment or image on all hosts; set PYTHONNOUSERSITE=1",
        )
    if alike:
        shown = ranks[0].software.versions
        text = ", ".join(f"{name} {version}" for name, version in shown.items() if version)
        yield ok("launch.versions", text)


def _wall_time(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    told = [rank.launch.wall_left_s for rank in ranks if rank.launch.wall_left_s is not None]
    if not told:
        return
    left_s = min(told)
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


def _by_value(
    ranks: Sequence[RankFacts], value: Callable[[RankFacts], str]
) -> dict[str, RankFacts]:
    """The first rank of each value."""
    found: dict[str, RankFacts] = {}
    for rank in ranks:
        found.setdefault(value(rank), rank)
    return found


def _told(found: dict[str, RankFacts]) -> str:
    return ", ".join(
        f"{value or 'none'} on {rank.host} (rank {rank.rank})" for value, rank in found.items()
    )
