"""What is predicted of a run, as plain figures that stand beside the measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.metrics.predicted import Prediction, StagePrediction
from mpipipe.planning.cost import head_weight_bytes, kv_page_bytes
from mpipipe.planning.forecast import JobForecast
from mpipipe.planning.known_times import KnownTimes
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.replica_forecast import forecast_replicas
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.step_limits import StepLimits
from mpipipe.planning.tensor_parallel import lane_spec

__all__ = ["predict"]


def predict(
    spec: ModelSpec,
    plans: Sequence[PipelinePlan],
    known: Sequence[KnownTimes],
    lengths: Sequence[tuple[int, int]],
    shared_ratio: float = 0.0,
) -> Prediction | None:
    """Of a job of sequences of these lengths, (prompt, output) tokens each; None without any.

    `plans` and `known` are of all replicas; `shared_ratio` as in `JobShape`.
    """
    if not lengths:
        return None
    shape = JobShape.of(lengths, shared_ratio)
    forecast = forecast_replicas(spec, plans, shape, [each.steps for each in known])
    starts = [each.start(spec, plan) for each, plan in zip(known, plans, strict=True)]
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
        start_s=max(start_s for start_s, _ in starts),
        load_s=max(load_s for _, load_s in starts),
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
    num_pages = plan.num_kv_pages + 1 if on_gpu else forecast.num_kv_pages
    limits = StepLimits(
        num_slots=plan.num_slots,
        max_sequences_per_slot=plan.max_sequences_per_slot,
        max_tokens_per_step=plan.max_tokens_per_step,
        max_context_tokens=plan.max_context_tokens,
    )
    work_bytes = limits.step_bytes(spec, plan.dtype, plan.sampling, has_head=stage.has_head)
    held = stage.device_weight_bytes + num_pages * page_bytes + work_bytes
    # On a CPU the head is packed (`models/prepacked_linear.py`): the most is held while both forms
    # of it are there, or always, where the plain one is the embedding.
    if not on_gpu and stage.has_head and stage.offload is None:
        held += head_weight_bytes(spec, plan.dtype)
    return held
