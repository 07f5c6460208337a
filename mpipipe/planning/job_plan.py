"""The plan of a job: as `resolve` makes it, with the split by which this job is to end first.

`resolve` balances costs in one kind of step. Where the lengths of the requests are known, splits
near that one are planned as well, each with the KV pages that it leaves, and the whole job is
forecast with each: prompts and tokens weigh as much as the job has of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import AUTO, Config
from mpipipe.errors import PlanError
from mpipipe.planning.forecast import JobForecast, forecast_job
from mpipipe.planning.known_times import KnownTimes, known_times
from mpipipe.planning.plan import PipelinePlan, Resolved
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.resources import RankResources
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.split_search import search_split
from mpipipe.planning.workload import Workload

__all__ = ["plan_job"]

_Find = Callable[[ModelSpec, PipelinePlan, Sequence[RankResources]], KnownTimes]
_UNKNOWN = Workload()


def plan_job(
    config: Config,
    spec: ModelSpec,
    ranks: Sequence[RankResources],
    model_path: str,
    workload: Workload = _UNKNOWN,
    *,
    notes: Sequence[Resolved] = (),
    times: _Find = known_times,
) -> PipelinePlan:
    """As `resolve.make_plan`; `times` tells the step times of a plan.

    Raises:
        EnvironmentSetupError: as `make_plan`.
        PlanError: as `make_plan`.
    """

    def make(split: tuple[int, ...] | None = None, *more: Resolved) -> PipelinePlan:
        pipeline = config.pipeline if split is None else replace(config.pipeline, split=split)
        made = replace(config, pipeline=pipeline)
        return make_plan(made, spec, ranks, model_path, workload, notes=(*notes, *more))

    plan = make()
    if not workload.lengths:
        return plan
    known = times(spec, plan, ranks)
    shape = JobShape.of(workload.lengths)
    first = best = tuple(stage.num_layers for stage in plan.stages)
    forecasts = {first: forecast_job(spec, plan, shape, known.steps)}

    def job_s(split: tuple[int, ...]) -> float:
        if split not in forecasts:
            try:
                forecasts[split] = forecast_job(spec, make(split), shape, known.steps)
            except PlanError:
                return math.inf
        return forecasts[split].generating_s

    if config.pipeline.split == AUTO and not _is_offloaded(plan):
        kinds = [(stage.host, ranks[stage.rank].gpu.name) for stage in plan.stages]
        best = search_split(first, job_s, kinds)
    if best != first:
        reason = _reason(forecasts[best], forecasts[first], first)
        plan = make(best, Resolved("pipeline.split", str(list(best)), reason))
    return _with_shares(plan, forecasts[best], known)


def _is_offloaded(plan: PipelinePlan) -> bool:
    """Such a split was found with what is brought to the devices (`offload_search`)."""
    return any(stage.offload is not None for stage in plan.stages)


def _reason(best: JobForecast, first: JobForecast, split: Sequence[int]) -> str:
    return (
        f"the job is predicted to take {best.generating_s:,.3g} s, with {list(split)}, balanced by "
        f"cost, {first.generating_s:,.3g} s"
    )


def _with_shares(plan: PipelinePlan, forecast: JobForecast, known: KnownTimes) -> PipelinePlan:
    """Every stage with its share of the work of this job; whose times were measured is noted."""
    busy_s = [stage.prefill_busy_s + stage.decode_busy_s for stage in forecast.stages]
    stages = tuple(
        replace(stage, cost_share=round(seconds / sum(busy_s), 6))
        for stage, seconds in zip(plan.stages, busy_s, strict=True)
    )
    note = Resolved("forecast.times", known.steps.source, ", ".join(known.files))
    return replace(plan, stages=stages, resolved=(*plan.resolved, *([note] * bool(known.files))))
