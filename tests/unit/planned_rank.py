"""What a rank tells the planner of itself, with one default: a host without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpipipe.planning.resources import RankResources

GIB = 2**30


def make_rank(rank: int, host: str = "node1", **fields: Any) -> RankResources:
    """Rank number `rank`; `fields` as those of `RankResources`."""
    defaults = {"num_cores": 8, "memory_available_bytes": 16 * GIB}
    return RankResources(rank, host, 100 + rank, "none", **(defaults | fields))


def with_gpu(rank: RankResources, **fields: Any) -> RankResources:
    """The same rank with other `fields` of its GPU."""
    return replace(rank, gpu=replace(rank.gpu, **fields))
