"""What memory and arithmetic allow a run at best, by its own plan and the lengths of its prompts.

Where the device has measured ceilings this is a number of tokens per second. Elsewhere only the
ratio of two cases means something: the cost model's ratio of bandwidth to arithmetic is near that
of every CPU and GPU (planning/cost.py), its scale is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpipipe.checkpoint.spec import ModelSpec, read_spec
from mpipipe.errors import CheckpointError
from mpipipe.experiments.record import Ceiling
from mpipipe.plain_values import from_plain
from mpipipe.planning.cost import Ceilings
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.roofline import JobShape, ceilings_of, job_floor

__all__ = ["ceiling_of", "ceiling_of_run", "plan_of"]

_STAND_IN = "H200"  # for GPUs that were not measured


def plan_of(manifest: Mapping[str, Any]) -> PipelinePlan | None:
    """The plan of a run; None: it came to none, or another version wrote it."""
    try:
        return from_plain(PipelinePlan, manifest.get("plan"))
    except ValueError:
        return None


def ceiling_of_run(
    plan: PipelinePlan | None, lengths: Sequence[tuple[int, int]], gpu_names: Sequence[str]
) -> Ceiling | None:
    """As `ceiling_of`; None: there is no plan, nothing was completed, or the model has gone."""
    if plan is None or not lengths:
        return None
    try:
        spec = read_spec(Path(plan.model_path))
    except CheckpointError:
        return None
    return ceiling_of(spec, plan, lengths, gpu_names)


def ceiling_of(
    spec: ModelSpec,
    plan: PipelinePlan,
    lengths: Sequence[tuple[int, int]],
    gpu_names: Sequence[str] = (),
) -> Ceiling:
    """The ceiling of a job whose prompts have the `lengths` (prompt tokens, output tokens)."""
    is_cpu = plan.device == "cpu"
    measured = None if is_cpu else ceilings_of("cuda", gpu_names[0] if gpu_names else "")
    ceilings = measured or _ratio_only(plan)
    shape = JobShape.of(lengths)
    floor = job_floor(spec, plan, shape, ceilings)
    largest = max(stage.cost_share for stage in plan.stages)
    running = min(len(lengths), plan.num_slots * plan.max_sequences_per_slot)
    return Ceiling(
        tokens_per_s=floor.tokens_per_s if measured is not None else None,
        model_tokens_per_s=floor.tokens_per_s,
        reason=(
            "output tokens / (prefill + rounds × time of a round): "
            f"{shape.num_output_tokens} / ({floor.prefill_s:.4g} s + "
            f"{shape.num_decoded_tokens / running:.4g} × "
            f"{floor.decode_round_s:.4g} s); a round is {running} tokens in "
            f"{min(plan.num_slots, running)} slots, each as long as the slowest of "
            f"{plan.num_stages} stages, which has {largest:.3f} of the cost ({ceilings.source})"
        ),
    )


def _ratio_only(plan: PipelinePlan) -> Ceilings:
    if plan.device == "cpu":
        ceilings = ceilings_of("cpu", num_threads=plan.threads_per_rank)
    else:
        ceilings = ceilings_of("cuda", _STAND_IN)
    assert ceilings is not None, "a CPU and the stand-in have ceilings"
    return dataclasses.replace(ceilings, source=f"only ratios are meant; {ceilings.source}")
