"""What holds a job back most: each resource is made twice as fast, and the job forecast again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mpipipe.planning.cost import Ceilings
from mpipipe.planning.link_table import Link
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.planned_job import Outlook
from mpipipe.planning.rate_times import RateTimes

__all__ = ["Bottleneck", "bottleneck_of"]

_SpeedUp = Callable[[PipelinePlan, RateTimes], tuple[PipelinePlan, RateTimes]]


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The resource that matters most, and the stage that sets the pace."""

    resource: str  # e.g. "memory bandwidth"
    gain: float  # of the tokens per second, were it twice as fast; 0.5: half as much again
    stage: int  # with the least bubble


def bottleneck_of(outlook: Outlook) -> Bottleneck | None:
    """None: the step times come from measurements, which do not say what a step is made of."""
    times = [each for each in outlook.times if isinstance(each, RateTimes)]
    if len(times) < len(outlook.times):
        return None
    now = outlook.forecast.tokens_per_s
    gains = {}
    for resource, faster in _speed_ups(outlook.plan, times[0]).items():
        changed = [faster(plan, own) for plan, own in zip(outlook.plans, times, strict=True)]
        plans, sped_up = zip(*changed, strict=True)
        gains[resource] = outlook.job.forecast(plans, sped_up).tokens_per_s / now - 1
    resource = max(gains, key=lambda name: gains[name])
    slowest = min(outlook.forecast.stages, key=lambda stage: stage.bubble)
    return Bottleneck(resource, gains[resource], slowest.stage)


def _speed_ups(plan: PipelinePlan, times: RateTimes) -> dict[str, _SpeedUp]:
    """By resource of a pipeline like this one: the pipeline with it twice as fast."""
    found: dict[str, _SpeedUp] = {
        "memory bandwidth": lambda plan, times: (plan, _scaled(times, memory=2)),
        "arithmetic": lambda plan, times: (plan, _scaled(times, products=2)),
        "small kernels and launches": lambda plan, times: (plan, _launched_faster(times)),
    }
    if len({stage.host for stage in plan.stages}) > 1:
        name = f"link between hosts ({times.far.name})"
        found[name] = lambda plan, times: (plan, replace(times, far=_twice(times.far)))
    if plan.num_stages > 1:
        name = f"link between stages of a host ({times.near.name})"
        found[name] = lambda plan, times: (plan, replace(times, near=_twice(times.near)))
    if any(stage.offload is not None for stage in plan.stages):
        name = "link to host memory and disk"
        found[name] = lambda plan, times: (_brought_faster(plan), times)
    return found


def _launched_faster(times: RateTimes) -> RateTimes:
    shares = times.shares
    faster = replace(
        shares,
        layer_s=shares.layer_s / 2,
        step_s=shares.step_s / 2,
        row_s=shares.row_s / 2,
        prompt_step_s=shares.prompt_step_s / 2,
    )
    return replace(times, shares=faster)


def _scaled(times: RateTimes, *, memory: float = 1, products: float = 1) -> RateTimes:
    scaled = {
        rank: Ceilings(found.bytes_per_s * memory, found.flops_per_s * products, found.source)
        for rank, found in times.ceilings.items()
    }
    return replace(times, ceilings=scaled)


def _twice(link: Link) -> Link:
    return replace(link, bytes_per_s=2 * link.bytes_per_s, latency_s=link.latency_s / 2)


def _brought_faster(plan: PipelinePlan) -> PipelinePlan:
    return replace(plan, stages=tuple(map(_stage_brought_faster, plan.stages)))


def _stage_brought_faster(stage: StagePlan) -> StagePlan:
    if stage.offload is None:
        return stage
    known = stage.offload.forecast
    faster = replace(
        known, link_s=known.link_s / 2, disk_s=known.disk_s / 2, lookup_s=known.lookup_s / 2
    )
    return replace(stage, offload=replace(stage.offload, forecast=faster))
