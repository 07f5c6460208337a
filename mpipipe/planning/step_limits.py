"""How many slots, sequences, tokens per step and context tokens a run has, and their memory. Pure.

`memory` decides the number of KV pages, `cost` estimates times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.errors import PlanError
from mpipipe.planning.cost import dtype_bytes, kv_page_bytes
from mpipipe.planning.devices import BF16_CAPABILITY, describe_gpu, least_capable
from mpipipe.planning.memory import RankMemory
from mpipipe.planning.plan import Decisions, StagePlan
from mpipipe.planning.resources import RankResources
from mpipipe.planning.workload import SamplingUse
from mpipipe.sampling_options import SamplingNeeds

__all__ = [
    "CHUNK_ELEMENTS",
    "DEQUANTIZED_BYTES",
    "HISTORY_BYTES",
    "StepLimits",
    "choose_step_limits",
    "gather_bytes",
    "gpu_sequences_per_slot",
    "gpu_tokens_per_step",
    "num_request_rows",
    "rank_memory",
    "row_buckets",
]

# Enough rows to use the weights well while a step stays short: at 8 rows a CPU core still waits for
# memory, from about a dozen on it computes (planning/cost.py: 60 GFLOP/s over 10 GB/s).
_SEQUENCES_PER_SLOT = 32
# Arithmetic of 16 decode steps of 32 sequences: what a prompt chunk may hold up other slots.
_TOKENS_PER_STEP = 512

# From about 180 rows on a matrix product takes longer than reading its weights (planning/cost.py:
# 6e14 operations/s over 3.3e12 bytes/s), so more rows win little and cost KV memory.
_GPU_SEQUENCES_PER_SLOT = 256
# Long enough that matrix products are limited by arithmetic, short enough for a fine-grained pipe:
# filling and draining it costs a step. Above 144 MB of gate and up activations products got slower
# (H200, bf16: 28672 × 4096 774 TFLOP/s with 2048 rows, 690 with 4096; 17280 × 3200 774 with 4096).
_MAX_GPU_TOKENS_PER_STEP = 4096
_MIN_GPU_TOKENS_PER_STEP = 512
_WIDEST_ACTIVATION_BYTES = 144 * 10**6
_TOKENS_PER_STEP_TURING = 2048  # a T4 has a tenth of the arithmetic and 16 GB
# CUDA context and kernels, NCCL's buffers, the pools of the graphs.
_FIXED_BYTES = 2**30
# Scores that the sampler treats at once, 32 MB of float32: about ten temporaries of a chunk are
# alive at once (a sort alone has five), and 256 rows of 128k in one piece would make 3 GB of them.
CHUNK_ELEMENTS = 1 << 23
_SAMPLER_TEMPORARIES = 10
# Of a weight in 8 bits that is written out in 16 for a product with many rows: the most at once.
# 16,384 outputs of Llama-3-8B, so that a product of a part still fills the GPU.
DEQUANTIZED_BYTES = 128 * 2**20
# Of a token of a sequence in the tables that penalties read: a boolean, and 32 bits.
HISTORY_BYTES = {SamplingNeeds.SEEN: 1, SamplingNeeds.COUNTS: 4}


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
        """Memory that steps within these limits need on a GPU, with what libraries take there."""
        return self.step_bytes(spec, dtype, sampling, has_head=has_head) + _FIXED_BYTES

    def step_bytes(
        self, spec: ModelSpec, dtype: str, sampling: SamplingUse, *, has_head: bool
    ) -> int:
        """Memory that torch takes for steps within these limits, estimated from above."""
        work_bytes = _activation_bytes(spec, dtype, self.max_tokens_per_step)
        work_bytes += (spec.quantized != "none") * DEQUANTIZED_BYTES
        return work_bytes + has_head * _sampling_bytes(spec, dtype, sampling, self)


def choose_step_limits(
    spec: ModelSpec,
    ranks: Sequence[RankResources],
    decisions: Decisions,
    *,
    device: str,
    num_stages: int,
    num_requests: int | None,
) -> StepLimits:
    """How many sequences and tokens at once.

    Raises:
        PlanError: the settings contradict each other or the model.
    """
    num_slots = decisions.settle("pipeline.num_slots", num_stages, "one a stage")
    sequences = (_SEQUENCES_PER_SLOT, "enough rows a step to use the weights well on a CPU")
    tokens = (_TOKENS_PER_STEP, "keeps prompts from holding up the other slots for long")
    if device == "cuda":
        sequences = gpu_sequences_per_slot(num_requests, num_slots)
        tokens = gpu_tokens_per_step(least_capable(ranks).gpu.capability, spec)
    budget = decisions.config.pipeline.max_tokens_per_step
    if isinstance(budget, int) and budget < sequences[0]:
        sequences = (budget, "one token each in max_tokens_per_step")
    max_sequences = decisions.settle("pipeline.max_sequences_per_slot", *sequences)
    max_tokens = decisions.settle(
        "pipeline.max_tokens_per_step", max(tokens[0], max_sequences), tokens[1]
    )
    if max_tokens < max_sequences:
        raise PlanError(
            f"pipeline.max_tokens_per_step = {max_tokens} is less than "
            f"pipeline.max_sequences_per_slot = {max_sequences}, and every sequence of a slot "
            "needs a token per step: raise the first or lower the second"
        )
    limit = spec.max_context_tokens
    reason = "what the model was made for"
    if spec.rotary.stretched_tokens:
        reason = f"the model's positions, stretched by its rotary embedding ({spec.rotary.kind})"
    max_context = decisions.settle("memory.max_context_tokens", limit, reason)
    if max_context > limit:
        raise PlanError(
            f"memory.max_context_tokens = {max_context} is more than the {limit} positions "
            'the model was made for: lower it, or leave it at "auto"'
        )
    return StepLimits(num_slots, max_sequences, max_tokens, max_context)


def rank_memory(
    rank_resources: RankResources,
    stage: StagePlan,
    page_bytes: int,
    work_bytes: int,
    *,
    gpu_bytes: int | None,
    weight_limit_bytes: int | None = None,
    limited_by: str = "",
) -> RankMemory:
    """What a stage needs and what is there.

    Args:
        rank_resources: of its rank, or of one lane.
        stage: as planned so far.
        page_bytes: of one KV page.
        work_bytes: on a GPU.
        gpu_bytes: of the GPU that its ranks may use together; None: it runs on a CPU.
        weight_limit_bytes: on a CPU.
        limited_by: the setting that `gpu_bytes` follows from.
    """
    if gpu_bytes is None:
        return RankMemory(
            rank=rank_resources.rank,
            host=rank_resources.host,
            available_bytes=rank_resources.memory_available_bytes,
            weight_bytes=stage.device_weight_bytes,
            page_bytes=page_bytes,
            weight_limit_bytes=weight_limit_bytes,
        )
    return RankMemory(
        rank=rank_resources.rank,
        host=rank_resources.host,
        available_bytes=gpu_bytes,
        weight_bytes=stage.device_weight_bytes,
        page_bytes=page_bytes,
        work_bytes=work_bytes + page_bytes,  # a page where rows without a sequence write
        gpu=rank_resources.gpu.uuid or f"index {rank_resources.gpu.index}",
        gpu_name=describe_gpu(rank_resources),
        limited_by=limited_by,
    )


# ---- GPUs ----------------------------------------------------------------------------------------


def gpu_sequences_per_slot(num_requests: int | None, num_slots: int) -> tuple[int, str]:
    """Rows of a decode step at most, and why: no more than the run has for each slot."""
    if num_requests is None or num_requests >= _GPU_SEQUENCES_PER_SLOT * num_slots:
        return _GPU_SEQUENCES_PER_SLOT, "enough rows a step to use the weights well on a GPU"
    rows = _next_bucket(max(1, -(-num_requests // num_slots)))
    share = "" if num_slots == 1 else f" over {num_slots} slots"
    plural = "s" * (num_requests > 1)
    return min(rows, _GPU_SEQUENCES_PER_SLOT), f"all {num_requests} request{plural}{share}"


def _next_bucket(rows: int) -> int:
    """1, 2, 4, then multiples of 8, which suit matrix kernels."""
    return next((size for size in (1, 2, 4) if size >= rows), -(-rows // 8) * 8)


def gpu_tokens_per_step(capability: int, spec: ModelSpec) -> tuple[int, str]:
    """Token budget of a step for compute capability × 10, and why."""
    if capability < BF16_CAPABILITY:
        return _TOKENS_PER_STEP_TURING, "a GPU before compute capability 8.0 computes slower"
    width = spec.intermediate_size * (2 if spec.gated_mlp else 1)
    tokens = _MAX_GPU_TOKENS_PER_STEP
    while tokens > _MIN_GPU_TOKENS_PER_STEP and tokens * width * 2 > _WIDEST_ACTIVATION_BYTES:
        tokens //= 2
    return tokens, "long enough to be limited by arithmetic, short enough for the pipe"


def _activation_bytes(spec: ModelSpec, dtype: str, max_tokens: int) -> int:
    """Memory of a stage beside weights, KV pages and sampling, estimated from above.

    One layer's activations at the largest step: both halves of the MLP before and after the
    product, Q, K and V, and six tensors as wide as the hidden state.
    """
    qkv = spec.head_dim * (spec.num_heads + 2 * spec.num_kv_heads)
    row = 2 * spec.intermediate_size * 2 + qkv + 6 * spec.hidden_size
    return max_tokens * row * dtype_bytes(dtype)


def gather_bytes(
    spec: ModelSpec,
    dtype: str,
    *,
    num_tokens: int,
    num_layers: int,
    kv_bytes: int | None,
    free_bytes: int,
) -> int:
    """Memory of the copy that backends without paged kernels make of keys and values.

    One layer at a time, those of a slot's sequences in one padded tensor. Padding at most doubles a
    layer's share of the pages in use (`models/attention/sdpa.py`).

    Args:
        spec: of the model.
        dtype: of the cache.
        num_tokens: of a slot, with every sequence at its longest.
        num_layers: of the stage.
        kv_bytes: of all of its pages; None: as many as fit beside the copy.
        free_bytes: for both.
    """
    if kv_bytes is None:  # P + 2 P / layers = free
        kv_bytes = free_bytes * num_layers // (num_layers + 2)
    row = kv_page_bytes(spec, dtype, num_layers=1, page_size_tokens=1)
    return min(num_tokens * row, 2 * kv_bytes // num_layers)


def _sampling_bytes(spec: ModelSpec, dtype: str, sampling: SamplingUse, limits: StepLimits) -> int:
    """Memory of the last stage for logits and what is drawn from them, estimated from above.

    The logits of every sequence of a step in the run's dtype and in float32. What the run uses
    adds: the temporaries of draws, penalties and log-probabilities in the graphs' pool (outside of
    graphs they take the place of activations); the logits that graphs keep for log-probabilities;
    the penalties' tables.
    """
    row = limits.max_sequences_per_slot * spec.vocab_size
    total = row * (4 + 2)
    if not sampling.is_plain:
        total += _SAMPLER_TEMPORARIES * 4 * min(row, CHUNK_ELEMENTS)
    if sampling.logprobs:
        total += row * dtype_bytes(dtype)
    request_rows = num_request_rows(limits.num_slots, limits.max_sequences_per_slot)
    request_rows += 1  # one for rows without a sequence
    for need, entry_bytes in HISTORY_BYTES.items():
        if need & sampling.needs:
            total += request_rows * (spec.vocab_size + 1) * entry_bytes
    return total


def num_request_rows(num_slots: int, max_sequences: int) -> int:
    """Sequences that a stage's tables hold.

    A place may be taken again while its last owner's steps are in flight: two request rows a place.
    """
    return 2 * num_slots * max_sequences


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that get a graph of their own; a step takes the next larger one.

    Fine where a row costs most of a step's time, coarser above: at most 25 % of the rows are
    padding from 8 rows on, on average 8 %. 19 sizes up to 256.
    """
    sizes: list[int] = [1, 2, 4]
    size = 8
    while size < max_rows:
        sizes.append(size)
        size += max(8, 1 << (size.bit_length() - 3))
    return (*(size for size in sizes if size < max_rows), max_rows)
