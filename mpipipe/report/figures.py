"""The figures of one run, each with its unit: what the columns of the tables are made of.

Pure: a figure that the run did not record is None, never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mpipipe.metrics.boot import READING

__all__ = [
    "BUBBLE",
    "COMMUNICATION",
    "CPU",
    "ENERGY",
    "FIGURES",
    "GENERATE",
    "GPU",
    "IO",
    "ITL_P50",
    "ITL_P95",
    "MEMORY",
    "PARTS",
    "PREPROCESSING",
    "THROUGHPUT",
    "TTFT",
    "WALL_CLOCK",
    "Figure",
    "RunFacts",
    "stage_parts",
]

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is known of one run that came to its end."""

    metrics: Mapping[str, Any]  # its metrics.json
    wall_s: float  # start of the launch to its end
    energy_j: float | None = None  # while generating
    cpu_percent: float | None = None  # of one core per rank, mean over the ranks
    gpu_percent: float | None = None  # mean over the GPUs

    def number(self, *path: str) -> float | None:
        """A number of the metrics by its keys; None where it is not there."""
        value: Any = self.metrics
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return float(value) if _is_number(value) else None

    @property
    def ranks(self) -> Sequence[Mapping[str, Any]]:
        """The metrics of each rank, in the order of the stages."""
        ranks = self.metrics.get("ranks")
        return [rank for rank in ranks if isinstance(rank, dict)] if isinstance(ranks, list) else []


@dataclass(frozen=True, slots=True)
class Figure:
    """A column: what it is called, in which unit, and how a run tells it."""

    key: str  # in CSV and JSON
    title: str  # above the column, with the unit
    meaning: str
    better: Literal["higher", "lower"] | None
    of: Callable[[RunFacts], float | None]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sum(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _io_s(run: RunFacts) -> float | None:
    return _sum(run.number("time", "io_read_s"), run.number("time", "io_write_s"))


def _memory_gib(run: RunFacts) -> float | None:
    """Of the rank that holds most: on its GPU where it has one, else resident in the host."""
    for key in ("gpu_peak_bytes", "peak_rss_bytes"):
        peaks = [rank[key] for rank in run.ranks if _is_number(rank.get(key))]
        if any(peaks):
            return float(max(peaks)) / _GIB
    return None


def _energy_per_token(run: RunFacts) -> float | None:
    tokens = run.number("requests", "num_output_tokens")
    return run.energy_j / tokens if run.energy_j is not None and tokens else None


WALL_CLOCK = Figure(
    "wall_clock_s", "Wall clock (s)", "from the start of the launch to its end", "lower",
    lambda run: run.wall_s,
)  # fmt: skip
THROUGHPUT = Figure(
    "throughput_tokens_per_s", "Throughput (tokens/s)",
    "output tokens per second while generating", "higher",
    lambda run: run.number("output_tokens_per_s"),
)  # fmt: skip
GPU = Figure(
    "gpu_percent", "GPU (%)", "utilisation of the GPUs, mean", None,
    lambda run: run.gpu_percent,
)  # fmt: skip
CPU = Figure(
    "cpu_percent", "CPU (%)", "of one core per rank, mean over the ranks", None,
    lambda run: run.cpu_percent,
)  # fmt: skip
IO = Figure(
    "io_s", "I/O time (s)", "reading prompts and weights, writing results", None,
    _io_s,
)  # fmt: skip
COMMUNICATION = Figure(
    "communication_s", "Communication time (s)",
    "transfers that a stage waited for, and sending; of the rank with most", None,
    lambda run: run.number("time", "communication_s"),
)  # fmt: skip
PREPROCESSING = Figure(
    "preprocessing_s", "Preprocessing cost (s)", "loading the tokenizer, tokenising", None,
    lambda run: run.number("time", "preprocessing_s"),
)  # fmt: skip
GENERATE = Figure(
    "generate_s", "Generating (s)", "first step to last completion", None,
    lambda run: run.number("phases", "generate_s"),
)  # fmt: skip
BUBBLE = Figure(
    "bubble_percent", "Bubble (%)", "share of all stages' time without compute", None,
    lambda run: _scaled(run.number("bubble_ratio"), 100),
)  # fmt: skip
TTFT = Figure(
    "ttft_p50_s", "TTFT p50 (s)", "submission of a prompt to its first token", "lower",
    lambda run: run.number("requests", "ttft_p50_s"),
)  # fmt: skip
ITL_P50 = Figure(
    "itl_p50_ms", "Inter-token p50 (ms)", "from one token of a prompt to its next", "lower",
    lambda run: _scaled(run.number("itl_p50_s"), 1e3),
)  # fmt: skip
ITL_P95 = Figure(
    "itl_p95_ms", "Inter-token p95 (ms)", "the same, 95th percentile", "lower",
    lambda run: _scaled(run.number("itl_p95_s"), 1e3),
)  # fmt: skip
MEMORY = Figure(
    "memory_gib", "Memory (GiB)",
    "peak of the fullest rank: on its GPU where it has one, else in the host", "lower",
    _memory_gib,
)  # fmt: skip
ENERGY = Figure(
    "energy_j_per_token", "Energy (J/token)", "of the GPUs while generating", "lower",
    _energy_per_token,
)  # fmt: skip

FIGURES = (
    WALL_CLOCK, THROUGHPUT, GPU, CPU, IO, COMMUNICATION, PREPROCESSING, GENERATE, BUBBLE, TTFT,
    ITL_P50, ITL_P95, MEMORY, ENERGY,
)  # fmt: skip

# The parts of a stage's time while generating, by their keys in metrics.json, then its files.
PARTS = ("compute", "wait", "transfer", "send", "idle", "overhead", "I/O")


def stage_parts(run: RunFacts) -> list[dict[str, float]]:
    """Seconds of each stage by `PARTS`, in the order of the stages."""
    return [_parts(rank) for rank in run.ranks]


def _parts(rank: Mapping[str, Any]) -> dict[str, float]:
    stage = rank.get("stage")
    overall = stage.get("overall", {}) if isinstance(stage, Mapping) else {}
    parts = {name: float(overall.get(f"{name}_s") or 0.0) for name in PARTS[:-1]}
    boot = rank.get("boot") or ()
    reads = [event["seconds"] for event in boot if event.get("name") in READING]
    return {**parts, PARTS[-1]: float(sum(reads))}
