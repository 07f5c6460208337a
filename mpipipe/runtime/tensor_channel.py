"""The tensor channel that the plan names. Part of `boot`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.data_plane.loopback import open_loopback_channels

if TYPE_CHECKING:
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
    stage_ranks: tuple[int, ...]  # ranks in the order of their stages


async def open_channel(plan: PipelinePlan, ranks: Ranks, device: torch.device) -> TensorChannel:
    """Open this rank's end of the plan's transport; all ranks call it together.

    Raises:
        EnvironmentSetupError: the transport cannot be set up on some rank.
    """
    hosts = tuple(stage.host for stage in sorted(plan.stages, key=lambda stage: stage.rank))
    stage_ranks = tuple(stage.rank for stage in plan.stages)
    transport = Transport(plan.transport, plan.device, hosts, stage_ranks)
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
