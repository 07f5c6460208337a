"""How tables write the figures of a benchmark's records."""

from __future__ import annotations

from typing import Any

__all__ = ["number", "share", "stage_cells"]


def number(value: float | None, digits: int = 0) -> str:
    """A figure, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def share(value: float | None, digits: int = 0) -> str:
    """A share in percent, or a dash."""
    return "-" if value is None else f"{value:.{digits}%}"


def stage_cells(record: dict[str, Any]) -> list[str]:
    """By stage: bubble, bubble in the steady state, Python per step in µs, memory in GiB."""
    stages = record["stages"]
    held = [stage["gpu_peak_bytes"] or stage["peak_rss_bytes"] for stage in stages]
    return [
        "/".join(share(stage["bubble"]) for stage in stages),
        "/".join(share(stage["steady_bubble"], 1) for stage in stages),
        "/".join(number(_cpu_us(stage)) for stage in stages),
        "/".join(number(size / 2**30, 1) for size in held),
    ]


def _cpu_us(stage: dict[str, Any]) -> float | None:
    """A rank's Python per step, the head's scheduling included."""
    parts = (stage["cpu_us_per_step"], stage["head_us_per_step"])
    known = [part for part in parts if part is not None]
    return sum(known) if known else None
