"""How a run went over time: what its samples say between one and the next. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpipipe.logs.clocks import RankClocks
from mpipipe.logs.reading import Line, number

__all__ = ["Interval", "intervals"]

_LEVELS = ("num_running", "num_waiting", "kv_pages_used", "cpu_percent", "node_cpu_percent",
           "rss_bytes")  # fmt: skip
_SUMS = {
    "num_output_tokens": "tokens_per_s",
    "num_steps": "steps_per_s",
    "io_read_bytes": "io_read_bytes_per_s",
    "io_write_bytes": "io_write_bytes_per_s",
    "net_rx_bytes": "net_rx_bytes_per_s",
    "net_tx_bytes": "net_tx_bytes_per_s",
}


@dataclass(frozen=True, slots=True)
class Interval:
    """The time between two samples of one rank."""

    rank: int
    since_s: float  # on rank 0's clock
    until_s: float
    values: Mapping[str, float | None]  # levels at its end, rates over it
    gpu: Mapping[str, Any] | None


def intervals(rank: int, samples: Iterable[Line], clocks: RankClocks) -> list[Interval]:
    """The intervals between the samples of a rank, in their order."""
    found: list[Interval] = []
    before: Line | None = None
    for after in samples:
        since_s = None if before is None else number(before, "t_s")
        until_s = number(after, "t_s")
        if before is not None and since_s is not None and until_s is not None and until_s > since_s:
            values = {name: number(after, name) for name in _LEVELS}
            for name, rate in _SUMS.items():
                first, last = _count(before, name), _count(after, name)
                known = first is not None and last is not None
                values[rate] = (last - first) / (until_s - since_s) if known else None  # type: ignore[operator]
            gpu = after.get("gpu")
            found.append(
                Interval(
                    rank,
                    clocks.on_head(rank, since_s),
                    clocks.on_head(rank, until_s),
                    values,
                    gpu if isinstance(gpu, dict) else None,
                )
            )
        before = after
    return found


def _count(sample: Line, name: str) -> float | None:
    """Before its first step the head tells of no tokens: there were none."""
    if name == "num_output_tokens" and sample.get(name) is None and sample.get("num_steps") == 0:
        return 0.0
    return number(sample, name)
