"""The plans of a job: as `resolve` makes them, with the split by which this job is to end first.

`resolve` balances costs in one kind of step. Where the lengths of the requests are known, splits
near that one are planned as well, each with the KV pages that it leaves, and the whole job is
forecast with each: prompts and tokens weigh as much as the job has of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import AUTO, Config
from mpipipe.errors import PlanError
from mpipipe.planning.forecast import JobForecast
from mpipipe.planning.known_times import KnownTimes, known_times
from mpipipe.planning.layout import Layout
from mpipipe.planning.plan import PipelinePlan, Resolved
from mpipipe.planning.replica_forecast import forecast_replicas
from mpipipe.planning.resolve import choose_layout, make_plans
from mpipipe.planning.resources import RankResources
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.split_search import search_split, split_by_speed
from mpipipe.planning.workload import Workload

__all__ = ["plan_job"]

_Find = Callable[[ModelSpec, PipelinePlan, Sequence[RankResources]], KnownTimes]
_Split = tuple[int, ...]
_UNKNOWN = Workload()


def plan_job(
    config: Config,
    spec: ModelSpec,
    ranks: Sequence[RankResources],
    model_path: str,
    workload: Workload = _UNKNOWN,
    *,
    notes: Sequence[Resolved] = (),
    layout: Layout | None = None,
    times: _Find = known_times,
) -> tuple[PipelinePlan, ...]:
    """As `resolve.make_plans`; `times` tells the step times of a replica's plan.

    Raises:
        EnvironmentSetupError: as `make_plans`.
        PlanError: as `make_plans`.
    """
    layout = layout or choose_layout(config, spec, ranks, workload)
    job = _Job(config, spec, ranks, model_path, workload, tuple(notes), layout)
    plans = job.plans()
    if not workload.lengths:
        return plans
    known = [times(spec, plan, ranks) for plan in plans]
    steps, shape = (
        [each.steps for each in known],
        JobShape.of(workload.lengths, workload.shared_ratio),
    )
    first = best = _split(plans[0])
    forecasts = {first: forecast_replicas(spec, plans, shape, steps)}

    def job_s(split: _Split) -> float:
        if split not in forecasts:
            try:
                forecasts[split] = forecast_replicas(spec, job.plans(split), shape, steps)
            except PlanError:
                return math.inf
        return forecasts[split].generating_s

    if config.pipeline.split == AUTO and _is_alike(plans):
        kinds = [(stage.host, ranks[stage.rank].gpu.name) for stage in plans[0].stages]
        starts = _by_speed(forecasts[first], plans[0], ranks)
        best = search_split(first, job_s, kinds, starts)
    if best != first:
        reason = _reason(forecasts[best], forecasts[first], first)
        plans = job.plans(best, Resolved("pipeline.split", str(list(best)), reason))
    return tuple(
        _with_shares(plan, forecasts[best], own) for plan, own in zip(plans, known, strict=True)
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """What is planned again and again, with other splits."""

    config: Config
    spec: ModelSpec
    ranks: Sequence[RankResources]
    model_path: str
    workload: Workload
    notes: tuple[Resolved, ...]
    layout: Layout

    def plans(self, split: _Split | None = None, *more: Resolved) -> tuple[PipelinePlan, ...]:
        """With `split` in all replicas; `more`: what was decided of it."""
        pipeline = self.config.pipeline
        config = replace(self.config, pipeline=replace(pipeline, split=split or pipeline.split))
        return make_plans(
            config,
            self.spec,
            self.ranks,
            self.model_path,
            self.workload,
            notes=(*self.notes, *more),
            layout=self.layout,
        )


def _split(plan: PipelinePlan) -> _Split:
    return tuple(stage.num_layers for stage in plan.stages)


def _by_speed(
    forecast: JobForecast, plan: PipelinePlan, ranks: Sequence[RankResources]
) -> list[_Split]:
    """For unlike GPUs the split by what a layer took on each in the forecast; else none."""
    if len({ranks[stage.rank].gpu.name for stage in plan.stages}) == 1:
        return []
    busy_s = [each.prefill_busy_s + each.decode_busy_s for each in forecast.stages]
    speeds = [stage.num_layers / busy_s[stage.stage] for stage in plan.stages]
    return [split_by_speed(plan.num_layers, speeds)]


def _is_alike(plans: Sequence[PipelinePlan]) -> bool:
    """Whether one split suits all replicas, and none was found with what is offloaded."""
    offloaded = any(stage.offload is not None for plan in plans for stage in plan.stages)
    return len(set(map(_split, plans))) == 1 and not offloaded


def _reason(best: JobForecast, first: JobForecast, split: Sequence[int]) -> str:
    return (
        f"the job is predicted to take {best.generating_s:,.3g} s, with {list(split)}, balanced by "
        f"cost, {first.generating_s:,.3g} s"
    )


def _with_shares(plan: PipelinePlan, forecast: JobForecast, known: KnownTimes) -> PipelinePlan:
    """Every stage with its share of the work of this job; whose times were measured is noted."""
    busy_s = {stage.rank: stage.prefill_busy_s + stage.decode_busy_s for stage in forecast.stages}
    total_s = sum(busy_s[stage.rank] for stage in plan.stages)
    stages = tuple(
        replace(stage, cost_share=round(busy_s[stage.rank] / total_s, 6)) for stage in plan.stages
    )
    note = Resolved("forecast.times", known.steps.source, ", ".join(known.files))
    return replace(plan, stages=stages, resolved=(*plan.resolved, *([note] * bool(known.files))))
