"""How a simulated job looks: tables on the terminal, JSON, and a Perfetto trace."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from mpipipe.errors import OutputError
from mpipipe.metrics.trace import trace_document

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpipipe.metrics.accounting import StepRecord
    from mpipipe.simulation.recorded_run import Measured
    from mpipipe.simulation.result import SimulationResult, StageResult

__all__ = ["result_fields", "show_result", "write_trace"]

_WIDTH = 140  # where the output is no terminal
_MOST_STAGES = 12  # of more, those that are alike are shown as one
_ALIKE = 0.01  # in their bubbles
_COLUMNS = (
    "stage",
    "host",
    "layers",
    "compute",
    "wait",
    "transfer",
    "send",
    "idle",
    "bubble",
    "steady",
)


def show_result(
    result: SimulationResult,
    source: str,
    *,
    measured: Measured | None = None,
    forecast: float | None = None,
) -> None:
    """Print it.

    Args:
        result: of the simulation.
        source: where the times come from.
        measured: what a real run took.
        forecast: tokens/s by `mpipipe plan`.
    """
    print(f"simulated: {_size(result)}; times: {source}")
    print(
        f"{result.tokens_per_s:,.1f} tokens/s: {result.num_completed:,} of "
        f"{result.num_requests:,} prompts, {result.num_output_tokens:,} tokens in "
        f"{result.elapsed_s:,.3f} s; bubble {result.bubble:.1%}"
    )
    if measured is not None:
        print(_comparison(result, measured))
    if forecast is not None:
        print(f"`mpipipe plan` forecasts {forecast:,.1f} tokens/s from the same step times")
    print(
        f"first token {_seconds(result.ttft_p50_s)} p50 · {_seconds(result.ttft_p95_s)} p95; "
        f"completion {_seconds(result.latency_p50_s)} p50 · {_seconds(result.latency_p95_s)} p95"
    )
    if result.num_shared_tokens:
        print(f"{result.num_shared_tokens:,} prompt tokens in shared prefixes, not computed")
    if result.num_preemptions:
        print(
            f"{result.num_preemptions:,} preemptions, {result.num_recomputed_tokens:,} tokens "
            "computed again"
        )
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(_table(result, measured))
    print("\n".join(_load_lines(result)))
    for line in result.deadlocks:
        print(f"deadlock: {line}")


def result_fields(
    result: SimulationResult, source: str, measured: Measured | None
) -> dict[str, Any]:
    """For JSON: the fields of `result`, what follows from them, and what a real run took."""
    fields = dataclasses.asdict(result)
    fields |= {
        "tokens_per_s": result.tokens_per_s,
        "bubble": result.bubble,
        "times": source,
        "simulated": True,
    }
    for stage, stage_fields in zip(result.stages, fields["stages"], strict=True):
        stage_fields["bubble"] = stage.bubble
    if measured is not None:
        fields["measured"] = {
            **dataclasses.asdict(measured),
            "tokens_per_s": measured.tokens_per_s,
        }
    return fields


def write_trace(path: Path, records: dict[int, list[StepRecord]], result: SimulationResult) -> None:
    """Write the last steps of replica 0 for Perfetto.

    Raises:
        OutputError: the file cannot be written.
    """
    names = {stage.stage: f"stage {stage.stage} on {stage.host}" for stage in result.stages}
    document = trace_document(records, names=names, offsets_s={})
    try:
        path.write_text(json.dumps(document), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror}): choose another --trace file"
        ) from error


def _size(result: SimulationResult) -> str:
    stages = f"{result.num_stages} stage{'s' * (result.num_stages > 1)}"
    took = f"{result.num_steps:,} steps in {result.simulation_s:.1f} s"
    if result.num_replicas == 1:
        return f"{stages}, {took}"
    shown = f"{result.num_replicas:,} replicas of {stages}"
    if result.num_simulated_replicas < result.num_replicas:
        shown += f" ({result.num_simulated_replicas} stand for all, with their share of prompts)"
    return f"{shown}, {took}"


def _comparison(result: SimulationResult, measured: Measured) -> str:
    error = result.tokens_per_s / measured.tokens_per_s - 1
    return (
        f"measured: {measured.tokens_per_s:,.1f} tokens/s in {measured.generate_s:,.3f} s; "
        f"the simulation is {abs(error):.1%} {'above' if error >= 0 else 'below'}"
    )


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3f} s"


def _table(result: SimulationResult, measured: Measured | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    columns = _COLUMNS if measured is None else (*_COLUMNS, "measured")
    for column in columns:
        table.add_column(column, justify="left" if column == "host" else "right", no_wrap=True)
    for alike in _groups(result.stages):
        row = _row(alike)
        if measured is not None:
            row = (*row, f"{measured.bubble_ratios[alike[0].stage]:.1%}")
        table.add_row(*row)
    return table


def _groups(stages: Sequence[StageResult]) -> list[list[StageResult]]:
    """Each alone; of many those that follow each other and are alike together."""
    groups: list[list[StageResult]] = []
    for stage in stages:
        first = groups[-1][0] if groups and len(stages) > _MOST_STAGES else None
        if (
            first is not None
            and first.num_layers == stage.num_layers
            and abs(first.bubble - stage.bubble) < _ALIKE
        ):
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _row(alike: Sequence[StageResult]) -> tuple[str, ...]:
    """Of the first of them; their numbers and hosts."""
    stage, last = alike[0], alike[-1]
    parts = (stage.compute_s, stage.wait_s, stage.transfer_s, stage.send_s, stage.idle_s)
    total_s = sum(parts) or 1.0
    steady = stage.steady_bubble
    return (
        _span(str(stage.stage), str(last.stage)),
        _span(stage.host, last.host),
        str(stage.num_layers),
        *[f"{part_s:,.2f} s {part_s / total_s:4.0%}" for part_s in parts],
        f"{stage.bubble:.1%}",
        "–" if steady is None else f"{max(0.0, steady):.1%}",
    )


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first}–{last}"


def _load_lines(result: SimulationResult) -> list[str]:
    head, dispatch = result.head, result.dispatch
    to_stages = (
        f"rank 0 to its own stages: {head.messages_per_s:,.0f} messages/s, "
        f"{head.bytes_per_s / 1e6:,.3f} MB/s, busy {head.busy_share:.1%}"
    )
    if dispatch is None:
        return [to_stages, *result.notes]
    dispatching = (
        f"rank 0 dispatching: {dispatch.requests_per_s:,.1f} prompts/s, "
        f"{dispatch.messages_per_s:,.1f} messages/s, {dispatch.bytes_per_s / 1e6:,.3f} MB/s, "
        f"busy {dispatch.busy_share:.2%}; a message waits at most "
        f"{dispatch.longest_queue_s * 1e3:,.2f} ms"
    )
    spread = f"replicas end within {result.replica_end_spread_s:,.3f} s"
    return [to_stages, dispatching, spread, *result.notes]
