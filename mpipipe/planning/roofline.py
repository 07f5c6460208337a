"""The least time that memory and arithmetic allow a job; measured figures are compared with it.

A floor is no prediction: it ignores kernels, launches, sampling and messages.

Assumptions, each of which makes the floor lower or leaves it as it is:

* A step takes the longer of its traffic over the memory's bandwidth and its arithmetic over the
  peak of the dtype that the ceiling was measured with; both overlap perfectly.
* A decode step reads every weight of the stage once and K and V of every token before it once.
  Activations, the embedding's few rows, page tables and what a kernel pads are free.
* The pipe: with as many active slots as stages a round takes as long as its slowest stage needs for
  all of them; with fewer, a micro-batch must pass all stages one after the other.
* Prompts are computed in chunks of `max_tokens_per_step`, the pipe filled and drained once; then
  all sequences decode in equal slots that stay full.
* Hops between stages cost nothing.

Sizes are those of `cost` (no norms, biases). In a mixture of experts every expert counts as read
and computed, so its floor is only right for batches that reach all experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.cost import BYTES_PER_S, FLOPS_PER_S, dtype_bytes
from mpipipe.planning.plan import PipelinePlan, StagePlan

__all__ = ["Ceilings", "JobFloor", "JobShape", "StageFloor", "ceilings_of", "job_floor"]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What one rank's device does at best."""

    bytes_per_s: float
    flops_per_s: float
    source: str


# GPUs whose ceilings we measured, by a part of the name that the driver gives: copy bandwidth and
# bfloat16 matrix products of torch 2.11.
_MEASURED = {
    "H200": Ceilings(4.25e12, 790e12, "measured: 4.25 TB/s copy, 790 TFLOP/s bf16"),
    "H100": Ceilings(3.0e12, 790e12, "measured: about 3.0 TB/s copy, 790 TFLOP/s bf16"),
}


def ceilings_of(device: str, gpu_name: str = "", num_threads: int = 1) -> Ceilings | None:
    """The ceilings of a rank's device; None for a GPU without measured ceilings.

    `num_threads` scales the arithmetic of a CPU; its bandwidth is one core's (planning/cost.py).
    """
    if device == "cpu":
        source = "one CPU core of planning/cost.py, arithmetic times threads"
        return Ceilings(BYTES_PER_S, FLOPS_PER_S * num_threads, source)
    found = (ceilings for name, ceilings in _MEASURED.items() if name in gpu_name)
    return next(found, None)


@dataclass(frozen=True, slots=True)
class JobShape:
    """How much there is to do, without the tokens."""

    num_sequences: int
    num_prompt_tokens: int
    num_output_tokens: int
    prompt_pairs: float  # sum over prompts of length² / 2: query-key pairs under the causal mask
    cached_tokens: float  # sum over all decoded tokens of the tokens before and including them

    @staticmethod
    def of(lengths: Sequence[tuple[int, int]]) -> JobShape:
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
        )

    @property
    def num_decoded_tokens(self) -> int:
        """Tokens that decode steps make: all but the first of each sequence."""
        return self.num_output_tokens - self.num_sequences

    @property
    def mean_context_tokens(self) -> float:
        """Mean K and V rows that a decoded token reads."""
        return self.cached_tokens / self.num_decoded_tokens if self.num_decoded_tokens else 0.0


@dataclass(frozen=True, slots=True)
class StageFloor:
    """One stage's floors."""

    stage: int
    decode_step_s: float  # one slot's rows at the mean context
    prefill_step_s: float  # one chunk of prompts


@dataclass(frozen=True, slots=True)
class JobFloor:
    """The floors of a whole job."""

    stages: tuple[StageFloor, ...]
    prefill_s: float
    decode_round_s: float  # one token for every running sequence
    num_rounds: float
    num_output_tokens: int
    num_decoded_tokens: int

    @property
    def decode_s(self) -> float:
        """All rounds."""
        return self.num_rounds * self.decode_round_s

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over prefill and decode."""
        return self.num_output_tokens / (self.prefill_s + self.decode_s)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Decoded tokens over decode alone; None when nothing is decoded."""
        return self.num_decoded_tokens / self.decode_s if self.decode_s > 0 else None


def job_floor(spec: ModelSpec, plan: PipelinePlan, shape: JobShape, ceilings: Ceilings) -> JobFloor:
    """The floors of `shape` under `plan` when every rank has the same `ceilings`."""
    running = min(shape.num_sequences, plan.num_slots * plan.max_sequences_per_slot)
    num_active_slots = min(plan.num_slots, running)
    rows = running / num_active_slots
    num_chunks = max(1, -(-shape.num_prompt_tokens // plan.max_tokens_per_step))
    bytes_per_element = dtype_bytes(plan.dtype)

    def floor(stage: StagePlan) -> StageFloor:
        decode = _decode_step(spec, stage, shape, rows)
        prefill = _prefill_step(spec, stage, shape, num_chunks)
        return StageFloor(
            stage=stage.stage,
            decode_step_s=decode.seconds(bytes_per_element, ceilings),
            prefill_step_s=prefill.seconds(bytes_per_element, ceilings),
        )

    stages = tuple(map(floor, plan.stages))
    decodes_s = [stage.decode_step_s for stage in stages]
    prefills_s = [stage.prefill_step_s for stage in stages]
    return JobFloor(
        stages=stages,
        prefill_s=sum(prefills_s) + (num_chunks - 1) * max(prefills_s),
        decode_round_s=max(sum(decodes_s), num_active_slots * max(decodes_s)),
        num_rounds=shape.num_decoded_tokens / running,
        num_output_tokens=shape.num_output_tokens,
        num_decoded_tokens=shape.num_decoded_tokens,
    )


@dataclass(frozen=True, slots=True)
class _Demand:
    """What one step of a stage must move and compute."""

    elements: float
    flops: float

    def seconds(self, bytes_per_element: int, ceilings: Ceilings) -> float:
        moving_s = self.elements * bytes_per_element / ceilings.bytes_per_s
        return max(moving_s, self.flops / ceilings.flops_per_s)


def _decode_step(spec: ModelSpec, stage: StagePlan, shape: JobShape, rows: float) -> _Demand:
    head = spec.embedding_parameters if stage.has_head else 0
    weights = stage.num_layers * spec.layer_parameters + head
    cached = rows * shape.mean_context_tokens * stage.num_layers
    return _Demand(
        elements=weights + cached * spec.kv_elements_per_token_layer,
        # A weight: a multiply and an add per row. A cached token: two of each per element of all
        # query heads, for the score and for the sum of values.
        flops=2 * rows * weights + 4 * cached * spec.num_heads * spec.head_dim,
    )


def _prefill_step(spec: ModelSpec, stage: StagePlan, shape: JobShape, num_chunks: int) -> _Demand:
    """The mean chunk; of every prompt only the last row passes the LM head."""
    layers = stage.num_layers * spec.layer_parameters
    head = spec.embedding_parameters if stage.has_head else 0
    attention = 4 * shape.prompt_pairs * stage.num_layers * spec.num_heads * spec.head_dim
    flops = 2 * shape.num_prompt_tokens * layers + 2 * shape.num_sequences * head + attention
    return _Demand(elements=layers + head, flops=flops / num_chunks)
