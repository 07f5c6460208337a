"""How fast a job is over several replicas, predicted: to choose how many there should be. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.forecast import forecast_job
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.rate_times import rate_times
from mpipipe.planning.resources import RankResources
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.workload import Workload

__all__ = ["predicted_rate"]


def predicted_rate(
    spec: ModelSpec,
    plans: Sequence[PipelinePlan],
    ranks: Sequence[RankResources],
    workload: Workload,
) -> float | None:
    """Output tokens/s of the job under `plans`, one of each replica; None: its size is not known.

    All requests count as equally long. Each replica has its share of them, and as they are handed
    out on demand, the faster ones get more: rates add up.

    Args:
        spec: of the model.
        plans: of all replicas.
        ranks: of all of them.
        workload: of the whole job.
    """
    num_requests, num_prompt_tokens = workload.num_requests, workload.num_prompt_tokens
    num_output_tokens = workload.num_output_tokens
    if not num_requests or num_prompt_tokens is None or not num_output_tokens:
        return None
    length = (round(num_prompt_tokens / num_requests), round(num_output_tokens / num_requests))
    shape = JobShape.of([(max(1, length[0]), max(1, length[1]))] * -(-num_requests // len(plans)))
    alike: dict[tuple[object, ...], float] = {}
    total = 0.0
    for plan in plans:
        key = _what_decides(plan, ranks)
        if key not in alike:
            times = rate_times(spec, plan, ranks)
            alike[key] = forecast_job(spec, plan, shape, times).tokens_per_s
        total += alike[key]
    return total * min(1.0, num_requests / len(plans))  # some may get none


def _what_decides(plan: PipelinePlan, ranks: Sequence[RankResources]) -> tuple[object, ...]:
    """Replicas with the same of it are equally fast."""
    by_rank = {rank.rank: rank for rank in ranks}
    stages = tuple(
        (stage.num_layers, by_rank[stage.rank].gpu.name, stage.host == plan.stages[0].host)
        for stage in plan.stages
    )
    return (*stages, plan.num_kv_pages, plan.max_sequences_per_slot, plan.max_tokens_per_step)
