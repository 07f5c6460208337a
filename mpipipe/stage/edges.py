"""The first transfers of a stage: one small tensor over every edge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mpipipe.data_plane.channel import EdgeKind

if TYPE_CHECKING:
    from mpipipe.data_plane.channel import TensorChannel, Transfer
    from mpipipe.planning.plan import PipelinePlan, StagePlan

__all__ = ["exercise_edges"]


async def exercise_edges(
    plan: PipelinePlan, stage: StagePlan, lane: int, channel: TensorChannel, device: torch.device
) -> None:
    """Hidden states down the pipe, ids from its end to its begin; all ranks call it together.

    In the order of a step, because a receive keeps a GPU's stream until its data is there.
    """
    is_first, is_last = stage.has_embedding, stage.has_head
    dtype = getattr(torch, plan.dtype)
    hidden_TH = torch.zeros(1, plan.hidden_size, dtype=dtype, device=device)
    ids_S = torch.zeros(1, dtype=torch.int64, device=device)
    sends: list[Transfer] = []
    if not is_first:
        source = plan.rank_of(stage.stage - 1, lane)
        await channel.receive(hidden_TH, source=source, kind=EdgeKind.HIDDEN).wait()
    if not is_last:
        destination = plan.rank_of(stage.stage + 1, lane)
        sends.append(channel.send(hidden_TH, destination=destination, kind=EdgeKind.HIDDEN))
    if is_last and not is_first:
        sends.append(channel.send(ids_S, destination=plan.rank_of(0, lane), kind=EdgeKind.IDS))
    if is_first and not is_last:
        await channel.receive(ids_S, source=plan.rank_of(-1, lane), kind=EdgeKind.IDS).wait()
    for send in sends:
        await send.wait()
