"""The ranks greet each other: who they are, what they have, and that all want the same."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mpipipe._version import __version__
from mpipipe.config.load import LoadedConfig, config_hash
from mpipipe.config.schema import AUTO
from mpipipe.control_plane.messages import PROTOCOL_VERSION, Hello
from mpipipe.errors import DeadlineError, ProtocolMismatchError
from mpipipe.runtime.launch import AgreedError
from mpipipe.topology.gpu import (
    GpuFacts,
    container_kind,
    driver_in_sight,
    local_rank,
    no_driver_problem,
)
from mpipipe.topology.host import read_host

if TYPE_CHECKING:
    from mpipipe.runtime.launch import Ranks

__all__ = ["greet"]


async def greet(ranks: Ranks, loaded: LoadedConfig) -> tuple[Hello, ...]:
    """Exchange who we are and what we have; everybody must have the same configuration.

    Raises:
        AgreedError: versions, configurations or the number of ranks differ, or ranks are missing.
    """
    host = read_host()
    gpu, backends = _read_gpu(loaded.config.pipeline.device, ranks.mesh.rank)
    hello = Hello(
        rank=ranks.mesh.rank,
        world_size=ranks.mesh.world_size,
        protocol_version=PROTOCOL_VERSION,
        package_version=__version__,
        config_hash=config_hash(loaded.config),
        host=host.host,
        pid=os.getpid(),
        num_cores=host.usable_cores,
        memory_available_bytes=host.memory_available_bytes,
        launcher=ranks.info.launcher.value,
        gpu_index=gpu.index,
        gpu_name=gpu.name,
        gpu_uuid=gpu.uuid,
        gpu_capability=gpu.capability,
        gpu_memory_bytes=gpu.memory_bytes,
        gpu_free_bytes=gpu.free_bytes,
        nccl_version=gpu.nccl_version,
        attention_backends=backends,
        gpu_problem=gpu.problem,
    )
    deadline_s = loaded.config.pipeline.handshake_timeout_s
    try:
        hellos = await ranks.mesh.handshake(hello, deadline_s)
    except (ProtocolMismatchError, DeadlineError) as error:
        raise AgreedError(error) from None
    local = [greeting for greeting in hellos if greeting.host == host.host]
    ranks.engine.share_cores(num_ranks=len(local), num_cores=host.usable_cores)
    return hellos


def _read_gpu(device: str, rank: int) -> tuple[GpuFacts, tuple[str, ...]]:
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

    facts = read_gpu(local_rank(os.environ, rank))
    if facts.index < 0:
        return facts, ()
    from mpipipe.models.attention.probe import available_backends

    return facts, available_backends()
