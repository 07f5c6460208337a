"""What memory and arithmetic allow a run at best, by its own plan and the lengths of its prompts.

Where the table of GPUs knows the device this is a number of tokens per second. Elsewhere only the
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

_STAND_IN = "H200"  # for GPUs that the table does not know


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
    """The ceiling of a job whose prompts have the `lengths` (prompt tokens, output tokens).

    With several replicas, all like `plan`, it is that of the one with the largest fair share.
    """
    num_output_tokens = sum(output for _, output in lengths)
    if plan.num_replicas > 1:
        lengths = sorted(lengths, reverse=True)[:: plan.num_replicas]
    is_cpu = plan.device == "cpu"
    known = None if is_cpu else ceilings_of("cuda", gpu_names[0] if gpu_names else "")
    ceilings = known or _ratio_only(plan)
    shape = JobShape.of(lengths)
    floor = job_floor(spec, plan, shape, ceilings)
    decode_s, told = 0.0, []
    for wave in _waves(lengths, plan.num_slots * plan.max_sequences_per_slot):
        part = JobShape.of(wave)
        running = min(len(wave), plan.num_slots * plan.max_sequences_per_slot)
        round_s = job_floor(spec, plan, part, ceilings).decode_round_s
        num_rounds = part.num_decoded_tokens / running
        decode_s += num_rounds * round_s
        told.append(f"{num_rounds:.4g} × {round_s:.4g} s with {running} sequences")
    tokens_per_s = num_output_tokens / (floor.prefill_s + decode_s)
    largest = max(stage.cost_share for stage in plan.stages)
    return Ceiling(
        tokens_per_s=tokens_per_s if known is not None else None,
        model_tokens_per_s=tokens_per_s,
        reason=(
            "output tokens / (prefill + rounds × time of a round): "
            f"{num_output_tokens} / ({floor.prefill_s:.4g} s + {' + '.join(told)}); a round "
            f"is a token of each in at most {plan.num_slots} slots, each as long as the slowest of "
            f"{plan.num_stages} stages, which has {largest:.3f} of the cost ({ceilings.source})"
        ),
    )


def _waves(
    lengths: Sequence[tuple[int, int]], most_running: int
) -> list[Sequence[tuple[int, int]]]:
    """The full waves together, then the last one, which leaves rows empty.

    Sequences with equal outputs end together, so 40 of them at 32 rows need a second wave of 8: no
    scheduler makes that faster. With unequal outputs others move up, and all is one wave.
    """
    full = len(lengths) - len(lengths) % most_running
    if not full or full == len(lengths) or len({output for _, output in lengths}) > 1:
        return [lengths]
    return [lengths[:full], lengths[full:]]


def _ratio_only(plan: PipelinePlan) -> Ceilings:
    if plan.device == "cpu":
        ceilings = ceilings_of("cpu", num_threads=plan.threads_per_rank)
    else:
        ceilings = ceilings_of("cuda", _STAND_IN)
    assert ceilings is not None, "a CPU and the stand-in have ceilings"
    return dataclasses.replace(ceilings, source=f"only ratios are meant; {ceilings.source}")
