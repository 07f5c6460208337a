"""How much may be in flight: slots, sequences and tokens per step, context; and its memory.

`gpu_limits` has the numbers for GPUs and their origin; `memory` decides the number of KV pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import Config
from mpipipe.errors import PlanError
from mpipipe.planning.devices import describe_gpu, least_capable
from mpipipe.planning.gpu_limits import (
    activation_bytes,
    gpu_sequences_per_slot,
    gpu_tokens_per_step,
    sampling_bytes,
)
from mpipipe.planning.memory import RankMemory
from mpipipe.planning.plan import Decisions, StagePlan
from mpipipe.planning.resources import RankResources
from mpipipe.planning.sampling_use import SamplingUse

__all__ = ["StepLimits", "choose_step_limits", "rank_memory"]

# Enough rows to use the weights well while a step stays short: at 8 rows a CPU core still waits for
# memory, from about a dozen on it computes (planning/cost.py: 60 GFLOP/s over 10 GB/s).
_SEQUENCES_PER_SLOT = 32
# Arithmetic of 16 decode steps of 32 sequences: what a prompt chunk may hold up other slots.
_TOKENS_PER_STEP = 512


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Bounds of what is in flight."""

    num_slots: int
    max_sequences_per_slot: int
    max_tokens_per_step: int
    max_context_tokens: int

    def gpu_work_bytes(
        self, spec: ModelSpec, dtype: str, sampling: SamplingUse, *, has_head: bool
    ) -> int:
        """Memory that steps within these limits need on a GPU."""
        return activation_bytes(spec, dtype, self.max_tokens_per_step) + has_head * sampling_bytes(
            spec,
            dtype,
            sampling,
            num_slots=self.num_slots,
            max_sequences=self.max_sequences_per_slot,
        )


def choose_step_limits(
    config: Config,
    spec: ModelSpec,
    ranks: Sequence[RankResources],
    decisions: Decisions,
    *,
    device: str,
    num_requests: int | None,
) -> StepLimits:
    """How many sequences and tokens at once.

    Raises:
        PlanError: the settings contradict each other or the model.
    """
    pipeline = config.pipeline
    num_slots = decisions.count("pipeline.num_slots", pipeline.num_slots, len(ranks), "one a stage")
    sequences = (_SEQUENCES_PER_SLOT, "enough rows a step to use the weights well on a CPU")
    tokens = (_TOKENS_PER_STEP, "keeps prompts from holding up the other slots for long")
    if device == "cuda":
        sequences = gpu_sequences_per_slot(num_requests, num_slots)
        tokens = gpu_tokens_per_step(least_capable(ranks).gpu.capability, spec)
        budget = pipeline.max_tokens_per_step
        if isinstance(budget, int) and budget < sequences[0]:
            sequences = (budget, "one token each in max_tokens_per_step")
    max_sequences = decisions.count(
        "pipeline.max_sequences_per_slot",
        pipeline.max_sequences_per_slot,
        *sequences,
    )
    max_tokens = decisions.count(
        "pipeline.max_tokens_per_step",
        pipeline.max_tokens_per_step,
        max(tokens[0], max_sequences),
        tokens[1],
    )
    if max_tokens < max_sequences:
        raise PlanError(
            f"pipeline.max_tokens_per_step = {max_tokens} is less than "
            f"pipeline.max_sequences_per_slot = {max_sequences}, and every sequence of a slot "
            "needs a token per step: raise the first or lower the second"
        )
    return StepLimits(num_slots, max_sequences, max_tokens, _max_context(config, spec, decisions))


def _max_context(config: Config, spec: ModelSpec, decisions: Decisions) -> int:
    limit = spec.max_context_tokens
    asked = config.memory.max_context_tokens
    reason = "what the model was made for"
    max_context = decisions.count("memory.max_context_tokens", asked, limit, reason)
    if max_context > limit:
        raise PlanError(
            f"memory.max_context_tokens = {max_context} is more than the {limit} positions "
            'the model was made for: lower it, or leave it at "auto"'
        )
    return max_context


def rank_memory(
    rank_resources: RankResources,
    stage: StagePlan,
    page_bytes: int,
    work_bytes: int,
    gpu_fraction: float | None,
) -> RankMemory:
    """What a stage needs and what is there. `gpu_fraction`: of the GPU's free bytes; None: CPU."""
    if gpu_fraction is None:
        available = rank_resources.memory_available_bytes
        return RankMemory(stage.rank, stage.host, available, stage.weight_bytes, page_bytes)
    return RankMemory(
        rank=stage.rank,
        host=stage.host,
        available_bytes=int(rank_resources.gpu.free_bytes * gpu_fraction),
        weight_bytes=stage.weight_bytes,
        page_bytes=page_bytes,
        work_bytes=work_bytes + page_bytes,  # a page where rows without a sequence write
        gpu=rank_resources.gpu.uuid or f"index {rank_resources.gpu.index}",
        gpu_name=describe_gpu(rank_resources),
    )
