"""The requests of a run: the slowest ones, and percentiles over all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mpipipe.logs.reading import Line, number, text, whole
from mpipipe.metrics.summary import percentile

__all__ = ["MEASURES", "RequestFigures", "read_requests"]

MEASURES = ("queue_s", "ttft_s", "latency_s", "itl_p50_s", "itl_p95_s")
_PERCENTS = (50, 90, 95, 99, 100)


@dataclass(slots=True)
class RequestFigures:
    """What is told of all requests of one attempt, or of all."""

    num_completed: int = 0
    num_failed: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    slowest: list[Line] = field(default_factory=list)  # whole lines, the slowest first

    def percentiles(self) -> dict[str, dict[str, float | None]]:
        """By measure: p50, p90, p95, p99 and the largest."""
        return {
            name: {
                "max" if percent == 100 else f"p{percent}": percentile(values, percent)
                for percent in _PERCENTS
            }
            for name, values in self.values.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """What `mpipipe logs requests --json` prints."""
        return {
            "num_completed": self.num_completed,
            "num_failed": self.num_failed,
            "num_preemptions": self.num_preemptions,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
            "percentiles": self.percentiles(),
            "slowest": self.slowest,
        }


def read_requests(
    lines: Iterable[Line], *, num_slowest: int, only: str | None = None
) -> RequestFigures:
    """Sum up the lines of `requests.jsonl`.

    Args:
        lines: of the file.
        num_slowest: how many of the slowest to keep whole.
        only: count the request with this id only.
    """
    figures = RequestFigures()
    for line in lines:
        if only is not None and text(line, "id") != only:
            continue
        _count(figures, line)
        figures.slowest.append(line)
        if len(figures.slowest) > 2 * num_slowest + 100:
            figures.slowest = _slowest(figures.slowest, num_slowest)
    figures.slowest = _slowest(figures.slowest, num_slowest)
    return figures


def _count(figures: RequestFigures, line: Line) -> None:
    figures.num_preemptions += whole(line, "num_preemptions")
    if line.get("error_kind") is not None:
        figures.num_failed += 1
        return
    figures.num_completed += 1
    figures.num_prompt_tokens += whole(line, "num_prompt_tokens")
    figures.num_output_tokens += whole(line, "num_output_tokens")
    for name, values in figures.values.items():
        if (value := number(line, name)) is not None:
            values.append(value)


def _slowest(lines: list[Line], count: int) -> list[Line]:
    return sorted(lines, key=lambda line: -(number(line, "latency_s") or 0.0))[:count]
