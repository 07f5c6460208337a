"""The tensor channel that the plan names. Part of `boot`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpipipe.data_plane.loopback import open_loopback_channels

if TYPE_CHECKING:
    import torch

    from mpipipe.data_plane.channel import TensorChannel
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.runtime.launch import Ranks

__all__ = ["open_channel"]

# Making communicators takes seconds; a rank that does not come will not come later either.
_NCCL_DEADLINE_S = 120.0


async def open_channel(plan: PipelinePlan, ranks: Ranks, device: torch.device) -> TensorChannel:
    """Open this rank's end of the transport; all ranks call it together.

    Raises:
        EnvironmentSetupError: the transport cannot be set up on some rank.
    """
    if plan.transport == "loopback":
        return open_loopback_channels(1)[0]
    if plan.transport == "nccl":
        from mpipipe.data_plane.nccl import open_nccl_channel

        async def broadcast(payload: bytes | None) -> bytes:
            return await ranks.mesh.broadcast("nccl", payload, _NCCL_DEADLINE_S)

        return await open_nccl_channel(
            broadcast,
            rank=ranks.mesh.rank,
            hosts=[stage.host for stage in plan.stages],
            device_index=device.index,
            timeout_s=_NCCL_DEADLINE_S,
        )
    if plan.device == "cuda":
        from mpipipe.data_plane.staged import open_staged_channel

        return open_staged_channel(ranks.engine)
    from mpipipe.data_plane.mpi import open_mpi_channel

    return open_mpi_channel(ranks.engine)
