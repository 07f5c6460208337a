"""A plan as text: the table that `mpipipe plan` prints and the log keeps.

A row is a tuple of cells; the command line adds colours and boxes.
"""

from __future__ import annotations

from mpipipe.planning.memory import gib
from mpipipe.planning.plan import PipelinePlan, StagePlan

__all__ = ["plan_lines", "plan_rows"]

# Said only where there is something to say.
_SAID = ("pipeline.layout", "pipeline.bind", "model.rotary", "generation.", "generation_config.")


def plan_rows(plan: PipelinePlan) -> tuple[tuple[str, str, str], ...]:
    """Stages, where they lie, what the model decides, then settings.

    Each is a name, a value, and a reason or "as configured".
    """
    stages = tuple(_stage_row(stage) for stage in plan.stages)
    reasons = {entry.setting: entry.reason for entry in plan.resolved}
    said = tuple(
        (entry.setting, entry.value, entry.reason)
        for entry in plan.resolved
        if entry.setting.startswith(_SAID)
    )
    settings = tuple(
        (setting, value, reasons.get(setting, "as configured"))
        for setting, value in _settings(plan)
    )
    return stages + said + settings


def plan_lines(plan: PipelinePlan) -> list[str]:
    """A heading and the rows, aligned in columns."""
    rows = plan_rows(plan)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    heading = (
        f"plan {plan.content_hash()}: {plan.architecture}, {plan.num_layers} layers on "
        f"{plan.num_stages} stage{'s' * (plan.num_stages > 1)}, {plan.model_path}"
    )
    lines = [
        f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip()
        for name, value, reason in rows
    ]
    return [heading, *lines]


def _stage_row(stage: StagePlan) -> tuple[str, str, str]:
    parts = [f"layers {stage.first_layer}–{stage.last_layer - 1} ({stage.num_layers})"]
    if stage.has_embedding:
        parts.insert(0, "embedding")
    if stage.has_head:
        parts.append("LM head")
    facts = (
        f"rank {stage.rank} on {stage.host}, {gib(stage.weight_bytes)} of weights, "
        f"{stage.cost_share:.1%} of a round"
    )
    return f"stage {stage.stage}", " + ".join(parts), facts


def _settings(plan: PipelinePlan) -> tuple[tuple[str, str], ...]:
    split = [stage.num_layers for stage in plan.stages]
    return (
        ("model.dtype", plan.dtype),
        ("model.weights", plan.weights),
        *((("model.quantize", plan.quantize),) if plan.quantize != "none" else ()),
        ("pipeline.num_stages", str(plan.num_stages)),
        ("pipeline.split", str(split)),
        ("pipeline.num_slots", str(plan.num_slots)),
        ("pipeline.max_sequences_per_slot", str(plan.max_sequences_per_slot)),
        ("pipeline.max_tokens_per_step", str(plan.max_tokens_per_step)),
        ("pipeline.transport", plan.transport),
        ("pipeline.device", plan.device),
        ("pipeline.attention", plan.attention),
        ("pipeline.lookahead", str(plan.lookahead)),
        ("pipeline.prefill", plan.prefill),
        ("pipeline.threads_per_rank", str(plan.threads_per_rank)),
        ("memory.kv_cache", plan.kv_cache),
        ("memory.page_size_tokens", str(plan.page_size_tokens)),
        ("memory.num_kv_pages", str(plan.num_kv_pages)),
        ("memory.max_context_tokens", str(plan.max_context_tokens)),
        *(
            (("memory.cuda_graphs", str(plan.cuda_graphs).lower()),)
            if plan.device == "cuda"
            else ()
        ),
    )
