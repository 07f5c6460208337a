"""What holds a job back most: each resource is made twice as fast, and the job forecast again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mpipipe.planning.cost import Ceilings
from mpipipe.planning.link_table import Link
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.planned_job import Outlook
from mpipipe.planning.rate_times import RateTimes
from mpipipe.planning.step_times import StepTimes

__all__ = ["Bottleneck", "bottleneck_of"]


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The resource that matters most, and the stage that sets the pace."""

    resource: str  # e.g. "memory bandwidth"
    gain: float  # of the tokens per second, were it twice as fast; 0.5: half as much again
    stage: int  # with the least bubble


def bottleneck_of(outlook: Outlook) -> Bottleneck | None:
    """None: the step times come from measurements, which do not say what a step is made of."""
    if not isinstance(outlook.times, RateTimes):
        return None
    now = outlook.forecast.tokens_per_s
    gains = {
        resource: outlook.job.forecast(plan, times).tokens_per_s / now - 1
        for resource, plan, times in _faster(outlook.plan, outlook.times)
    }
    resource = max(gains, key=lambda name: gains[name])
    slowest = min(outlook.forecast.stages, key=lambda stage: stage.bubble)
    return Bottleneck(resource, gains[resource], slowest.stage)


def _faster(plan: PipelinePlan, times: RateTimes) -> Iterator[tuple[str, PipelinePlan, StepTimes]]:
    """Each resource at twice its speed."""
    shares = times.shares
    yield "memory bandwidth", plan, _scaled(times, memory=2)
    yield "arithmetic", plan, _scaled(times, products=2)
    small = replace(
        shares,
        layer_s=shares.layer_s / 2,
        step_s=shares.step_s / 2,
        row_s=shares.row_s / 2,
        prompt_step_s=shares.prompt_step_s / 2,
    )
    yield "small kernels and launches", plan, replace(times, shares=small)
    if len({stage.host for stage in plan.stages}) > 1:
        yield f"link between hosts ({times.far.name})", plan, replace(times, far=_twice(times.far))
    if plan.num_stages > 1:
        yield (
            f"link between stages ({times.near.name})",
            plan,
            replace(times, near=_twice(times.near)),
        )
    if any(stage.offload is not None for stage in plan.stages):
        stages = tuple(map(_brought_faster, plan.stages))
        yield "link to host memory and disk", replace(plan, stages=stages), times


def _scaled(times: RateTimes, *, memory: float = 1, products: float = 1) -> RateTimes:
    scaled = {
        rank: Ceilings(found.bytes_per_s * memory, found.flops_per_s * products, found.source)
        for rank, found in times.ceilings.items()
    }
    return replace(times, ceilings=scaled)


def _twice(link: Link) -> Link:
    return replace(link, bytes_per_s=2 * link.bytes_per_s, latency_s=link.latency_s / 2)


def _brought_faster(stage: StagePlan) -> StagePlan:
    if stage.offload is None:
        return stage
    known = stage.offload.forecast
    faster = replace(
        known, link_s=known.link_s / 2, disk_s=known.disk_s / 2, lookup_s=known.lookup_s / 2
    )
    return replace(stage, offload=replace(stage.offload, forecast=faster))
