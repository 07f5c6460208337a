"""Lanes: the ranks that share a stage under tensor parallelism. Which they are, what each holds.

Pure. `models/tensor_split.py` cuts the tensors; families of which it is known that their layers
cannot be cut are refused here already (`checkpoint/families.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from mpipipe.checkpoint.families import refuse_split
from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.errors import PlanError
from mpipipe.planning.resources import RankResources
from mpipipe.types import DeviceName

__all__ = ["check_transport", "lane_groups", "lane_spec"]


def lane_spec(spec: ModelSpec, num_lanes: int) -> ModelSpec:
    """The shapes of what one lane computes with: heads, inner channels and vocabulary divided.

    The embedding is whole on every lane; the LM head too where its rows cannot be divided.

    Raises:
        PlanError: heads or channels cannot be divided by `num_lanes`.
        UnsupportedModelError: the model has experts, or is of a family whose layers cannot be cut.
    """
    if num_lanes == 1:
        return spec
    if spec.num_experts > 1:
        raise refuse_split(spec.model_type, f"it has {spec.num_experts} experts a layer")
    if spec.split_refusal:
        raise refuse_split(spec.model_type, spec.split_refusal)
    sizes = {
        "attention heads": spec.num_heads,
        "key/value heads": spec.num_kv_heads,
        "channels between the matrices of its MLP": spec.intermediate_size,
    }
    for what, size in sizes.items():
        if size % num_lanes:
            raise PlanError(
                f"pipeline.tensor_parallel = {num_lanes} does not divide the model's {size} "
                f"{what}: set it to {_choices(sizes.values())}, and use the other ranks as stages"
            )
    divides_head = spec.vocab_size % num_lanes == 0
    return replace(
        spec,
        num_heads=spec.num_heads // num_lanes,
        num_kv_heads=spec.num_kv_heads // num_lanes,
        intermediate_size=spec.intermediate_size // num_lanes,
        head_rows=spec.vocab_size // num_lanes if divides_head else 0,
    )


def _choices(sizes: Collection[int]) -> str:
    """The numbers of lanes that are possible, in words."""
    found = [str(n) for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes)]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def lane_groups(ranks: Sequence[RankResources], num_lanes: int) -> list[tuple[RankResources, ...]]:
    """The lanes of each stage, from the ranks in the order of stages.

    Raises:
        PlanError: lanes of a stage would be on different hosts.
    """
    groups = [tuple(ranks[first : first + num_lanes]) for first in range(0, len(ranks), num_lanes)]
    for group in groups:
        apart = next((rank for rank in group if rank.host != group[0].host), None)
        if apart is not None:
            raise PlanError(
                f"ranks {group[0].rank} on {group[0].host} and {apart.rank} on {apart.host} would "
                f"share a stage, whose lanes add up after every matrix and must be on one host: "
                f"start a multiple of pipeline.tensor_parallel = {num_lanes} ranks on every host"
            )
    return groups


def check_transport(transport: str, device: DeviceName, num_lanes: int) -> None:
    """Refuse lanes on GPUs that NCCL does not join.

    Raises:
        PlanError: they would add up through host memory.
    """
    if num_lanes > 1 and device == "cuda" and transport != "nccl":
        raise PlanError(
            f"pipeline.tensor_parallel = {num_lanes} on GPUs needs NCCL, but tensors travel over "
            f'"{transport}": give each rank a GPU of its own and leave pipeline.transport at '
            '"auto", or set pipeline.tensor_parallel = 1'
        )
