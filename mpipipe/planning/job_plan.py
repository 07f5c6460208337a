"""The plans of a job: as `resolve` makes them, with the split by which this job is to end first.

`resolve` balances costs in one kind of step. Where the lengths of the requests are known, splits
near that one are planned as well, each with the KV pages that it leaves, and the whole job is
forecast with each: prompts and tokens weigh as much as the job has of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import AUTO, Config
from mpipipe.errors import PlanError
from mpipipe.planning.drafts import with_drafts
from mpipipe.planning.forecast import JobForecast
from mpipipe.planning.known_times import KnownTimes, known_times
from mpipipe.planning.layout import Layout
from mpipipe.planning.offload_advice import offload_cost
from mpipipe.planning.plan import PipelinePlan, Resolved, StagePlan
from mpipipe.planning.replica_forecast import forecast_replicas
from mpipipe.planning.resolve import Job
from mpipipe.planning.resources import RankResources
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.split_search import search_split, split_by_speed
from mpipipe.planning.step_times import StepTimes
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
    job = Job.of(config, spec, ranks, model_path, workload, notes=notes)
    layout = layout or job.choose_layout()
    plans = job.plans(layout)
    known = [times(spec, plan, ranks) for plan in plans]
    if not workload.lengths:
        return _with_drafts(plans, config, spec, known)
    steps, shape = [each.steps for each in known], _shape(workload)
    first = best = _split(plans[0])
    forecasts = {first: forecast_replicas(spec, plans, shape, steps)}

    def job_s(split: _Split) -> float:
        if split not in forecasts:
            try:
                tried = job.with_split(split).plans(layout)
            except PlanError:
                return math.inf
            forecasts[split] = forecast_replicas(spec, tried, shape, steps)
        return forecasts[split].generating_s

    if config.pipeline.split == AUTO and _is_alike(plans):
        kinds = [(stage.host, ranks[stage.rank].gpu.name) for stage in plans[0].stages]
        starts = _by_speed(forecasts[first], plans[0], ranks)
        best = search_split(first, job_s, kinds, starts)
    if best != first:
        note = _note(best, forecasts[best], forecasts[first], first)
        plans = job.with_split(best, note).plans(layout)
    shared = (_with_shares(plan, forecasts[best]) for plan in plans)
    context = itertools.repeat(shape.mean_context_tokens)
    return _with_drafts([*map(_as_measured, shared, known, context)], config, spec, known)


def _shape(workload: Workload) -> JobShape:
    return JobShape.of(workload.lengths, workload.shared_ratio)


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


def _note(best: _Split, faster: JobForecast, slower: JobForecast, split: _Split) -> Resolved:
    """`best`, which is `faster`, in the place of `split`."""
    reason = (
        f"the job is predicted to take {faster.generating_s:,.3g} s, with {list(split)}, balanced "
        f"by cost, {slower.generating_s:,.3g} s"
    )
    return Resolved("pipeline.split", str(list(best)), reason)


def _with_drafts(
    plans: Sequence[PipelinePlan], config: Config, spec: ModelSpec, known: Sequence[KnownTimes]
) -> tuple[PipelinePlan, ...]:
    return tuple(
        with_drafts(plan, config, spec, own.steps) for plan, own in zip(plans, known, strict=True)
    )


def _with_shares(plan: PipelinePlan, forecast: JobForecast) -> PipelinePlan:
    """Every stage with its share of the work of this job."""
    busy_s = {stage.rank: stage.prefill_busy_s + stage.decode_busy_s for stage in forecast.stages}
    total_s = sum(busy_s[stage.rank] for stage in plan.stages)
    stages = tuple(
        replace(stage, cost_share=round(busy_s[stage.rank] / total_s, 6)) for stage in plan.stages
    )
    return replace(plan, stages=stages)


def _as_measured(plan: PipelinePlan, known: KnownTimes, context_tokens: float) -> PipelinePlan:
    """Notes whose times were measured; what is said of offload goes by them, as forecasts do."""
    if not known.files:
        return plan
    source = Resolved("forecast.times", known.steps.source, ", ".join(known.files))
    notes = (*plan.resolved, source)
    stages = tuple(_measured(stage, known.steps, context_tokens) for stage in plan.stages)
    offloaded = [stage.offload.forecast for stage in stages if stage.offload is not None]
    if offloaded:
        cost = offload_cost(offloaded)
        notes = tuple(
            replace(note, value=cost) if note.setting == "memory.offload" else note
            for note in notes
        )
    return replace(plan, stages=stages, resolved=notes)


def _measured(stage: StagePlan, steps: StepTimes, context_tokens: float) -> StagePlan:
    """The compute of a full step beside what is brought for it."""
    if stage.offload is None:
        return stage
    forecast, alone = stage.offload.forecast, replace(stage, offload=None, kv_in_host=None)
    compute_s = steps.decode_s(alone, forecast.rows, context_tokens)
    offload = replace(stage.offload, forecast=replace(forecast, compute_s=compute_s))
    return replace(stage, offload=offload)
