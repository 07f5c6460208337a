"""Charts as SVG for inlining: the only file that imports matplotlib, and only when it draws.

Equal charts give equal bytes under one version of matplotlib: fixed ids, no date, text as paths, so
that no font of the reader changes the layout. The colours are the page's, light or dark.
"""

from __future__ import annotations

import html
import importlib.util
import io
import re
from typing import TYPE_CHECKING, Any

from mpipipe.report.charts import BarChart, LaneChart, LineChart

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.report.charts import Chart, Curve

__all__ = ["can_draw", "draw"]

_WIDTH_IN = 7.2
_HEIGHT_IN = 4.3
_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "mpipipe",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.5,
    "errorbar.capsize": 4.0,
}
# Drawn with these, and then replaced by the page's names for them.
_INK = "#010203"
_CARD = "#fdfefc"
_COLORS = tuple(f"#0{number}0f0e" for number in range(7))
_MARKERS = "osD^vPX"
_STYLES: dict[str, dict[str, Any]] = {
    "ideal": {"linewidth": 1.0, "zorder": 1.5},
    "ceiling": {"linestyle": (0, (2, 1.5))},
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))  # of curves over time
_BAR = 0.82
# Of an entry of the legend, about: its sample with the gaps, and each letter.
_HANDLE_PT, _LETTER_PT = 48, 6.6
_GROUP_GAP = 0.7


def can_draw() -> bool:
    """Whether the extra `report` is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(chart: Chart, number: int) -> str:
    """The `<svg>` element of a chart, with its title inside for readers that cannot see.

    Args:
        chart: what to draw.
        number: of the plot on its page; makes the ids unique.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    )
    with rc_context({**_SETTINGS, **ink, "grid.color": _INK}):
        figure = Figure(figsize=(_WIDTH_IN, _height_in(chart)), layout="constrained")
        axes = figure.add_subplot()
        match chart:
            case LineChart():
                _lines(axes, chart)
            case BarChart():
                _bars(axes, chart)
            case LaneChart():
                _lanes(axes, chart)
        _legend(figure, axes, chart)
        file = io.StringIO()
        plain = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=plain)
    return _inlined(file.getvalue(), chart, number)


def _height_in(chart: Chart) -> float:
    return 2.0 + 0.42 * len(chart.lanes) if isinstance(chart, LaneChart) else _HEIGHT_IN


# ---- kinds ---------------------------------------------------------------------------------------


def _lines(axes: Any, chart: LineChart) -> None:
    for curve in chart.curves:
        _curve(axes, curve)
    for marker in chart.markers:
        axes.axvline(marker.x, color=_INK, linewidth=1.2, linestyle=(0, (3, 3)))
        axes.annotate(
            marker.label,
            (marker.x, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 5),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=10,
        )
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if chart.x_from_zero:
        axes.set_xlim(left=0)
    if chart.log_x:
        _measured_ticks(axes.xaxis, axes.set_xscale, _places(chart))
    if chart.log_y:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(_plain_number)
    else:
        axes.set_ylim(bottom=0, top=chart.y_top or axes.get_ylim()[1] * 1.05)


def _places(chart: LineChart) -> list[float]:
    measured = [x for curve in chart.curves for x in curve.x]
    return [*measured, *(marker.x for marker in chart.markers)]


def _curve(axes: Any, curve: Curve) -> None:
    color = _INK if curve.kind == "ideal" else _COLORS[curve.color]
    if curve.kind == "measured":
        errors = None
        if curve.low:
            below = [y - low for y, low in zip(curve.y, curve.low, strict=True)]
            above = [high - y for y, high in zip(curve.y, curve.high, strict=True)]
            errors = [below, above]
        marker = _MARKERS[curve.color]
        axes.errorbar(curve.x, curve.y, errors, color=color, marker=marker, label=curve.label)
        return
    style = _STYLES.get(curve.kind) or {"linestyle": _DASHES[curve.color % len(_DASHES)]}
    axes.plot(curve.x, curve.y, color=color, label=curve.label, **style)


def _measured_ticks(axis: Any, set_scale: Callable[..., None], values: list[float]) -> None:
    set_scale("log", base=2)
    ticks = sorted(set(values))
    axis.set_ticks(ticks, [_plain_number(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def _plain_number(value: float, _position: int = 0) -> str:
    return f"{value:,.10g}"


def _bars(axes: Any, chart: BarChart) -> None:
    places: list[float] = []
    names: list[str] = []
    at = 0.0
    for group, bars in chart.groups:
        start = at
        for name in bars:
            places.append(at)
            names.append(name)
            at += 1.0
        axes.annotate(
            group,
            ((start + at - 1) / 2, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -22),
            textcoords="offset points",
            ha="center",
            va="top",
        )
        at += _GROUP_GAP
    bottoms = [0.0] * len(places)
    for part in chart.parts:
        axes.bar(
            places,
            part.values,
            _BAR,
            bottoms,
            color=_COLORS[part.color],
            edgecolor=_CARD,
            linewidth=0.6,
            label=part.label,
        )
        bottoms = [low + value for low, value in zip(bottoms, part.values, strict=True)]
    axes.set_xticks(places, names, fontsize=10)
    axes.set_xlabel(chart.x_label, labelpad=20 if any(name for name, _ in chart.groups) else 4)
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(chart.y_label)
    axes.set_ylim(bottom=0)


def _lanes(axes: Any, chart: LaneChart) -> None:
    for color, label in enumerate(chart.legend):
        spans = [span for span in chart.spans if span.color == color]
        for lane in range(len(chart.lanes)):
            times = [(span.start_s, span.length_s) for span in spans if span.lane == lane]
            axes.broken_barh(times, (lane - 0.38, 0.76), facecolor=_COLORS[color], linewidth=0)
        axes.barh([0], [0], left=chart.spans[0].start_s, color=_COLORS[color], label=label)
    axes.set_yticks(range(len(chart.lanes)), chart.lanes)
    axes.set_ylim(len(chart.lanes) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("time since generating began (s)")


def _legend(figure: Any, axes: Any, chart: Chart) -> None:
    """Above the plot, in the order of the chart."""
    handles, labels = axes.get_legend_handles_labels()
    if isinstance(chart, LineChart):
        order = [curve.label for curve in chart.curves]
        pairs = sorted(zip(handles, labels, strict=True), key=lambda pair: order.index(pair[1]))
        handles, labels = [handle for handle, _ in pairs], [label for _, label in pairs]
    if len(labels) > 1:
        width = _HANDLE_PT + _LETTER_PT * max(map(len, labels))
        columns = max(1, min(4, int(72 * _WIDTH_IN / width)))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=10.5)


# ---- into the page -------------------------------------------------------------------------------


def _inlined(text: str, chart: Chart, number: int) -> str:
    """The element alone, its ids its own, its colours those of the page."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>p{number}-", svg)
    svg = svg.replace(_INK, "currentColor").replace(_CARD, "var(--card)")
    for color, value in enumerate(_COLORS):
        svg = svg.replace(value, f"var(--c{color})")
    title = html.escape(chart.title)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None, svg[:200]
    head = f'<svg {size.group()} role="img" aria-label="{title}" xmlns:xlink='
    head += '"http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg">'
    return f"{head}\n<title>{title}</title>{svg[svg.index('>') + 1 :]}".rstrip()
