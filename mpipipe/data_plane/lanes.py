"""The contract between the lanes of a stage: sums and pieces that all of them need.

Under tensor parallelism the ranks of a stage, its *lanes*, each compute with a part of every
layer's weights. Every lane calls the same operations in the same order; each returns when the
caller may use its result, on a GPU in the order of the current stream. All lanes get equal bits.

`mpi` and `nccl_lanes` go between ranks; tests have threads of one process.
"""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["ALONE", "Lanes", "joined_columns"]


class Lanes(Protocol):
    """One lane's end."""

    lane: int
    num_lanes: int

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all lanes' `partial`, which is contiguous and may be overwritten.

        Raises:
            ChannelClosedError: the group was closed meanwhile.
        """
        ...

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """All lanes' `part` [..., n], side by side: [..., n * num_lanes]. Raises as `add_up`."""
        ...

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lane 0's `tensor`, which other lanes' may be overwritten with. Raises as `add_up`."""
        ...


class _Alone:
    """The only lane of its stage."""

    lane = 0
    num_lanes = 1

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


ALONE: Lanes = _Alone()


def joined_columns(parts: torch.Tensor) -> torch.Tensor:
    """Lanes' parts [lanes, ..., n] side by side: [..., lanes * n]."""
    return parts.movedim(0, -2).flatten(-2)
