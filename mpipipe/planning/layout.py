"""Where the stages run: which rank takes which stage of which replica, on which cores. Pure.

Invariants: rank 0 is the head of replica 0 and takes its stage 0; stages on one host follow each
other, so that as few edges as possible cross the network; every rank has a stage; a rank that its
launcher has bound keeps its cores.
`partition` decides which layers a stage has; `topology.host` reads and sets affinity.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpipipe.config.schema import PipelineConfig
from mpipipe.errors import RankCountError
from mpipipe.planning.plan import Decisions
from mpipipe.planning.resources import RankResources
from mpipipe.planning.tensor_parallel import lane_groups
from mpipipe.topology.host import Core, format_cpus

__all__ = [
    "Layout",
    "Place",
    "cores_of_ranks",
    "lay_out",
    "note_cores",
    "note_layout",
    "note_replicas",
    "sharing",
    "stage_order",
    "threads_per_rank",
]


_MOST_TOLD = 8  # replicas in a note
_Stages = list[tuple[RankResources, ...]]  # of each the ranks that share it


# ---- stages --------------------------------------------------------------------------------------


def stage_order(ranks: Sequence[RankResources]) -> tuple[int, ...]:
    """The rank of every stage: host by host, the head's first, on each host in order of rank.

    A launcher that deals ranks round the hosts (srun -m cyclic, mpirun --map-by node) would
    otherwise send every step over the network.
    """
    return tuple(rank.rank for sharers in _by_host(ranks) for rank in sharers)


# ---- replicas ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is."""

    replica: int
    stage: int
    lane: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Which ranks make which pipeline: every rank is in one."""

    replicas: tuple[tuple[int, ...], ...]  # of each its ranks, in the order of stages and lanes
    reason: str = ""  # why there are so many
    num_lanes: int = 1  # ranks of a stage

    @property
    def least_stages(self) -> int:
        """Of the shortest pipeline."""
        return min(map(len, self.replicas)) // self.num_lanes

    @property
    def most_stages(self) -> int:
        """Of the longest pipeline."""
        return max(map(len, self.replicas)) // self.num_lanes

    def place_of(self, rank: int) -> Place:
        """Replica and stage of `rank`."""
        for replica, ranks in enumerate(self.replicas):
            if rank in ranks:
                return Place(replica, *divmod(ranks.index(rank), self.num_lanes))
        raise AssertionError(f"rank {rank} is in no replica of {self.replicas}")


def lay_out(
    ranks: Sequence[RankResources], pipeline: PipelineConfig, *, least_stages: int = 1
) -> Layout:
    """Cut the order of stages into the replicas that are asked for; neighbours make a pipeline.

    Ranks that are left over when all replicas have their stages make some pipelines longer by one:
    requests are handed out on demand, so a longer one gets more. Where every host holds a replica,
    none crosses hosts.

    Args:
        ranks: all of them.
        pipeline: the settings.
        least_stages: of a replica, where replicas and stages are "auto".

    Raises:
        RankCountError: the number of ranks does not fit what is asked for.
    """
    num_lanes, by_rank = pipeline.tensor_parallel, {rank.rank: rank for rank in ranks}
    if len(ranks) % num_lanes:
        raise RankCountError(
            f"pipeline.tensor_parallel = {num_lanes}, but {_counted(len(ranks))}: start a multiple "
            f"of {num_lanes} ranks, or set pipeline.tensor_parallel = 1"
        )
    order = lane_groups([by_rank[rank] for rank in stage_order(ranks)], num_lanes)
    cut, reason = _cut(order, pipeline, least_stages)
    flat = tuple(tuple(rank.rank for lanes in part for rank in lanes) for part in cut)
    return Layout(flat, reason, num_lanes)


def _cut(order: _Stages, pipeline: PipelineConfig, least_stages: int) -> tuple[list[_Stages], str]:
    """The stages of each replica, and why there are so many."""
    num_replicas, num_stages = pipeline.replicas, pipeline.num_stages
    num_lanes = pipeline.tensor_parallel
    if isinstance(num_stages, int):
        return _equal_cut(order, num_replicas, num_stages), "one per so many ranks"
    if isinstance(num_replicas, int):
        if num_replicas > len(order):
            raise RankCountError(
                f"pipeline.replicas = {num_replicas}, but {_counted(len(order) * num_lanes)}, and "
                f"every replica takes {'one' if num_lanes == 1 else num_lanes} at least: start "
                f'{_launches(num_replicas * num_lanes)}, or set pipeline.replicas = "auto"'
            )
        return _even_cut(order, num_replicas), "asked for"
    held = least_stages * num_lanes
    least = "a rank holds the model" if held == 1 else f"{held} ranks hold it"
    hosts = [list(stages) for _, stages in itertools.groupby(order, lambda lanes: lanes[0].host)]
    if all(len(host) >= least_stages for host in hosts):
        cuts = [_even_cut(host, len(host) // least_stages) for host in hosts]
        return list(itertools.chain.from_iterable(cuts)), least
    return _even_cut(order, max(1, len(order) // least_stages)), least


def _equal_cut(order: _Stages, num_replicas: int | str, num_stages: int) -> list[_Stages]:
    """Replicas of `num_stages` stages each, that use all ranks."""
    num_lanes, possible = len(order[0]), len(order)
    num_ranks = possible * num_lanes
    each = "one rank" if num_lanes == 1 else f"{num_lanes} ranks (pipeline.tensor_parallel)"
    if num_replicas == 1 and num_stages != possible:
        raise RankCountError(
            f"pipeline.num_stages = {num_stages}, but {_counted(num_ranks)}, and every stage is "
            f"{each}: start {_launches(num_stages * num_lanes)}, or set pipeline.num_stages = "
            f"{possible}"
            + (', or pipeline.replicas = "auto"' if possible % num_stages == 0 else "")
        )
    if isinstance(num_replicas, int) and num_replicas * num_stages != possible:
        taken = num_replicas * num_stages * num_lanes
        raise RankCountError(
            f"pipeline.replicas = {num_replicas} of pipeline.num_stages = {num_stages} take "
            f"{taken} ranks, but {_counted(num_ranks)}: start {_launches(taken)}, or leave one of "
            "the two settings out"
        )
    if possible % num_stages:
        most = possible - possible % num_stages
        numbers = sorted(rank.rank for lanes in order[most:] for rank in lanes)
        left = ", ".join(map(str, numbers))
        raise RankCountError(
            f"{_counted(num_ranks)}, which are no whole number of pipelines of "
            f"pipeline.num_stages = {num_stages}: {'rank' if len(numbers) == 1 else 'ranks'} "
            f"{left} would be left over; start {_launches((most or num_stages) * num_lanes)}, or "
            'set pipeline.num_stages = "auto", which makes some pipelines longer'
        )
    return [order[first : first + num_stages] for first in range(0, possible, num_stages)]


def _even_cut(order: _Stages, num_parts: int) -> list[_Stages]:
    """Parts that differ by one stage at most, the longer ones first."""
    size, num_longer = divmod(len(order), num_parts)
    edges = [part * size + min(part, num_longer) for part in range(num_parts + 1)]
    return [order[first:last] for first, last in itertools.pairwise(edges)]


def _counted(num_ranks: int) -> str:
    return f"there {'is 1 rank' if num_ranks == 1 else f'are {num_ranks} ranks'}"


def _launches(num_ranks: int) -> str:
    return f"`mpirun -n {num_ranks} mpipipe run …` or `srun -n {num_ranks} mpipipe run …`"


def sharing(ranks: Sequence[RankResources], members: Sequence[int]) -> list[RankResources]:
    """What `members` of a replica have where other replicas use the same hosts, or the same GPUs.

    Of memory that is shared they get as much as they are of the ranks that share it.
    """
    inside = set(members)
    by_host, by_gpu = Counter(rank.host for rank in ranks), Counter(map(_gpu_of, ranks))
    own = [rank for rank in ranks if rank.rank in inside]
    own_by_host, own_by_gpu = Counter(rank.host for rank in own), Counter(map(_gpu_of, own))

    def share(rank: RankResources) -> RankResources:
        host, gpu = rank.host, _gpu_of(rank)
        if own_by_host[host] == by_host[host]:
            return rank
        available = rank.memory_available_bytes * own_by_host[host] // by_host[host]
        free = rank.gpu.free_bytes * own_by_gpu[gpu] // by_gpu[gpu]
        return replace(
            rank, memory_available_bytes=available, gpu=replace(rank.gpu, free_bytes=free)
        )

    numbers = {rank.rank: rank for rank in own}
    return [share(numbers[member]) for member in members]


def _gpu_of(rank: RankResources) -> tuple[str, str | int]:
    return rank.host, rank.gpu.uuid or rank.gpu.index


def note_replicas(ranks: Sequence[RankResources], layout: Layout, decisions: Decisions) -> None:
    """Note which ranks make which replica, if there are several."""
    if len(layout.replicas) == 1:
        return
    numbers = {rank.rank: rank for rank in ranks}
    placed, num_crossing = [], 0
    for replica, members in enumerate(layout.replicas):
        hosts = list(dict.fromkeys(numbers[member].host for member in members))
        num_crossing += len(hosts) > 1
        inside = _numbers([numbers[member] for member in members])
        placed.append(f"replica {replica}: {inside} on {' '.join(hosts)}")
    left = len(placed) - _MOST_TOLD
    if left > 0:
        placed = [*placed[:_MOST_TOLD], f"and {left} more"]
    reason = (
        f"{num_crossing} of {len(layout.replicas)} between hosts"
        if num_crossing
        else ("neighbours; none is between hosts")
    )
    decisions.note("pipeline.replica_ranks", " | ".join(placed), reason)


def note_layout(ranks: Sequence[RankResources], decisions: Decisions) -> None:
    """Note where the stages are, if there are several hosts."""
    hosts = _by_host(ranks)
    if len(hosts) == 1:
        return
    placed = [f"{sharers[0].host}: {_numbers(sharers)}" for sharers in hosts]
    crossing = len(hosts) - 1
    by_rank = sorted(ranks, key=lambda rank: rank.rank)
    in_order = sum(a.host != b.host for a, b in itertools.pairwise(by_rank))
    reason = f"{crossing} of {len(ranks) - 1} edges between hosts"
    if in_order > crossing:
        reason += f", in the order of ranks it would be {in_order}"
    decisions.note("pipeline.layout", " | ".join(placed), reason)


def _numbers(sharers: Sequence[RankResources]) -> str:
    noun = "rank" if len(sharers) == 1 else "ranks"
    return f"{noun} {' '.join(str(rank.rank) for rank in sharers)}"


def _by_host(ranks: Sequence[RankResources]) -> list[list[RankResources]]:
    """The ranks of each host in order, hosts by their lowest rank."""
    hosts: dict[str, list[RankResources]] = {}
    for rank in sorted(ranks, key=lambda rank: rank.rank):
        hosts.setdefault(rank.host, []).append(rank)
    return list(hosts.values())


# ---- cores ---------------------------------------------------------------------------------------


def cores_of_ranks(bind: str, ranks: Sequence[RankResources]) -> dict[int, tuple[Core, ...]]:
    """The cores that each rank is to use; equal to its mask where it stays as it was launched.

    With `bind` "auto", and GPUs to compute on, a rank whose GPU is nearer to some of its cores gets
    those, shared out among the ranks of its host to whose GPUs they are as near. A rank that was
    bound keeps its cores: its mask is smaller than what the job may use, or unlike that of another
    rank of its host.
    """
    cores = {rank.rank: rank.cores for rank in ranks}
    if bind == "none" or any(not rank.has_gpu for rank in ranks):
        return cores
    for sharers in _by_host(ranks):
        bound = len({rank.cores for rank in sharers}) > 1 or any(map(_is_bound, sharers))
        near = {rank.rank: _near(rank) for rank in sharers}
        if bound or any(len(found) == 0 for found in near.values()):
            continue
        for rank in sharers:
            alike = [other.rank for other in sharers if near[other.rank] == near[rank.rank]]
            cores[rank.rank] = _share(near[rank.rank], alike.index(rank.rank), len(alike))
    return cores


def _is_bound(rank: RankResources) -> bool:
    return _num_cpus(rank.cores) < rank.num_allowed_cpus


def _near(rank: RankResources) -> tuple[Core, ...]:
    """The cores near the rank's GPU; none without a GPU, or where all are as near."""
    wanted = set(rank.gpu_cpus)
    near = tuple(core for core in rank.cores if wanted.intersection(core))
    return near if len(near) < len(rank.cores) else ()


def _share(cores: tuple[Core, ...], position: int, num_sharers: int) -> tuple[Core, ...]:
    """A contiguous part of `cores`; all of them where there are fewer cores than sharers."""
    if len(cores) < num_sharers:
        return cores
    start, end = (len(cores) * edge // num_sharers for edge in (position, position + 1))
    return cores[start:end]


def note_cores(bind: str, ranks: Sequence[RankResources], decisions: Decisions) -> None:
    """Note which ranks are bound near their GPUs."""
    cores = cores_of_ranks(bind, ranks)
    moved = [rank for rank in ranks if cores[rank.rank] != rank.cores]
    if not moved:
        return
    placed = [
        f"rank {rank.rank}: {format_cpus(cpu for core in cores[rank.rank] for cpu in core)}"
        for rank in moved
    ]
    decisions.note("pipeline.bind", " | ".join(placed), "CPUs of the NUMA node of each rank's GPU")


# ---- threads -------------------------------------------------------------------------------------


def threads_per_rank(bind: str, ranks: Sequence[RankResources]) -> tuple[int, str]:
    """Threads that every rank can keep busy on cores of its own, and why; at least 1.

    One per physical core: the second hardware thread of a core slows matrix products down.
    """
    cores = cores_of_ranks(bind, ranks)
    worst: tuple[int, str] | None = None
    for sharers in _by_host(ranks):
        users = Counter(cpu for rank in sharers for core in cores[rank.rank] for cpu in core)
        for rank in sharers:
            found = _threads(rank, cores[rank.rank], users, len(sharers))
            if worst is None or found[0] < worst[0]:
                worst = found
    assert worst is not None, "there are ranks"
    return worst


def _threads(
    rank: RankResources, cores: Sequence[Core], users: Counter[int], num_sharers: int
) -> tuple[int, str]:
    """`users`: how many ranks may use each CPU of the host; 1: only this one."""
    by_count = max(1, rank.num_cores // num_sharers)
    shared = f"{rank.num_cores} usable cores of a host for {num_sharers} ranks"
    if not cores or rank.num_cores < _num_cpus(rank.cores):  # unknown, or a CPU quota for all
        return by_count, shared
    own = sum(1 / max(users[cpu] for cpu in core) for core in cores)
    num_threads = max(1, int(own + 1e-6))  # thirds do not add up to 1
    if num_threads == by_count and max(users.values()) > 1:
        return num_threads, shared
    cpus = _num_cpus(cores)
    reason = f"{_count(len(cores), 'physical core')} with {_count(cpus, 'CPU')}"
    if max(users[cpu] for core in cores for cpu in core) > 1:
        return num_threads, f"{reason} for {num_sharers} ranks of a host"
    if _is_bound(rank):
        reason += f", as the launcher has bound rank {rank.rank}"
        if num_sharers * cpus < rank.num_allowed_cpus:
            reason += (
                f" to {cpus} of {rank.num_allowed_cpus} CPUs "
                "(mpirun --bind-to none, srun --cpus-per-task=N give more)"
            )
    return num_threads, reason


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _num_cpus(cores: Sequence[Core]) -> int:
    return sum(map(len, cores))
