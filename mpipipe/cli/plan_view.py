"""The answer of `mpipipe plan` in words: one screen."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpipipe.planning.arrangements import fastest, quickest
from mpipipe.planning.cost import kv_page_bytes
from mpipipe.planning.gpu_table import known_gpus
from mpipipe.planning.memory import gib
from mpipipe.planning.offload_advice import figure
from mpipipe.planning.tensor_parallel import lane_spec

if TYPE_CHECKING:
    from mpipipe.planning.advice import Advice
    from mpipipe.planning.arrangements import Arrangement
    from mpipipe.planning.bottleneck import Bottleneck
    from mpipipe.planning.plan import PipelinePlan, StagePlan
    from mpipipe.planning.planned_job import Outlook, PlannedJob

__all__ = ["answer_lines", "arrangement_lines", "refusal_lines"]

_WIDTH = 100
_LABEL = 11
_HEADINGS = (
    "stage", "on", "layers", "weights", "KV cache", "offloaded", "prompt step", "decode step",
    "idle",
)  # fmt: skip
_WAYS = (
    "replicas", "stages", "lanes", "tokens/s", "wall-clock", "one request", "a token of it", ""
)  # fmt: skip


def answer_lines(
    outlook: Outlook, bottleneck: Bottleneck | None, advice: Sequence[Advice], where: str
) -> list[str]:
    """What fits where, how fast, and what would help."""
    plan, forecast = outlook.plan, outlook.forecast
    quantize = f", {plan.quantize}" if plan.quantize != "none" else ""
    heading = f"{_model(outlook.job)}, {plan.dtype}{quantize}: fits {where}"
    lines = [heading, *_needs(outlook.job), *_told("prompts", _prompts(outlook.job)), ""]
    lines += [*_table(outlook), ""]
    lines += _told("tokens/s", _throughput(outlook))
    lines += _told("batch", _batch(outlook))
    lines += _told("wall-clock", _wall_clock(outlook))
    if forecast.energy_j is not None:
        lines += _told("energy", _energy(forecast.energy_j, outlook))
    if bottleneck is not None:
        lines += _told(
            "bottleneck",
            f"{bottleneck.resource}: twice as fast would give {_gain(bottleneck.gain)}; stage "
            f"{bottleneck.stage} sets the pace",
        )
    lines += _advice(advice, "nothing that was tried gives 2 % more")
    return lines + _told("rates", forecast.source)


def refusal_lines(
    job: PlannedJob, problem: str, fitting: Sequence[Advice], where: str
) -> list[str]:
    """Why nothing fits, and what would."""
    heading = f"{_model(job)}: does not fit {where}"
    lines = [heading, *_needs(job), *_told("prompts", _prompts(job))]
    lines += _told("problem", problem)
    if not fitting:
        return lines + _told("would fit", "nothing that was tried")
    told = [f"{advice.change}: {figure(advice.tokens_per_s)} tokens/s" for advice in fitting]
    return lines + _listed("would fit", told)


def arrangement_lines(ways: Sequence[Arrangement]) -> list[str]:
    """Stages, lanes and replicas compared, and which is best for what; nothing without `ways`."""
    if not ways:
        return []
    best, soonest = fastest(ways), quickest(ways)
    lines = ["", *_aligned([_WAYS, *map(_way, ways)])]
    if best is not None:
        lines += _told("throughput", f"{best.words}: {figure(best.tokens_per_s)} tokens/s")
    if soonest is not None:
        lines += _told("latency", f"{soonest.words}: a request in {_seconds(soonest.request_s)}")
    return lines


def _way(way: Arrangement) -> tuple[str, ...]:
    counts = (str(way.replicas), str(way.stages), str(way.lanes))
    if way.problem:
        return (*counts, "–", "–", "–", "–", way.problem.partition(":")[0])
    figures = (figure(way.tokens_per_s), _duration(way.wall_clock_s))
    return (*counts, *figures, _seconds(way.request_s), _seconds(way.token_s), "")


def _model(job: PlannedJob) -> str:
    name = job.model_path.rstrip("/").rpartition("/")[2]
    return f"{name} ({job.spec.architecture or job.spec.model_type}, {job.spec.num_layers} layers)"


def _needs(job: PlannedJob) -> list[str]:
    """What must be set for these cards, and is not."""
    needs = [note for note in job.notes if note.setting == "model.dtype"]
    return [line for n in needs for line in _told("needs", f"{n.setting}={n.value}: {n.reason}")]


def _prompts(job: PlannedJob) -> str:
    prompts = [prompt for prompt, _ in job.prompts.lengths]
    outputs = [output for _, output in job.prompts.lengths]
    middle = f"median {statistics.median_low(prompts):,}, " if min(prompts) < max(prompts) else ""
    told = (
        f"{len(prompts):,} of {_span(prompts)} tokens ({middle}{sum(prompts):,} in all), up to "
        f"{_span(outputs)} new ones each ({job.prompts.source})"
    )
    if job.prompts.num_rejected:
        told += f"; {job.prompts.num_rejected:,} more cannot be run"
    return told


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


# ---- the stages ----------------------------------------------------------------------------------


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """In columns; what stands last in a row may be long."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  ".join(
            f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)
        ).rstrip()
        for row in rows
    ]


def _table(outlook: Outlook) -> list[str]:
    """The stages; of replicas that are alike those of the first."""
    rows: list[tuple[str, ...]] = [_HEADINGS]
    shown: set[tuple[tuple[str, ...], ...]] = set()
    for plan in outlook.plans:
        found = [_row(outlook, plan, stage) for stage in plan.stages]
        kind = tuple(_kind(row) for row in found)
        rows += found * (kind not in shown)
        shown.add(kind)
    lines = _aligned(rows)
    alike = len(outlook.plans) - len(shown)
    return [*lines, f"and {alike} more replica{'s' * (alike > 1)} like them"] if alike else lines


def _kind(row: tuple[str, ...]) -> tuple[str, ...]:
    """The row without its host and how busy it is."""
    return (row[1].partition(" of ")[0], *row[2:-1])


def _row(outlook: Outlook, plan: PipelinePlan, stage: StagePlan) -> tuple[str, ...]:
    expected = next(
        each
        for each in outlook.forecast.stages
        if (each.replica, each.stage) == (plan.replica, stage.stage)
    )
    rank = next(rank for rank in outlook.job.ranks if rank.rank == stage.rank)
    card = (outlook.job.table or known_gpus()).find(rank.gpu.name)
    device = "CPU" if plan.device == "cpu" else card.key if card is not None else rank.gpu.name
    if plan.tensor_parallel > 1:
        device = f"{plan.tensor_parallel} x {device}"
    parts = [_span((stage.first_layer, stage.last_layer - 1))]
    parts = ["emb"] * stage.has_embedding + parts + ["head"] * stage.has_head
    page_bytes = kv_page_bytes(
        lane_spec(outlook.job.spec, plan.tensor_parallel),
        plan.dtype,
        num_layers=stage.num_layers,
        page_size_tokens=plan.page_size_tokens,
        row_multiple=8 if plan.device == "cuda" else 1,
    )
    tokens = plan.num_kv_pages * plan.page_size_tokens
    return (
        str(stage.stage) if plan.num_replicas == 1 else f"{plan.replica}.{stage.stage}",
        f"{device} of {stage.host}",
        "+".join(parts),
        gib(stage.weight_bytes),
        f"{tokens:,} tokens, {gib(page_bytes * plan.num_kv_pages)}",
        _offloaded(stage),
        _seconds(expected.prefill_step_s),
        _seconds(expected.decode_step_s),
        f"{expected.bubble:.0%}",
    )


def _offloaded(stage: StagePlan) -> str:
    if stage.offload is None:
        return "nothing"
    tiers = (("host", stage.offload.host_bytes), ("disk", stage.offload.disk_bytes))
    return ", ".join(f"{gib(size)} {tier}" for tier, size in tiers if size)


# ---- the job -------------------------------------------------------------------------------------


def _throughput(outlook: Outlook) -> str:
    forecast, decoding = outlook.forecast, ""
    if forecast.decode_round_s:
        lengths = outlook.job.prompts.lengths
        num_decoded = sum(output for _, output in lengths) - len(lengths)
        decoding = f"; {figure(num_decoded / forecast.decode_s)} while decoding, a token of each "
        decoding += f"sequence every {_seconds(forecast.decode_round_s)}"
    return (
        f"{figure(forecast.tokens_per_s)} of the whole job, bubble {forecast.bubble:.0%}{decoding}"
    )


def _batch(outlook: Outlook) -> str:
    plan, forecast = outlook.plan, outlook.forecast
    longest = max(map(sum, outlook.job.prompts.lengths))
    held = plan.num_kv_pages // -(-longest // plan.page_size_tokens)
    slots = f"{plan.num_slots} slot{'s' * (plan.num_slots > 1)}"
    if plan.num_replicas > 1:
        slots = f"{plan.num_replicas} replicas with {slots}"
    told = (
        f"{slots} of up to {plan.max_sequences_per_slot} rows, {forecast.rows_per_slot:.3g} in the "
        f"mean; the cache holds {held:,} sequences of {longest:,} tokens"
    )
    if forecast.num_preemptions:
        anew, saved = forecast.num_preemptions - forecast.num_saved, forecast.num_saved
        waiting = [f"{saved:,} wait in host memory"] * (saved > 0)
        waiting += [f"{anew:,} are computed twice"] * (anew > 0)
        told += f", so about {' and '.join(waiting)}"
    return told


def _wall_clock(outlook: Outlook) -> str:
    forecast, compiling = outlook.forecast, ""
    if forecast.compile_s:
        compiling = (
            f" ({_duration(forecast.compile_s)} of it for kernels that are not known to be "
            "compiled: see `mpipipe warm`)"
        )
    return (
        f"{_duration(forecast.wall_clock_s)} for these prompts: start-up "
        f"{_duration(forecast.startup_s)}{compiling}, prompts {_duration(forecast.prefill_s)}, "
        f"decoding {_duration(forecast.decode_s)}"
    )


def _energy(joules: float, outlook: Outlook) -> str:
    tokens = sum(output for _, output in outlook.job.prompts.lengths)
    told = f"{figure(joules / 1000)} kJ" if joules >= 1000 else f"{figure(joules)} J"
    return f"{told} while generating, {joules / tokens:.2g} J a token, GPUs alone"


def _advice(advice: Sequence[Advice], nothing: str) -> list[str]:
    if not advice:
        return _told("would help", nothing)
    told = [f"{_gain(each.gain)}, {figure(each.tokens_per_s)}: {each.change}" for each in advice]
    return _listed("would help", told)


def _gain(gain: float) -> str:
    """As a share of the tokens per second, or as a factor where that is large."""
    return f"+{gain:.0%}" if gain < 1 else f"{1 + gain:.2g} times the tokens/s"


# ---- words ---------------------------------------------------------------------------------------


def _told(label: str, text: str) -> list[str]:
    """A label, and the text beside it in lines."""
    indent = " " * (_LABEL + 1)
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{label:<{_LABEL}} ",
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def _listed(label: str, entries: Sequence[str]) -> list[str]:
    lines = []
    for number, entry in enumerate(entries, 1):
        lines += _told(label if number == 1 else "", f"{number}. {entry}")
    return lines


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
