"""The table of forecasts beside what was measured, and how far they were off in all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["error_lines", "prediction_header", "prediction_row"]

Record = Mapping[str, Any]

_HEADER = (
    "model", "ranks", "work", "tokens/s", "by rates", "error", "by profile", "error",
    "wall-clock s", "by rates", "error", "by profile", "error", "memory error",
    "decode step error", "split",
)  # fmt: skip
# Of the errors, as the forecast's share of what was measured.
_TARGETS = {
    "tokens/s by rates": 0.25,
    "tokens/s by profile": 0.10,
    "wall-clock by rates": 0.25,
    "wall-clock by profile": 0.10,
    "memory": 0.05,
}


def prediction_header() -> list[str]:
    """The two lines above the rows."""
    return [f"| {' | '.join(_HEADER)} |", "|---" * len(_HEADER) + "|"]


def prediction_row(record: Record) -> str:
    """One line: of a record of `bench throughput` with `by_rates`, `plan --json` for its work."""
    compared, by_rates = record["compared"], record["by_rates"]
    speed, rates_per_s = compared["tokens_per_s"], by_rates["forecast"]["tokens_per_s"]
    wall_s = _wall_s(record)
    cells = [
        record["model"],
        record["ranks"],
        record["work"],
        f"{speed['measured']:,.1f}",
        f"{rates_per_s:,.1f}",
        f"{_error(rates_per_s, speed['measured']):+.1%}",
        *_profile_cells(record, speed["predicted"], speed["measured"]),
        f"{wall_s:.1f}",
        f"{by_rates['wall_clock_s']:.1f}",
        f"{_error(by_rates['wall_clock_s'], wall_s):+.1%}",
        *_profile_cells(record, _profile_wall_s(record), wall_s),
        _worst(compared, "memory_bytes_"),
        _worst(compared, "decode_step_s_"),
        record["plan"]["split"],
    ]
    return f"| {' | '.join(map(str, cells))} |"


def error_lines(records: Sequence[Record]) -> list[str]:
    """By kind of forecast: how many, mean and largest error, and how many are within the target."""
    found: dict[str, list[float]] = {name: [] for name in _TARGETS}
    for record in records:
        for name, error in _errors(record):
            found[name].append(error)
    lines = ["| forecast of | n | mean error | largest | target | within |", "|---|" + "---:|" * 5]
    for name, errors in found.items():
        if errors:
            sizes = [abs(error) for error in errors]
            within = sum(size <= _TARGETS[name] for size in sizes)
            lines.append(
                f"| {name} | {len(errors)} | {sum(sizes) / len(sizes):.1%} | "
                f"{max(errors, key=abs):+.1%} | {_TARGETS[name]:.0%} | {within} |"
            )
    return lines


def _errors(record: Record) -> Iterator[tuple[str, float]]:
    compared, by_rates = record["compared"], record["by_rates"]
    speed, wall_s = compared["tokens_per_s"], _wall_s(record)
    rates_per_s = by_rates["forecast"]["tokens_per_s"]
    yield "tokens/s by rates", _error(rates_per_s, speed["measured"])
    yield "wall-clock by rates", _error(by_rates["wall_clock_s"], wall_s)
    if _has_profile(record):
        yield "tokens/s by profile", _error(speed["predicted"], speed["measured"])
        yield "wall-clock by profile", _error(_profile_wall_s(record), wall_s)
    for each in _named(compared, "memory_bytes_"):
        yield "memory", _error(each["predicted"], each["measured"])


def _has_profile(record: Record) -> bool:
    """Whether the run found a profile; else it was foretold by rates, too."""
    return str(record["predicted"]["source"]).startswith("measured ")


def _profile_cells(record: Record, predicted: float, measured: float) -> tuple[str, str]:
    if not _has_profile(record):
        return "no profile", "-"
    return f"{predicted:,.1f}", f"{_error(predicted, measured):+.1%}"


def _wall_s(record: Record) -> float:
    """From the start of the processes to the last completion; warming up left out."""
    boot = record["boot"]
    start_s = float(boot["greet_s"] + boot["import_s"] + boot["load_s"])
    return start_s + float(record["elapsed_s"])


def _profile_wall_s(record: Record) -> float:
    predicted = record["predicted"]
    return float(predicted["start_s"] + predicted["generate_s"])


def _error(predicted: float, measured: float) -> float:
    return predicted / measured - 1


def _named(compared: Mapping[str, Any], prefix: str) -> list[dict[str, float]]:
    return [each for name, each in compared.items() if name.startswith(prefix)]


def _worst(compared: Mapping[str, Any], prefix: str) -> str:
    """By how much the farthest of the stages was predicted wrong."""
    errors = [_error(each["predicted"], each["measured"]) for each in _named(compared, prefix)]
    return f"{max(errors, key=abs):+.1%}" if errors else "-"
