"""What a job will take on several replicas: each is forecast with its share of the prompts. Pure.

Rank 0 hands prompts out on demand, so a replica gets them by its speed, and all end together but
for the last sequences of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.forecast import JobForecast, forecast_job
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.step_times import StepTimes

__all__ = ["forecast_replicas"]

_PROBE_ROWS, _PROBE_TOKENS = 8, 512  # of the steps by which replicas are told to be alike


def forecast_replicas(
    spec: ModelSpec,
    plans: Sequence[PipelinePlan],
    shape: JobShape,
    times: Sequence[StepTimes],
    *,
    watts: Mapping[int, float] | None = None,
) -> JobForecast:
    """As `forecast_job`, of all replicas together; its stages are those of one after the other.

    Args:
        spec: of the model.
        plans: of every replica.
        shape: how much there is to do.
        times: of the steps of each replica.
        watts: the power limit of every rank's GPU, where known.
    """
    if len(plans) == 1:
        return forecast_job(spec, plans[0], shape, times[0], watts=watts)

    def forecast(replica: int, num_sequences: int) -> JobForecast:
        share = JobShape.of(_sample(shape.lengths, num_sequences), shape.shared_ratio)
        return forecast_job(spec, plans[replica], share, times[replica], watts=watts)

    alike: dict[tuple[object, ...], list[int]] = {}
    for replica, (plan, steps) in enumerate(zip(plans, times, strict=True)):
        alike.setdefault(_kind(plan, steps), []).append(replica)
    groups = list(alike.values())
    counts = _shares(len(shape.lengths), [1.0] * len(groups), groups)
    found = [forecast(group[0], count) for group, count in zip(groups, counts, strict=True)]
    if len(groups) > 1:
        speeds = [one.tokens_per_s for one in found]
        counts = _shares(len(shape.lengths), speeds, groups)
        found = [forecast(group[0], count) for group, count in zip(groups, counts, strict=True)]
    return _together(shape, plans, groups, found)


def _kind(plan: PipelinePlan, times: StepTimes) -> tuple[object, ...]:
    """Equal for replicas that take equal times."""
    stages = tuple(
        (
            stage.num_layers,
            times.decode_s(stage, _PROBE_ROWS, _PROBE_TOKENS),
            times.prefill_s(stage, _PROBE_TOKENS, _PROBE_TOKENS / 2),
        )
        for stage in plan.stages
    )
    hosts = [stage.host for stage in plan.stages]
    crossing = tuple(left != right for left, right in itertools.pairwise(hosts))
    limits = (plan.num_slots, plan.max_sequences_per_slot, plan.num_kv_pages)
    return (stages, crossing, limits)


def _shares(
    num_sequences: int, speeds: Sequence[float], groups: Sequence[Sequence[int]]
) -> list[int]:
    """Sequences of one replica of each group."""
    total = sum(speed * len(group) for speed, group in zip(speeds, groups, strict=True))
    return [math.ceil(num_sequences * speed / total - 1e-9) for speed in speeds]


def _sample(lengths: Sequence[tuple[int, int]], number: int) -> list[tuple[int, int]]:
    """So many of them, evenly."""
    number = min(number, len(lengths))
    return [lengths[index * len(lengths) // number] for index in range(number)]


def _together(
    shape: JobShape,
    plans: Sequence[PipelinePlan],
    groups: Sequence[Sequence[int]],
    found: Sequence[JobForecast],
) -> JobForecast:
    slowest = max(found, key=lambda forecast: forecast.generating_s)
    by_replica = {
        replica: forecast
        for group, forecast in zip(groups, found, strict=True)
        for replica in group
    }
    stages = tuple(
        replace(
            stage,
            replica=replica,
            rank=plan.stages[stage.stage].rank,
            bubble=1 - (1 - stage.bubble) * by_replica[replica].generating_s / slowest.generating_s,
        )
        for replica, plan in enumerate(plans)
        for stage in by_replica[replica].stages
    )
    rows = [forecast.rows_per_slot for forecast in by_replica.values()]
    energies = [forecast.energy_j for forecast in by_replica.values()]
    return replace(
        slowest,
        tokens_per_s=shape.num_output_tokens / slowest.generating_s,
        startup_s=max(forecast.startup_s for forecast in found),
        compile_s=max(forecast.compile_s for forecast in found),
        rows_per_slot=sum(rows) / len(rows),
        num_preemptions=sum(forecast.num_preemptions for forecast in by_replica.values()),
        num_saved=sum(forecast.num_saved for forecast in by_replica.values()),
        bubble=sum(stage.bubble for stage in stages) / len(stages),
        stages=stages,
        energy_j=None if None in energies else sum(filter(None, energies)),
    )
