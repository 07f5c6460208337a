"""How fast a job is over several replicas, predicted: to choose how many there should be. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.rate_times import rate_times
from mpipipe.planning.replica_forecast import forecast_replicas
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

    All requests count as equally long.

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
    means = (num_prompt_tokens / num_requests, num_output_tokens / num_requests)
    prompt, output = (max(1, round(mean)) for mean in means)
    shape = JobShape.of([(prompt, output)] * num_requests)
    times = []
    for plan in plans:
        own = [rank for rank in ranks if rank.rank in plan.ranks]
        times.append(rate_times(spec, plan, own))
    return forecast_replicas(spec, plans, shape, times).tokens_per_s
