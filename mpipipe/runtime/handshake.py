"""The handshake of the ranks: who they are, what they have, and that all want the same."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from mpipipe._version import __version__
from mpipipe.config.load import LoadedConfig, config_hash
from mpipipe.config.schema import AUTO
from mpipipe.control_plane.messages import PROTOCOL_VERSION, Hello
from mpipipe.errors import DeadlineError, ProtocolMismatchError
from mpipipe.planning.layout import cores_of_ranks
from mpipipe.planning.resources import RankResources, read_rank_resources
from mpipipe.runtime.ranks import AgreedError, in_phase
from mpipipe.topology.gpu import (
    GpuFacts,
    container_kind,
    driver_in_sight,
    no_driver_problem,
    told_local_rank,
)
from mpipipe.topology.host import host_name, move_process
from mpipipe.topology.launcher import local_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.runtime.ranks import Ranks

__all__ = ["exchange_resources", "handshake", "local_rank_of", "read_resources"]


async def handshake(ranks: Ranks, loaded: LoadedConfig) -> tuple[RankResources, ...]:
    """Exchange who we are and what we have; all must have the same configuration.

    Then each rank is bound to the cores near its GPU, if it is to be.

    Raises:
        AgreedError: versions, configurations or the number of ranks differ, or ranks are missing.
    """
    pipeline = loaded.config.pipeline
    try:
        resources = await exchange_resources(
            ranks,
            pipeline.device,
            config_hash(loaded.config),
            offload_dir=loaded.config.memory.offload_dir,
            deadline_s=pipeline.handshake_timeout_s,
        )
    except (ProtocolMismatchError, DeadlineError) as error:
        raise AgreedError(error) from None
    rank = ranks.mesh.rank
    cores = cores_of_ranks(pipeline.bind, resources)[rank]
    if cores != resources[rank].cores:
        move_process(cpu for core in cores for cpu in core)
    return resources


async def exchange_resources(
    ranks: Ranks, device: str, config_hash: str = "", *, offload_dir: str = "", deadline_s: float
) -> tuple[RankResources, ...]:
    """Exchange `read_resources`, in rank order; then poll as the cores of this host allow.

    Args:
        ranks: joined.
        device: `pipeline.device`.
        config_hash: must be the same on all ranks.
        offload_dir: `memory.offload_dir`.
        deadline_s: for the others to come.

    Raises:
        ProtocolMismatchError: versions, configurations or the number of ranks differ.
        DeadlineError: a rank did not come.
    """
    own = await read_resources(ranks, device, offload_dir=offload_dir, deadline_s=deadline_s)
    mesh = ranks.mesh
    hello = Hello(mesh.rank, mesh.world_size, PROTOCOL_VERSION, __version__, config_hash, own)
    resources = tuple(hello.resources for hello in await mesh.handshake(hello, deadline_s))
    _share_host(ranks, resources)
    return resources


async def read_resources(
    ranks: Ranks, device: str, *, offload_dir: str = "", deadline_s: float
) -> RankResources:
    """What this rank has. Collective, as the ranks of a host count themselves.

    Args:
        ranks: joined.
        device: `pipeline.device`; torch is loaded to look at a GPU only where one may be wanted.
        offload_dir: `memory.offload_dir`, whose disk is measured.
        deadline_s: for the others to come.

    Raises:
        AgreedError: a rank did not come, or was told to stop.
        DeadlineError: a rank did not come.
    """
    local_rank = await local_rank_of(ranks, deadline_s)

    def read() -> RankResources:
        gpu, backends = _read_gpu(device, local_rank)
        return read_rank_resources(
            ranks.mesh.rank,
            launcher=ranks.info.launcher.value,
            gpu=gpu,
            attention_backends=backends,
            offload_dir=offload_dir,
        )

    # A phase: torch takes seconds to import where there is a GPU to look at.
    return await in_phase(ranks, "devices", read, deadline_s)


async def local_rank_of(ranks: Ranks, deadline_s: float) -> int:
    """What the launcher told, if it makes sense on every host; else counted by host name."""
    seat = json.dumps([host_name(), told_local_rank(os.environ)]).encode()
    seats = await ranks.mesh.gather("seats", seat, deadline_s)
    counted = None
    if seats is not None:
        told = [json.loads(part) for part in seats]
        counted = json.dumps(local_ranks([(host, number) for host, number in told])).encode()
    numbers: list[int] = json.loads(await ranks.mesh.broadcast("local ranks", counted, deadline_s))
    return numbers[ranks.mesh.rank]


def _share_host(ranks: Ranks, resources: Sequence[RankResources]) -> None:
    """Let the ranks of this host poll less eagerly where they have fewer cores than they are."""
    host = resources[ranks.mesh.rank].host
    local = [rank for rank in resources if rank.host == host]
    if any(rank.num_cores < sum(map(len, rank.cores)) for rank in local):
        num_cores = local[0].num_cores  # a CPU quota, for all of them
    else:
        cpus = {cpu for rank in local for core in rank.cores for cpu in core}
        num_cores = len(cpus) or local[0].num_cores
    ranks.engine.share_cores(num_ranks=len(local), num_cores=num_cores)


def _read_gpu(device: str, local_rank: int) -> tuple[GpuFacts, tuple[str, ...]]:
    """The GPU of this rank and its attention backends; loads torch only for a driver to ask.

    Without one a CPU may be just what was wanted: only `cuda`, or a container that may hide the
    driver, makes it worth a sentence.
    """
    if device == "cpu":
        return GpuFacts(), ()
    if not driver_in_sight():
        tell = device != AUTO or container_kind(os.environ) == "apptainer"
        return GpuFacts(problem=no_driver_problem(os.environ) if tell else ""), ()
    from mpipipe.data_plane.device import read_gpu

    facts = read_gpu(local_rank)
    if facts.index < 0:
        return facts, ()
    from mpipipe.models.attention.select import available_backends

    return facts, available_backends()
