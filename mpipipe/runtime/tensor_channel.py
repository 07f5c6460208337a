"""The tensor channel that the plan names, and the lanes of a stage. Part of `boot`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.data_plane.lanes import ALONE
from mpipipe.data_plane.loopback import open_loopback_channels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from mpipipe.data_plane.channel import TensorChannel
    from mpipipe.data_plane.lanes import Lanes
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.runtime.ranks import Ranks
    from mpipipe.types import DeviceName, TransportName

__all__ = ["Links", "Transport", "open_links", "open_transport"]

# Making communicators takes seconds; a rank that does not come will not come later either.
_NCCL_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Transport:
    """How tensors travel, and between whom."""

    name: TransportName
    device: DeviceName  # where the tensors are
    hosts: tuple[str, ...]  # by rank
    stage_ranks: tuple[int, ...]  # of this rank's pipeline and lane, in the order of the stages
    lane_groups: tuple[tuple[int, ...], ...] = ()  # ranks that share a stage, of all pipelines


@dataclass(frozen=True, slots=True)
class Links:
    """This rank's ends to the other ranks."""

    channel: TensorChannel  # to other stages
    lanes: Lanes  # within the stage

    def let_go(self) -> None:
        """No thread that computes may wait for other lanes any more. Idempotent."""
        close: Callable[[], None] | None = getattr(self.lanes, "close", None)
        if close is not None:
            close()


async def open_links(
    plans: Sequence[PipelinePlan], hosts: Sequence[str], ranks: Ranks, device: torch.device
) -> Links:
    """Open this rank's end of the plans' transport; all ranks of all replicas call it together.

    Args:
        plans: of all replicas.
        hosts: of each rank.
        ranks: this rank among the others.
        device: where the tensors are.

    Raises:
        EnvironmentSetupError: the transport cannot be set up on some rank.
    """
    rank = ranks.mesh.rank
    plan = next(plan for plan in plans if rank in plan.ranks)
    stage, lane = plan.stage_of_rank(rank), plan.lane_of_rank(rank)
    transport = Transport(
        plan.transport,
        plan.device,
        tuple(hosts),
        stage_ranks=tuple(plan.rank_of(number, lane) for number in range(plan.num_stages)),
        lane_groups=tuple(
            stage.ranks for plan in plans for stage in plan.stages if len(stage.ranks) > 1
        ),
    )
    channel = await open_transport(transport, ranks, device, timeout_s=_NCCL_DEADLINE_S)
    if plan.tensor_parallel == 1:
        return Links(channel, ALONE)
    if plan.transport == "nccl":
        from mpipipe.data_plane.nccl import NcclTensorChannel

        assert isinstance(channel, NcclTensorChannel)
        return Links(channel, channel.lanes)
    from mpipipe.data_plane.mpi import open_mpi_lanes

    return Links(channel, open_mpi_lanes(ranks.engine, stage=stage.rank, lane=lane))


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
            lane_groups=transport.lane_groups,
            device_index=device.index,
            timeout_s=timeout_s,
        )
        return NcclTensorChannel(groups)
    if transport.device == "cuda":
        from mpipipe.data_plane.staged import open_staged_channel

        return open_staged_channel(ranks.engine)
    from mpipipe.data_plane.mpi import open_mpi_channel

    return open_mpi_channel(ranks.engine)
