"""The ranks greet each other: who they are, what they have, and that all want the same."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from mpipipe.config.load import LoadedConfig, config_hash
from mpipipe.config.schema import AUTO
from mpipipe.control_plane.messages import Hello
from mpipipe.errors import DeadlineError, ProtocolMismatchError
from mpipipe.planning.layout import cores_of_ranks
from mpipipe.runtime.own_hello import own_hello
from mpipipe.runtime.ranks import AgreedError, in_phase
from mpipipe.topology.affinity import move_process
from mpipipe.topology.gpu import (
    GpuFacts,
    container_kind,
    driver_in_sight,
    no_driver_problem,
    told_local_rank,
)
from mpipipe.topology.host import host_name
from mpipipe.topology.launcher import local_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.runtime.ranks import Ranks

__all__ = ["greet", "local_rank_of", "meet", "read_hello"]


async def greet(ranks: Ranks, loaded: LoadedConfig) -> tuple[Hello, ...]:
    """Exchange who we are and what we have; everybody must have the same configuration.

    Then each rank is bound to the cores near its GPU, if it is to be.

    Raises:
        AgreedError: versions, configurations or the number of ranks differ, or ranks are missing.
    """
    pipeline = loaded.config.pipeline
    try:
        hellos = await meet(
            ranks,
            pipeline.device,
            config_hash(loaded.config),
            deadline_s=pipeline.handshake_timeout_s,
        )
    except (ProtocolMismatchError, DeadlineError) as error:
        raise AgreedError(error) from None
    rank = ranks.mesh.rank
    cores = cores_of_ranks(pipeline.bind, hellos)[rank]
    if cores != hellos[rank].cores:
        move_process(cpu for core in cores for cpu in core)
    return hellos


async def meet(
    ranks: Ranks, device: str, config_hash: str = "", *, deadline_s: float
) -> tuple[Hello, ...]:
    """Exchange `read_hello`, in rank order; from then on poll as the cores of this host allow.

    Raises:
        ProtocolMismatchError: versions, configurations or the number of ranks differ.
        DeadlineError: a rank did not come.
    """
    hello = await read_hello(ranks, device, config_hash, deadline_s=deadline_s)
    hellos = await ranks.mesh.handshake(hello, deadline_s)
    _share_host(ranks, hellos)
    return hellos


async def read_hello(
    ranks: Ranks, device: str, config_hash: str = "", *, deadline_s: float
) -> Hello:
    """Who this rank is and what it has. Collective, as the ranks of a host count themselves.

    Args:
        ranks: joined.
        device: `pipeline.device`; torch is loaded to look at a GPU only where one may be wanted.
        config_hash: must be the same on all ranks.
        deadline_s: for the others to come.

    Raises:
        AgreedError: a rank did not come, or was told to stop.
        DeadlineError: a rank did not come.
    """
    local_rank = await local_rank_of(ranks, deadline_s)
    # A phase: torch takes seconds to import where there is a GPU to look at.
    gpu, backends = await in_phase(
        ranks, "devices", lambda: _read_gpu(device, local_rank), deadline_s
    )
    return own_hello(
        ranks.mesh.rank,
        ranks.mesh.world_size,
        config_hash=config_hash,
        launcher=ranks.info.launcher.value,
        gpu=gpu,
        attention_backends=backends,
    )


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


def _share_host(ranks: Ranks, hellos: Sequence[Hello]) -> None:
    """Let the ranks of this host poll less eagerly where they have fewer cores than they are."""
    host = hellos[ranks.mesh.rank].host
    local = [greeting for greeting in hellos if greeting.host == host]
    if any(greeting.num_cores < sum(map(len, greeting.cores)) for greeting in local):
        num_cores = local[0].num_cores  # a CPU quota, for all of them
    else:
        cpus = {cpu for greeting in local for core in greeting.cores for cpu in core}
        num_cores = len(cpus) or local[0].num_cores
    ranks.engine.share_cores(num_ranks=len(local), num_cores=num_cores)


def _read_gpu(device: str, local_rank: int) -> tuple[GpuFacts, tuple[str, ...]]:
    """The GPU of this rank and its attention backends; loads torch only for a driver to ask.

    Without one a CPU may be just what was wanted: only `cuda`, or a container that may hide the
    driver, makes it worth a word.
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
