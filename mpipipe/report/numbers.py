"""Numbers as words: three or four digits that count, intervals, runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpipipe.experiments.statistics import Spread

__all__ = ["NOTHING", "count", "interval", "measured", "number"]

NOTHING = "–"


def number(value: float | None) -> str:
    """Three digits that count: 1,234 · 123 · 12.3 · 1.23 · 0.123 · 0.00012 · < 0.0001."""
    if value is None:
        return NOTHING
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    if size >= 0.01:
        return f"{value:.3f}"
    return f"{value:.2g}" if size >= 0.0001 else "< 0.0001"


def interval(found: Spread | None) -> str:
    """The interval; empty where one value has none."""
    if found is None or found.low == found.high:
        return ""
    return f"{number(found.low)}–{number(found.high)}"


def measured(found: Spread) -> str:
    """A ratio with its interval, in a sentence: 1.52 (1.48–1.57)."""
    around = interval(found)
    return f"{number(found.median)} ({around})" if around else number(found.median)


def count(num: int, noun: str) -> str:
    """1 run, 2 runs; 1 launch, 2 launches."""
    ending = "" if num == 1 else "es" if noun.endswith("ch") else "s"
    return f"{num:,} {noun}{ending}"
