"""What is predicted of a run, as plain figures that stand beside the measured ones."""

from __future__ import annotations

from collections.abc import Sequence

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.metrics.predicted import Prediction, StagePrediction
from mpipipe.planning.cost import kv_page_bytes
from mpipipe.planning.forecast import forecast_job
from mpipipe.planning.known_times import KnownTimes
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.roofline import JobShape

__all__ = ["predict"]


def predict(
    spec: ModelSpec,
    plan: PipelinePlan,
    lengths: Sequence[tuple[int, int]],
    known: KnownTimes,
) -> Prediction | None:
    """Of a job of sequences of these lengths, (prompt, output) tokens each; None without any."""
    if not lengths:
        return None
    shape = JobShape.of(lengths)
    forecast = forecast_job(spec, plan, shape, known.steps)
    start_s, load_s = known.start(spec, plan)
    stages = tuple(
        StagePrediction(
            stage=stage.stage,
            prefill_step_s=stage.prefill_step_s,
            decode_step_s=stage.decode_step_s,
            memory_bytes=_memory_bytes(spec, plan, plan.stages[stage.stage]),
        )
        for stage in forecast.stages
    )
    return Prediction(
        num_prompt_tokens=shape.num_prompt_tokens,
        num_output_tokens=shape.num_output_tokens,
        tokens_per_s=forecast.tokens_per_s,
        generate_s=forecast.generating_s,
        start_s=start_s,
        load_s=load_s,
        stages=stages,
        source=known.steps.source,
    )


def _memory_bytes(spec: ModelSpec, plan: PipelinePlan, stage: StagePlan) -> int:
    """Weights and cache."""
    on_gpu = plan.device == "cuda"
    page_bytes = kv_page_bytes(
        spec,
        plan.dtype,
        num_layers=stage.num_layers,
        page_size_tokens=plan.page_size_tokens,
        row_multiple=8 if on_gpu else 1,
    )
    return stage.device_weight_bytes + (plan.num_kv_pages + on_gpu) * page_bytes
