"""What is predicted of a run, as plain figures that stand beside the measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.metrics.predicted import Prediction, StagePrediction
from mpipipe.planning.cost import head_weight_bytes, kv_page_bytes, layer_weight_bytes
from mpipipe.planning.forecast import JobForecast
from mpipipe.planning.known_times import KnownTimes
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.replica_forecast import forecast_replicas
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.step_limits import StepLimits
from mpipipe.planning.tensor_parallel import lane_spec

__all__ = ["predict"]

_HUGE_PAGE_BYTES = 2 << 20  # of Linux on x86
_READ_BUFFER_BYTES = 16 << 20  # of weights that are converted (`weights/filling.py`, one reader)
# FBGEMM takes memory for whole blocks of so many inputs and fills it with zeros: 576 inputs
# (SmolLM2) stand as 1,024. (683 MiB were resident after packing, 520 without these zeros.)
_BLOCK_INPUTS = 512


def predict(
    spec: ModelSpec,
    plans: Sequence[PipelinePlan],
    known: Sequence[KnownTimes],
    lengths: Sequence[tuple[int, int]],
    shared_ratio: float = 0.0,
    *,
    is_compiled: bool = False,
) -> Prediction | None:
    """Of a job of sequences of these lengths, (prompt, output) tokens each; None without any.

    `plans` and `known` are of all replicas; `shared_ratio` as in `JobShape`; `is_compiled`: the
    plans' kernels were, before the start.
    """
    if not lengths:
        return None
    shape = JobShape.of(lengths, shared_ratio)
    forecast = forecast_replicas(spec, plans, shape, [each.steps for each in known])
    starts = [
        each.start(spec, plan, is_compiled=is_compiled)
        for each, plan in zip(known, plans, strict=True)
    ]
    stages = tuple(
        StagePrediction(
            replica=stage.replica,
            stage=stage.stage,
            prefill_step_s=stage.prefill_step_s,
            decode_step_s=stage.decode_step_s,
            memory_bytes=_memory_bytes(spec, plans[stage.replica], stage.stage, forecast),
        )
        for stage in forecast.stages
    )
    return Prediction(
        num_prompt_tokens=shape.num_prompt_tokens,
        num_output_tokens=shape.num_output_tokens,
        tokens_per_s=forecast.tokens_per_s,
        generate_s=forecast.generating_s,
        start_s=max(each.start_s for each in starts),
        load_s=max(each.load_s for each in starts),
        stages=stages,
        source=known[0].steps.source,
    )


def _memory_bytes(spec: ModelSpec, plan: PipelinePlan, number: int, forecast: JobForecast) -> int:
    """Weights, cache, and what the largest step needs; on a CPU of the cache what is written to."""
    on_gpu, stage = plan.device == "cuda", plan.stages[number]
    spec = lane_spec(replace(spec, quantized=plan.quantize), plan.tensor_parallel)
    page_bytes = kv_page_bytes(
        spec,
        plan.dtype,
        num_layers=stage.num_kv_device_layers,
        page_size_tokens=plan.page_size_tokens,
        row_multiple=8 if on_gpu else 1,
    )
    limits = StepLimits(
        num_slots=plan.num_slots,
        max_sequences_per_slot=plan.max_sequences_per_slot,
        max_tokens_per_step=plan.max_tokens_per_step,
        max_context_tokens=plan.max_context_tokens,
    )
    work_bytes = limits.step_bytes(spec, plan.dtype, plan.sampling, has_head=stage.has_head)
    if on_gpu:
        return stage.device_weight_bytes + (plan.num_kv_pages + 1) * page_bytes + work_bytes
    # Of the cache what is written to. The keys of a layer's pages lie side by side, as do its
    # values, in huge pages of the system: numpy asks for these for large arrays. Either may begin
    # anywhere in one, so they take one more than they fill, on average. (numpy 2.4, 258 of 483
    # pages of 12 KiB, 60 times: 181 MiB are 301 MiB resident.)
    written = forecast.num_kv_pages * page_bytes + 2 * stage.num_kv_device_layers * _HUGE_PAGE_BYTES
    kv_bytes = min(plan.num_kv_pages * page_bytes, written)
    loading, computing = _cpu_weight_bytes(spec, plan, stage)
    return max(loading, computing + kv_bytes + work_bytes)


def _cpu_weight_bytes(spec: ModelSpec, plan: PipelinePlan, stage: StagePlan) -> tuple[int, int]:
    """The most of a stage's weights while it loads, and while it computes.

    They are read as they run, and then packed (`models/prepacked_linear.py`): the head last, whose
    plain form is there until then, or always, as the embedding.
    """
    weights = stage.device_weight_bytes
    is_converted = plan.weights != "random" and spec.dtype != plan.dtype
    loading = weights + is_converted * _READ_BUFFER_BYTES
    if stage.offload is not None:
        return loading, weights
    share = _packed_share(spec, plan)
    packed = weights
    if share < 1:
        packed -= int((1 - share) * stage.num_layers * layer_weight_bytes(spec, plan.dtype))
        packed += stage.num_layers * _layer_padding_bytes(spec)
    if not stage.has_head:
        return max(loading, packed), packed
    head_bytes = head_weight_bytes(spec, plan.dtype)
    packed += int(share * head_bytes)
    if share < 1:
        packed += _padding_bytes(spec.head_rows or spec.vocab_size, spec.hidden_size)
    stays = stage.has_embedding and spec.is_head_the_embedding
    return max(loading, packed), packed - (not stays) * head_bytes


def _layer_padding_bytes(spec: ModelSpec) -> int:
    """What the matrices of a layer take beyond their weights when they are packed in float16."""
    hidden, inner, heads = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    attention = _padding_bytes(heads + 2 * spec.num_kv_heads * spec.head_dim, hidden)
    mlp = _padding_bytes((1 + spec.gated_mlp) * inner, hidden) + _padding_bytes(hidden, inner)
    return attention + _padding_bytes(hidden, heads) + spec.num_experts * mlp


def _padding_bytes(num_outputs: int, num_inputs: int) -> int:
    return 2 * num_outputs * (-num_inputs % _BLOCK_INPUTS)


def _packed_share(spec: ModelSpec, plan: PipelinePlan) -> float:
    """Of a weight's bytes on a CPU, when it is packed: half of those that float16 holds exactly."""
    is_exact = plan.dtype == "float32" and plan.weights != "random" and spec.dtype != "float32"
    return 0.5 if is_exact and plan.quantize == "none" else 1.0
