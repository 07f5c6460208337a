"""Curves over the time of one run: how busy each stage was, and tokens per second.

Pure; times are seconds since generating began, on rank 0's clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from mpipipe.report.charts import Curve, LaneChart, LineChart, Span

if TYPE_CHECKING:
    from mpipipe.logs.reading import Line
    from mpipipe.report.run_files import RunLines

__all__ = ["busy_shares", "occupancy_charts", "rate_curve"]

_MOST_BINS = 80
_MOST_POINTS = 200
_STEPS_PER_BIN = 4  # or a bin would show single steps
_NUM_SHOWN_STEPS = 24
_NUM_COLORS = 7


def rate_curve(label: str, points: Sequence[tuple[float, float]], color: int) -> Curve | None:
    """Tokens per second between successive samples, drawn at the middle of each interval.

    None: fewer than two samples, as of a run that ended before the second one.

    Args:
        label: of the curve.
        points: (seconds since generating began, output tokens so far), in the order of time.
        color: of the palette.
    """
    stride = max(1, math.ceil(len(points) / _MOST_POINTS))
    rates = [
        ((before[0] + after[0]) / 2, (after[1] - before[1]) / (after[0] - before[0]))
        for before, after in pairwise([*points[:-1:stride], *points[-1:]])
        if after[0] > before[0]
    ]
    if not rates:
        return None
    x, y = zip(*rates, strict=True)
    return Curve(label, x, y, color, kind="time")


def busy_shares(
    spans: Iterable[tuple[float, float]], start_s: float, end_s: float, num_bins: int
) -> list[float]:
    """The share of each bin of [start_s, end_s) that the spans (start, end) cover."""
    width = (end_s - start_s) / num_bins
    busy = [0.0] * num_bins
    for begin, end in spans:
        first = max(0, int((begin - start_s) / width))
        last = min(num_bins - 1, int((end - start_s) / width))
        for index in range(first, last + 1):
            left = start_s + index * width
            busy[index] += max(0.0, min(end, left + width) - max(begin, left))
    return [min(1.0, seconds / width) for seconds in busy]


def occupancy_charts(run: RunLines, name: str) -> list[LineChart | LaneChart]:
    """How full the pipeline was; nothing where no steps were written.

    Args:
        run: whose steps are shown.
        name: of the run, for the captions.
    """
    began_s = run.began_s
    if not run.steps or began_s is None:
        return []
    spans = {rank: _compute_spans(run, rank, began_s) for rank in run.steps}
    return [_occupancy(run, name, spans), _lanes(run, name, spans)]


def _compute_spans(run: RunLines, rank: int, began_s: float) -> list[tuple[float, float]]:
    return [
        (
            start := run.clocks.on_head(rank, _compute_start_s(line)) - began_s,
            start + line["compute_s"],
        )
        for line in run.steps[rank]
    ]


def _compute_start_s(line: Line) -> float:
    before = ("idle_s", "wait_s", "transfer_s", "overhead_s")
    return float(line["start_s"]) + sum(float(line.get(part) or 0.0) for part in before)


def _occupancy(run: RunLines, name: str, spans: dict[int, list[tuple[float, float]]]) -> LineChart:
    start = min(found[0][0] for found in spans.values())
    end = max(found[-1][1] for found in spans.values())
    num_bins = max(1, min(_MOST_BINS, max(map(len, spans.values())) // _STEPS_PER_BIN))
    width = (end - start) / num_bins
    middles = tuple(start + (index + 0.5) * width for index in range(num_bins))
    curves = [
        Curve(
            f"stage {_stage(run, rank)}",
            middles,
            tuple(100 * share for share in busy_shares(found, start, end, num_bins)),
            index % _NUM_COLORS,
            kind="time",
        )
        for index, (rank, found) in enumerate(spans.items())
    ]
    return LineChart(
        "Pipeline occupancy over time",
        f"Share of the time in which a stage computed, in {num_bins} equal intervals; {name}. "
        "From the last steps that were kept (log.steps).",
        "time since generating began (s)",
        "stage computes (%)",
        tuple(curves),
        y_top=105,
    )


def _lanes(run: RunLines, name: str, spans: dict[int, list[tuple[float, float]]]) -> LaneChart:
    """Some steps from the middle of the run, one by one."""
    longest = max(spans.values(), key=len)
    middle = len(longest) // 2
    shown = longest[max(0, middle - _NUM_SHOWN_STEPS // 2) : middle + _NUM_SHOWN_STEPS // 2 + 1]
    start, end = shown[0][0], shown[-1][1]
    slots = sorted({line["slot"] for lines in run.steps.values() for line in lines})
    return LaneChart(
        "Steps in the pipeline",
        f"When each stage computed, about {len(shown)} steps from the middle of the run; {name}. "
        "A slot is a place in the ring of micro-batches; a gap is a bubble.",
        tuple(f"stage {_stage(run, rank)}" for rank in spans),
        tuple(
            Span(lane, begin, stop - begin, slots.index(line["slot"]) % _NUM_COLORS)
            for lane, (rank, found) in enumerate(spans.items())
            for line, (begin, stop) in zip(run.steps[rank], found, strict=True)
            if stop >= start and begin <= end
        ),
        tuple(f"slot {slot}" for slot in slots[:_NUM_COLORS]),
    )


def _stage(run: RunLines, rank: int) -> int:
    stage = run.steps[rank][0].get("stage")
    return rank if stage is None else int(stage)
