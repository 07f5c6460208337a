"""The plots of an experiment, as charts. Pure.

A plot without a measured point is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpipipe.report.charts import BarChart, Curve, LineChart, Marker, Part
from mpipipe.report.figures import ITL_P50, ITL_P95, PARTS, TTFT
from mpipipe.report.timeline import rate_curve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpipipe.experiments.statistics import Spread
    from mpipipe.report.charts import Chart
    from mpipipe.report.figures import Figure
    from mpipipe.report.rows import Row, Section

__all__ = ["experiment_charts", "memory_limit_of", "parts_chart"]

_ARM_COLORS = {"memory-filling": 0, "fixed-total": 1, "weak": 0, "batch": 0, "arrangements": 0}
_RANKS = "ranks"
_MAX_CURVES = 7


def experiment_charts(section: Section, machine: str) -> list[Chart]:
    """All plots that the rows have values for; `machine`: where it ran, for the captions."""
    charts: list[Chart | None] = []
    if section.matrix.experiment == "batch":
        charts += [_batch_throughput(section, machine), _batch_latency(section, machine)]
    elif section.matrix.experiment == "arrangements":  # which have no order
        charts.append(_arrangement_throughput(section, machine))
    else:
        charts += [_speedup(section, machine), _efficiency(section, machine)]
    charts += [*_parts(section, machine), _rates(section.rows, machine)]
    return [chart for chart in charts if chart is not None]


# ---- speedup and efficiency ----------------------------------------------------------------------


def _speedup(section: Section, machine: str) -> LineChart | None:
    curves: list[Curve] = []
    for arm, rows in section.arms.items():
        found = [(row.size, row.speedup) for row in rows]
        curves += [*_curve(arm, found, _ARM_COLORS[arm]), *_ceiling(arm, rows, per_size=False)]
    if not any(curve.kind == "measured" for curve in curves):
        return None
    sizes = sorted({x for curve in curves for x in curve.x})
    ideal = tuple(size / sizes[0] for size in sizes)
    curves.append(Curve("ideal", tuple(sizes), ideal, 0, kind="ideal"))
    is_weak = section.matrix.experiment == "weak"
    return LineChart(
        f"Speedup over stages, {section.matrix.experiment} scaling",
        "Throughput over that of the smallest case of the arm; both axes are logarithmic; "
        f"{'the work grows with the stages' if is_weak else 'the same prompts'}. Bars: interval. "
        f"{machine}",
        _RANKS,
        "speedup (×)",
        tuple(curves),
        log_x=True,
        log_y=True,
    )


def _efficiency(section: Section, machine: str) -> LineChart | None:
    curves: list[Curve] = []
    for arm, rows in section.arms.items():
        found = [(row.size, row.efficiency) for row in rows]
        curves += [*_curve(arm, found, _ARM_COLORS[arm]), *_ceiling(arm, rows, per_size=True)]
    if not any(curve.kind == "measured" for curve in curves):
        return None
    sizes = sorted({x for curve in curves for x in curve.x})
    curves.append(Curve("ideal", tuple(sizes), (1.0,) * len(sizes), 0, kind="ideal"))
    return LineChart(
        f"Parallel efficiency over stages, {section.matrix.experiment} scaling",
        "Speedup over how many times as many stages there are; 1 is ideal. Bars: interval. "
        f"{machine}",
        _RANKS,
        "parallel efficiency (1 is ideal)",
        tuple(curves),
        log_x=True,
    )


def _curve(label: str, points: Sequence[tuple[int, Spread | None]], color: int) -> list[Curve]:
    """The measured points with their intervals; none without any."""
    found = [(float(x), spread) for x, spread in points if spread is not None]
    if not found:
        return []
    return [
        Curve(
            label,
            tuple(x for x, _ in found),
            tuple(spread.median for _, spread in found),
            color,
            tuple(spread.low for _, spread in found),
            tuple(spread.high for _, spread in found),
        )
    ]


def _ceiling(arm: str, rows: Sequence[Row], *, per_size: bool) -> list[Curve]:
    """What the cost model allows at best, relative to the same case as the measured ratios."""
    base = next((row for row in rows if row.case.name == row.base), None)
    if base is None or base.ceiling is None:
        return []
    points = [
        (
            float(row.size),
            row.ceiling.model_tokens_per_s
            / base.ceiling.model_tokens_per_s
            / (row.size / base.size if per_size else 1),
        )
        for row in rows
        if row.ceiling is not None
    ]
    x, y = zip(*points, strict=True)
    return [Curve(f"{arm}: ceiling", x, y, _ARM_COLORS[arm], kind="ceiling")]


# ---- replicas, stages and lanes ------------------------------------------------------------------


def _arrangement_throughput(section: Section, machine: str) -> BarChart | None:
    found = [(row, row.throughput.median) for row in section.rows if row.throughput is not None]
    if not found:
        return None
    return BarChart(
        "Throughput by arrangement of ranks",
        f"Output tokens per second while generating; from zero; medians. {machine}",
        "replicas × stages × lanes",
        "throughput (tokens/s)",
        tuple((row.case.arrangement, ("",)) for row, _ in found),
        (Part("measured", tuple(median for _, median in found), 0),),
    )


# ---- the batch sweep -----------------------------------------------------------------------------


def _batch_throughput(section: Section, machine: str) -> LineChart | None:
    rows = section.rows
    curves = _curve("measured", [(row.size, row.throughput) for row in rows], 0)
    if not curves:
        return None
    ceilings = [
        (float(row.size), row.ceiling.tokens_per_s)
        for row in rows
        if row.ceiling is not None and row.ceiling.tokens_per_s is not None
    ]
    if ceilings:
        x, y = zip(*ceilings, strict=True)
        curves.append(Curve("ceiling of the device", x, y, 0, kind="ceiling"))
    return LineChart(
        "Throughput over batch size",
        f"Output tokens per second while generating; from zero. Bars: interval. {machine}",
        "batch size (prompts in flight)",
        "throughput (tokens/s)",
        tuple(curves),
        log_x=True,
        markers=_batch_markers(section),
    )


def _batch_latency(section: Section, machine: str) -> LineChart | None:
    rows = section.rows
    curves = [
        *_figure_curve(rows, ITL_P50, "p50", 0),
        *_figure_curve(rows, ITL_P95, "p95", 1),
    ]
    label = "time between two tokens (ms)"
    if not curves:  # a run of an older version
        curves, label = _figure_curve(rows, TTFT, "p50", 0), "time to the first token (s)"
    if not curves:
        return None
    return LineChart(
        "Latency over batch size",
        f"What a larger batch costs each prompt; from zero. Bars: interval. {machine}",
        "batch size (prompts in flight)",
        label,
        tuple(curves),
        log_x=True,
        markers=_batch_markers(section),
    )


def _figure_curve(rows: Sequence[Row], figure: Figure, label: str, color: int) -> list[Curve]:
    return _curve(label, [(row.size, row.figures[figure.key]) for row in rows], color)


def _batch_markers(section: Section) -> tuple[Marker, ...]:
    knee, limit = section.verdict.knee, memory_limit_of(section.rows)
    return (
        *([Marker(float(knee), "knee")] if knee else []),
        *([Marker(float(limit.size), "does not fit")] if limit else []),
    )


def memory_limit_of(rows: Sequence[Row]) -> Row | None:
    """The smallest batch that did not fit into memory."""
    short = ("out_of_memory", "infeasible")
    for row in sorted(rows, key=lambda row: row.size):
        if row.throughput is None and any(failure.outcome in short for failure in row.failures):
            return row
    return None


# ---- where the time went -------------------------------------------------------------------------


def _parts(section: Section, machine: str) -> list[BarChart]:
    """One chart for each arm, as the bars of all would be too many for one."""
    name = section.matrix.experiment
    sizes = {"batch": "batch size", "arrangements": "replicas × stages × lanes"}
    charts = [
        parts_chart(
            [(_size(row), row.parts) for row in rows if row.parts],
            f"{sizes.get(name, 'number of stages')}, and above it each stage",
            f"Seconds of each stage while generating, and its reading of files before; medians. "
            f"{machine}",
            arm if len(section.arms) > 1 else "",
        )
        for arm, rows in section.arms.items()
    ]
    return [chart for chart in charts if chart is not None]


def _size(row: Row) -> str:
    return row.case.arrangement if row.case.arm == "arrangements" else f"{row.size:,}"


def parts_chart(
    groups: Sequence[tuple[str, Sequence[Mapping[str, float]]]],
    x_label: str,
    caption: str,
    arm: str = "",
) -> BarChart | None:
    """Stacked seconds of every stage; a group per case, a bar per stage."""
    bars = [parts for _, stages in groups for parts in stages]
    if not bars:
        return None
    return BarChart(
        f"Where the time of each stage went{f', {arm}' if arm else ''}",
        caption,
        x_label,
        "time (s)",
        tuple((name, tuple(str(n) for n in range(len(stages)))) for name, stages in groups),
        tuple(
            Part(part, tuple(bar.get(part, 0.0) for bar in bars), color)
            for color, part in enumerate(PARTS)
        ),
    )


def _rates(rows: Sequence[Row], machine: str) -> LineChart | None:
    curves: list[Curve] = []
    for row in rows:
        run = row.typical
        samples = run.samples if run is not None else ()
        points = [(sample.t_s, float(sample.num_output_tokens)) for sample in samples]
        curve = rate_curve(row.case.name, points, len(curves) % _MAX_CURVES)
        curves += [curve] if curve is not None else []
    if not curves:
        return None
    left_out = ""
    if len(curves) > _MAX_CURVES:
        left_out = f"Here are the first {_MAX_CURVES} of {len(curves)} cases. "
    return LineChart(
        "Tokens per second over time",
        "Between two samples of the run with the median throughput of each case. "
        f"{left_out}{machine}",
        "time since generating began (s)",
        "output tokens/s",
        tuple(curves[:_MAX_CURVES]),
        x_from_zero=True,
    )
