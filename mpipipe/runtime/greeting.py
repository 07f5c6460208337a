"""The ranks greet each other: who they are, what they have, and that all want the same."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mpipipe._version import __version__
from mpipipe.config.load import LoadedConfig, config_hash
from mpipipe.control_plane.messages import PROTOCOL_VERSION, Hello
from mpipipe.errors import DeadlineError, ProtocolMismatchError
from mpipipe.runtime.launch import AgreedError
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
    )
    deadline_s = loaded.config.pipeline.handshake_timeout_s
    try:
        hellos = await ranks.mesh.handshake(hello, deadline_s)
    except (ProtocolMismatchError, DeadlineError) as error:
        raise AgreedError(error) from None
    local = [greeting for greeting in hellos if greeting.host == host.host]
    ranks.engine.share_cores(num_ranks=len(local), num_cores=host.usable_cores)
    return hellos
