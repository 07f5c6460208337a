"""How many layers each stage gets: the split whose slowest stage is fastest.

`cost` says what the LM head costs. Costs are in units of one layer unless said otherwise; all
layers cost the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpipipe.errors import PlanError

__all__ = ["check_split", "split_layers", "stage_costs"]


def split_layers(num_layers: int, num_stages: int, *, last_extra: float = 0.0) -> tuple[int, ...]:
    """Contiguous layers per stage, at least one each, minimising the slowest stage.

    `last_extra`: the cost of the last stage beside its layers (LM head). Layers are dealt one by
    one to the stage that is cheapest with it, which is optimal for equal items: whichever layer
    made the slowest stage slowest would have cost no less elsewhere. Ties go to inner stages from
    the front, then to the last, then to the first, which schedules as well.

    Raises:
        PlanError: no layers, no stages, or more stages than layers.
    """
    _check_counts(num_layers, num_stages)
    split = [1] * num_stages
    order = [*range(1, num_stages - 1), num_stages - 1, 0] if num_stages > 1 else [0]
    for _ in range(num_layers - num_stages):
        costs = stage_costs(split, last_extra=last_extra)
        split[min(order, key=lambda stage: costs[stage])] += 1
    return tuple(split)


def stage_costs(split: Sequence[int], *, last_extra: float = 0.0) -> list[float]:
    """The cost of each stage of `split`."""
    return [*map(float, split[:-1]), split[-1] + last_extra]


def check_split(split: Sequence[int], *, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """A split that the user gave, as a tuple.

    Raises:
        PlanError: wrong number of entries, an empty stage, or a wrong sum.
    """
    _check_counts(num_layers, num_stages)
    shown = f"pipeline.split = {list(split)}"
    if len(split) != num_stages:
        raise PlanError(
            f"{shown} has {len(split)} entries for {num_stages} stages (one per rank): give one "
            f"number of layers per stage, or start {len(split)} ranks"
        )
    if min(split) < 1:
        raise PlanError(f"{shown} leaves a stage without layers: every stage needs at least 1")
    if sum(split) != num_layers:
        raise PlanError(
            f"{shown} adds up to {sum(split)} layers, but the model has {num_layers}: "
            "change the entries so that they add up"
        )
    return tuple(split)


def _check_counts(num_layers: int, num_stages: int) -> None:
    if num_layers < 1:
        raise PlanError(
            f"the model has {num_layers} layers, so there is nothing to split: check "
            "num_hidden_layers in its config.json"
        )
    if num_stages < 1:
        raise PlanError(f"{num_stages} stages were asked for: a pipeline has at least 1")
    if num_stages > num_layers:
        raise PlanError(
            f"{num_stages} stages (one per rank) are more than the {num_layers} layers of the "
            f"model, and a stage needs at least one: start at most {num_layers} ranks"
        )
