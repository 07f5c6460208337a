"""What is plotted: values with their units, labels and scales; `plots` draws it.

Colours are numbers: 0 to 6 of the page's palette.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BarChart", "Chart", "Curve", "LaneChart", "LineChart", "Marker", "Part", "Span"]

CurveKind = Literal["measured", "ideal", "ceiling", "time"]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one line; `low` and `high` are the ends of error bars, empty without."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: int
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    kind: CurveKind = "measured"


@dataclass(frozen=True, slots=True)
class Marker:
    """A vertical line with its words."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class LineChart:
    """Curves over x. `log_x`: a tick at each measured x; a linear y begins at zero."""

    title: str
    caption: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log_x: bool = False
    log_y: bool = False
    x_from_zero: bool = False
    y_top: float | None = None  # of a linear axis; None: a little above the highest point
    markers: tuple[Marker, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """One layer of all bars."""

    label: str
    values: tuple[float, ...]  # one per bar
    color: int


@dataclass(frozen=True, slots=True)
class BarChart:
    """Stacked bars from zero; bars of one group stand together."""

    title: str
    caption: str
    x_label: str
    y_label: str
    groups: tuple[tuple[str, tuple[str, ...]], ...]  # (its name, the names of its bars)
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A time in which a lane was busy."""

    lane: int
    start_s: float
    length_s: float
    color: int


@dataclass(frozen=True, slots=True)
class LaneChart:
    """Lanes, one below the other, with spans in the colours of `legend`."""

    title: str
    caption: str
    lanes: tuple[str, ...]
    spans: tuple[Span, ...]
    legend: tuple[str, ...]  # by color


Chart = LineChart | BarChart | LaneChart
