"""Sums and pieces between the lanes of a stage: NCCL through torch.distributed, in stream order.

Small sums go through memory that the lanes' GPUs share (`shared_buffer`), where they can.

Everything is added to the current stream and may be captured in a CUDA graph, which must be given
up before NCCL's groups are left (`Stream.release_captured`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from mpipipe.data_plane.lanes import joined_columns
from mpipipe.data_plane.nccl_groups import first_line
from mpipipe.errors import PeerLostError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from mpipipe.data_plane.shared_buffer import SharedBuffer

__all__ = ["NcclLanes"]


class NcclLanes:
    """One lane's end; see `Lanes`.

    Args:
        group: of the stage's lanes, in their order.
        shared: for small sums; None: there is no such memory.
    """

    def __init__(self, group: ProcessGroup, shared: SharedBuffer | None = None) -> None:
        self.lane = group.rank()
        self.num_lanes = group.size()
        self._group = group
        self._shared = shared

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        """See `Lanes.add_up`."""
        if self._shared is not None and self._shared.takes(partial):
            return self._shared.sum_of(partial)
        try:
            dist.all_reduce(partial, group=self._group)
        except (dist.DistError, RuntimeError) as error:
            raise _lost_lane(error) from error
        return partial

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """See `Lanes.gather`."""
        gathered = part.new_empty(self.num_lanes, *part.shape)
        if part.numel():
            try:
                dist.all_gather_into_tensor(gathered, part, group=self._group)
            except (dist.DistError, RuntimeError) as error:
                raise _lost_lane(error) from error
        return joined_columns(gathered)

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Lanes.from_first`."""
        try:
            dist.broadcast(tensor, group=self._group, group_src=0)
        except (dist.DistError, RuntimeError) as error:
            raise _lost_lane(error) from error
        return tensor


def _lost_lane(error: Exception) -> PeerLostError:
    return PeerLostError(
        f"NCCL failed between the ranks of a stage ({first_line(error)}); most likely one of them "
        "died: look for the first error in the logs"
    )
