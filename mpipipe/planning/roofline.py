"""The least time that memory and arithmetic allow a job; measured figures are compared with it.

A floor is no prediction: it ignores kernels, launches, sampling and messages.

Assumptions, each of which makes the floor lower or leaves it as it is:

* A step takes the longer of its traffic over the memory's bandwidth and its arithmetic over the
  peak of the dtype that the ceiling was measured with; both overlap perfectly.
* A decode step reads every weight of the stage once and K and V of every token before it once;
  what prompts share, once for all rows of a slot.
  Activations, the embedding's few rows, page tables and what a kernel pads are free.
* The pipe: with as many active slots as stages a round takes as long as its slowest stage needs for
  all of them; with fewer, a micro-batch must pass all stages one after the other.
* Prompts are computed in chunks of `max_tokens_per_step`, the pipe filled and drained once; then
  all sequences decode in equal slots that stay full.
* Transfers between stages cost nothing.

Sizes are those of `cost` (no norms, biases). In a mixture of experts every expert counts as read
and computed, so its floor is only right for batches that reach all experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.metrics.throughput import FloorTimes
from mpipipe.planning.cost import (
    CPU_CORE,
    Ceilings,
    StepCost,
    head_decode_cost,
    head_weight_bytes,
    layer_decode_cost,
    layer_weight_bytes,
)
from mpipipe.planning.gpu_table import known_gpus
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.tensor_parallel import lane_spec

__all__ = ["JobShape", "ceilings_of", "job_floor"]


def ceilings_of(device: str, gpu_name: str = "", num_threads: int = 1) -> Ceilings | None:
    """The ceilings of a rank's device; None for a GPU that the table of GPUs has not.

    Measured ones where we have them, else what is reached of published ones; `source` says which.
    `num_threads` scales the arithmetic of a CPU; its bandwidth is one core's (planning/cost.py).
    """
    if device == "cpu":
        source = "one CPU core of planning/cost.py, arithmetic times threads"
        return Ceilings(CPU_CORE.bytes_per_s, CPU_CORE.flops_per_s * num_threads, source)
    known = known_gpus().find(gpu_name)
    return None if known is None else known.ceilings


@dataclass(frozen=True, slots=True)
class JobShape:
    """How much there is to do, without the tokens."""

    num_sequences: int
    num_prompt_tokens: int
    num_output_tokens: int
    prompt_pairs: float  # sum over prompts of length² / 2: query-key pairs under the causal mask
    cached_tokens: float  # sum over all decoded tokens of the tokens before and including them
    lengths: Sequence[tuple[int, int]]  # of every sequence: prompt tokens, output tokens
    # Of the prompt tokens, those that are not computed where prefixes are shared: as much of each.
    shared_ratio: float = 0.0

    @staticmethod
    def of(lengths: Sequence[tuple[int, int]], shared_ratio: float = 0.0) -> JobShape:
        """The shape of sequences given as (prompt tokens, output tokens)."""
        return JobShape(
            num_sequences=len(lengths),
            num_prompt_tokens=sum(prompt for prompt, _ in lengths),
            num_output_tokens=sum(output for _, output in lengths),
            prompt_pairs=sum(prompt * prompt / 2 for prompt, _ in lengths),
            # Token i of the output, i = 1 … output - 1, is the input of a decode step.
            cached_tokens=sum(
                (output - 1) * prompt + (output - 1) * output / 2 for prompt, output in lengths
            ),
            lengths=lengths,
            shared_ratio=shared_ratio,
        )

    def as_under(self, plan: PipelinePlan) -> JobShape:
        """Nothing is shared under a plan that does without it."""
        return self if plan.max_sharing_tokens else replace(self, shared_ratio=0.0)

    @property
    def num_decoded_tokens(self) -> int:
        """Tokens that decode steps make: all but the first of each sequence."""
        return self.num_output_tokens - self.num_sequences

    @property
    def mean_context_tokens(self) -> float:
        """Mean K and V rows that a decoded token reads."""
        return self.cached_tokens / self.num_decoded_tokens if self.num_decoded_tokens else 0.0


def job_floor(
    spec: ModelSpec, plan: PipelinePlan, shape: JobShape, ceilings: Ceilings
) -> FloorTimes:
    """The floors of `shape` under `plan` when every rank has the same `ceilings`."""
    spec = lane_spec(replace(spec, quantized=plan.quantize), plan.tensor_parallel)
    shape = shape.as_under(plan)
    running = min(shape.num_sequences, plan.num_slots * plan.max_sequences_per_slot)
    num_active_slots = min(plan.num_slots, running)
    num_computed = round(shape.num_prompt_tokens * (1 - shape.shared_ratio))
    num_chunks = max(1, -(-num_computed // plan.max_tokens_per_step))
    decodes_s, prefills_s = [], []
    for stage in plan.stages:
        decode = _decode_step(spec, plan.dtype, stage, shape, running / num_active_slots)
        prefill = _prefill_step(spec, plan.dtype, stage, shape, num_chunks)
        decodes_s.append(decode.seconds(ceilings))
        prefills_s.append(prefill.seconds(ceilings))
    prefill_s = sum(prefills_s) + (num_chunks - 1) * max(prefills_s)
    decode_round_s = max(sum(decodes_s), num_active_slots * max(decodes_s))
    decode_s = shape.num_decoded_tokens / running * decode_round_s
    return FloorTimes(
        tokens_per_s=shape.num_output_tokens / (prefill_s + decode_s),
        prefill_s=prefill_s,
        decode_round_s=decode_round_s,
        decode_tokens_per_s=shape.num_decoded_tokens / decode_s if decode_s > 0 else None,
        source=ceilings.source,
    )


def _decode_step(
    spec: ModelSpec, dtype: str, stage: StagePlan, shape: JobShape, rows: float
) -> StepCost:
    """All layers of the stage, and the LM head on the last one."""
    num_shared = shape.shared_ratio * shape.num_prompt_tokens / shape.num_sequences
    context = max(0.0, shape.mean_context_tokens - num_shared * (1 - 1 / rows))
    layer = layer_decode_cost(spec, dtype, num_sequences=rows, context_tokens=context)
    head = head_decode_cost(spec, dtype, num_sequences=rows)
    return StepCost(
        stage.num_layers * layer.bytes_moved + stage.has_head * head.bytes_moved,
        stage.num_layers * layer.flops + stage.has_head * head.flops,
    )


def _prefill_step(
    spec: ModelSpec, dtype: str, stage: StagePlan, shape: JobShape, num_chunks: int
) -> StepCost:
    """The mean chunk; of every prompt only the last row passes the LM head."""
    layers = stage.num_layers * spec.layer_parameters
    head = spec.head_parameters if stage.has_head else 0
    moved = stage.num_layers * layer_weight_bytes(spec, dtype)
    moved += head_weight_bytes(spec, dtype) if stage.has_head else 0
    num_computed = shape.num_prompt_tokens * (1 - shape.shared_ratio)
    pairs = shape.prompt_pairs * (1 - shape.shared_ratio**2)
    attention = 4 * pairs * stage.num_layers * spec.num_heads * spec.head_dim
    flops = 2 * num_computed * layers + 2 * shape.num_sequences * head + attention
    return StepCost(float(moved), flops / num_chunks)
