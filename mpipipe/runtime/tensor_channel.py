"""The tensor channel that the plan names. Part of `boot`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.data_plane.loopback import open_loopback_channels

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mpipipe.data_plane.channel import TensorChannel
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.runtime.ranks import Ranks
    from mpipipe.types import DeviceName, TransportName

__all__ = ["Transport", "open_channel", "open_transport"]

# Making communicators takes seconds; a rank that does not come will not come later either.
_NCCL_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Transport:
    """How tensors travel, and between whom."""

    name: TransportName
    device: DeviceName  # where the tensors are
    hosts: tuple[str, ...]  # by rank
    stage_ranks: tuple[int, ...]  # of this rank's pipeline, in the order of its stages


async def open_channel(
    plan: PipelinePlan, hosts: Sequence[str], ranks: Ranks, device: torch.device
) -> TensorChannel:
    """Open this rank's end of the plan's transport; all ranks of all replicas call it together.

    `hosts`: of each rank.

    Raises:
        EnvironmentSetupError: the transport cannot be set up on some rank.
    """
    transport = Transport(plan.transport, plan.device, tuple(hosts), plan.ranks)
    return await open_transport(transport, ranks, device, timeout_s=_NCCL_DEADLINE_S)


async def open_transport(
    transport: Transport, ranks: Ranks, device: torch.device, *, timeout_s: float
) -> TensorChannel:
    """Open this rank's end; all ranks call it together. `timeout_s` is for NCCL to connect.

    Raises:
        EnvironmentSetupError: the transport cannot be set up on some rank.
        DeadlineError: NCCL did not connect in time.
    """
    if transport.name == "loopback":
        return open_loopback_channels(1)[0]
    if transport.name == "nccl":
        from mpipipe.data_plane.nccl import NcclTensorChannel
        from mpipipe.data_plane.nccl_groups import connect_groups

        async def broadcast(payload: bytes | None) -> bytes:
            return await ranks.mesh.broadcast("nccl", payload, timeout_s)

        groups = await connect_groups(
            broadcast,
            rank=ranks.mesh.rank,
            hosts=transport.hosts,
            stage_ranks=transport.stage_ranks,
            device_index=device.index,
            timeout_s=timeout_s,
        )
        return NcclTensorChannel(groups)
    if transport.device == "cuda":
        from mpipipe.data_plane.staged import open_staged_channel

        return open_staged_channel(ranks.engine)
    from mpipipe.data_plane.mpi import open_mpi_channel

    return open_mpi_channel(ranks.engine)
