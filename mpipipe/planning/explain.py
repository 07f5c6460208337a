"""A plan as text: the table that `mpipipe plan` prints and the log keeps.

A row is a tuple of cells; the command line adds colours and boxes.
"""

from __future__ import annotations

from mpipipe.planning.memory import gib
from mpipipe.planning.plan import PipelinePlan, StageOffload, StagePlan, StepForecast

__all__ = ["plan_lines", "plan_rows"]

# Said only where there is something to say.
_SAID = (
    "memory.offload",
    "memory.host_bytes",
    "memory.kv_host",
    "pipeline.layout",
    "pipeline.replica_ranks",
    "pipeline.bind",
    "model.rotary",
    "generation.",
    "generation_config.",
    "forecast.times",
)


def plan_rows(plan: PipelinePlan) -> tuple[tuple[str, str, str], ...]:
    """Stages, where they lie, what the model decides, then settings.

    Each is a name, a value, and a reason or "as configured".
    """
    stages = tuple(row for stage in plan.stages for row in _stage_rows(stage))
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
    whose = f" of replica {plan.replica}" if plan.num_replicas > 1 else ""
    heading = (
        f"plan {plan.content_hash()}{whose}: {plan.architecture}, {plan.num_layers} layers on "
        f"{plan.num_stages} stage{'s' * (plan.num_stages > 1)}, {plan.model_path}"
    )
    lines = [
        f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip()
        for name, value, reason in rows
    ]
    return [heading, *lines]


def _stage_rows(stage: StagePlan) -> list[tuple[str, str, str]]:
    """The stage, and below it where its weights stand if they do not all stay on its device."""
    row, offload = _stage_row(stage), stage.offload
    name, cache = row[0], stage.kv_in_host
    rows = [row]
    if cache is not None:
        where = f"{len(cache.layers)} of {stage.num_layers} layers in host memory"
        read = f"a full step reads {gib(cache.step_bytes)} there, {_ms(cache.step_s)}"
        rows.append((f"{name} KV cache", where, read))
    if offload is None:
        return rows
    weights = (f"{name} weights", _places(stage, offload), _held(offload))
    return [*rows, weights, (f"{name} step", _brought(offload), _takes(offload.forecast))]


def _places(stage: StagePlan, offload: StageOffload) -> str:
    by_tier: dict[str, list[str]] = {"host": [], "disk": []}
    for tier, layers in (("host", offload.host_layers), ("disk", offload.disk_layers)):
        if layers:
            by_tier[tier].append(f"{len(layers)} of {stage.num_layers} layers")
    for part, tier in (("embedding", offload.embedding), ("LM head", offload.head)):
        if tier != "device":
            by_tier[tier].append(part)
    names = {"host": "host memory", "disk": "disk"}
    return ", ".join(
        f"{' + '.join(parts)} {'in' if tier == 'host' else 'on'} {names[tier]}"
        for tier, parts in by_tier.items()
        if parts
    )


def _held(offload: StageOffload) -> str:
    held = [f"{gib(offload.device_bytes)} on the device"]
    if offload.num_buffers:
        plural = "s" * (offload.num_buffers > 1)
        held[0] += f" with {offload.num_buffers} staging buffer{plural}"
    held += [f"{gib(offload.host_bytes)} in host memory"] * (offload.host_bytes > 0)
    held += [f"{gib(offload.disk_bytes)} on disk"] * (offload.disk_bytes > 0)
    return ", ".join(held)


def _brought(offload: StageOffload) -> str:
    forecast = offload.forecast
    brought = forecast.host_bytes + forecast.disk_bytes
    what = gib(brought) if brought else "only the embedding's rows"
    return f"brings {what} for each step of {forecast.rows} rows"


def _takes(forecast: StepForecast) -> str:
    """The step's time, what bounds it, and what it would be without offload."""
    parts = [f"compute {_ms(forecast.compute_s)}"]
    if forecast.link_s and forecast.host_bytes:
        parts.append(f"link {_ms(forecast.link_s)} at {forecast.host_bytes_per_s / 1e9:.1f} GB/s")
    if forecast.kv_s:
        parts.append(f"KV cache in host memory {_ms(forecast.kv_s)}")
    if forecast.disk_s:
        parts.append(f"disk {_ms(forecast.disk_s)} at {forecast.disk_bytes_per_s / 1e9:.2g} GB/s")
    if forecast.lookup_s > forecast.step_s / 100:
        parts.append(f"embedding rows {_ms(forecast.lookup_s)}")
    step = f"a step takes {_ms(forecast.step_s)}, bound by {forecast.bound_by}"
    return f"{step} ({', '.join(parts)})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _stage_row(stage: StagePlan) -> tuple[str, str, str]:
    first, last = stage.first_layer, stage.last_layer - 1
    parts = [f"layers {first}–{last} ({stage.num_layers})" if first < last else f"layer {first}"]
    if stage.has_embedding:
        parts.insert(0, "embedding")
    if stage.has_head:
        parts.append("LM head")
    each = " each" if len(stage.ranks) > 1 else ""
    numbers = ", ".join(map(str, stage.ranks))
    facts = (
        f"rank{'s' * (len(stage.ranks) > 1)} {numbers} on {stage.host}, "
        f"{gib(stage.weight_bytes)} of weights{each}, {stage.cost_share:.1%} of a round"
    )
    return f"stage {stage.stage}", " + ".join(parts), facts


def _sharing(plan: PipelinePlan) -> str:
    if 0 < plan.max_sharing_tokens < plan.max_context_tokens:
        return f"up to {plan.max_sharing_tokens} tokens"
    return str(plan.max_sharing_tokens > 0).lower()


def _settings(plan: PipelinePlan) -> tuple[tuple[str, str], ...]:
    split = [stage.num_layers for stage in plan.stages]
    return (
        ("model.dtype", plan.dtype),
        ("model.weights", plan.weights),
        *((("model.quantize", plan.quantize),) if plan.quantize != "none" else ()),
        *((("pipeline.replicas", str(plan.num_replicas)),) if plan.num_replicas > 1 else ()),
        ("pipeline.num_stages", str(plan.num_stages)),
        *(
            (("pipeline.tensor_parallel", str(plan.tensor_parallel)),)
            if plan.tensor_parallel > 1
            else ()
        ),
        ("pipeline.split", str(split)),
        ("pipeline.num_slots", str(plan.num_slots)),
        ("pipeline.max_sequences_per_slot", str(plan.max_sequences_per_slot)),
        ("pipeline.max_tokens_per_step", str(plan.max_tokens_per_step)),
        ("pipeline.transport", plan.transport),
        ("pipeline.device", plan.device),
        ("pipeline.attention", plan.attention),
        ("pipeline.lookahead", str(plan.lookahead)),
        ("pipeline.num_speculative_tokens", str(plan.drafts.max_tokens if plan.drafts else 0)),
        ("pipeline.prefill", plan.prefill),
        ("pipeline.threads_per_rank", str(plan.threads_per_rank)),
        ("memory.kv_cache", plan.kv_cache),
        ("memory.share_prefixes", _sharing(plan)),
        *(
            (("memory.read_prefixes_once", str(plan.read_prefixes_once).lower()),)
            if plan.device == "cuda"
            else ()
        ),
        ("memory.page_size_tokens", str(plan.page_size_tokens)),
        ("memory.num_kv_pages", str(plan.num_kv_pages)),
        ("memory.max_context_tokens", str(plan.max_context_tokens)),
        *(
            (("memory.cuda_graphs", str(plan.cuda_graphs).lower()),)
            if plan.device == "cuda"
            else ()
        ),
    )
