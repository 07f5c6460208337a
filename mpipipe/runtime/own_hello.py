"""What a rank says of itself when the ranks greet each other, out of what was read of its host.

In one place, so that `mpipipe plan` plans with what the ranks of a run would say. Needs neither
torch nor MPI. Not here: exchanging greetings (`greeting`), looking at the GPU with torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mpipipe._version import __version__
from mpipipe.control_plane.messages import PROTOCOL_VERSION, Hello
from mpipipe.topology.affinity import allowed_cpus, cpus_near, usable_physical_cores
from mpipipe.topology.host import read_host

if TYPE_CHECKING:
    from mpipipe.topology.gpu import GpuFacts

__all__ = ["own_hello"]


def own_hello(
    rank: int,
    world_size: int,
    *,
    config_hash: str,
    launcher: str,
    gpu: GpuFacts,
    attention_backends: tuple[str, ...],
) -> Hello:
    """The greeting of `rank` on this host, as this process is bound now.

    Args:
        rank: its number.
        world_size: number of ranks.
        config_hash: must be the same on all ranks.
        launcher: what started it (`topology.launcher.Launcher`).
        gpu: that it would use.
        attention_backends: optional ones that it has.
    """
    host = read_host()
    return Hello(
        rank=rank,
        world_size=world_size,
        protocol_version=PROTOCOL_VERSION,
        package_version=__version__,
        config_hash=config_hash,
        host=host.host,
        pid=os.getpid(),
        num_cores=host.usable_cores,
        memory_available_bytes=host.memory_available_bytes,
        launcher=launcher,
        gpu_index=gpu.index,
        gpu_name=gpu.name,
        gpu_uuid=gpu.uuid,
        gpu_capability=gpu.capability,
        gpu_memory_bytes=gpu.memory_bytes,
        gpu_free_bytes=gpu.free_bytes,
        nccl_version=gpu.nccl_version,
        attention_backends=attention_backends,
        gpu_problem=gpu.problem,
        gpu_pci=gpu.pci,
        gpu_cpus=cpus_near(gpu.pci),
        cores=usable_physical_cores(),
        num_allowed_cpus=len(allowed_cpus()),
    )
