"""What a run folder holds, read for its page: also of a run that was killed, with torn lines.

Only the last attempt's lines are kept: clocks of different attempts have nothing in common.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipipe.errors import OutputError

__all__ = ["Line", "RunFiles", "read_run", "resource_use"]

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunFiles:
    """A run's files; empty where one is not there. Lines by rank."""

    manifest: Mapping[str, Any]
    metrics: Mapping[str, Any]
    steps: Mapping[int, Sequence[Line]]
    samples: Mapping[int, Sequence[Line]]
    requests: Sequence[Line]
    offsets_s: Mapping[int, float]  # to add to a rank's times for rank 0's clock

    @property
    def began_s(self) -> float | None:
        """When generating began, on rank 0's clock: the first prompt's first step."""
        admitted = [line["admitted_s"] for line in self.requests if line.get("admitted_s")]
        if admitted:
            return float(min(admitted))
        starts = [self.on_head(rank, lines[0]["start_s"]) for rank, lines in self.steps.items()]
        starts += [line["t_s"] for line in self.samples.get(0, ())[:1]]
        return min(starts, default=None)

    def on_head(self, rank: int, t_s: float) -> float:
        """A time of `rank` on rank 0's clock."""
        return float(t_s) + self.offsets_s.get(rank, 0.0)


def read_run(folder: Path) -> RunFiles:
    """Everything in `folder` that a page shows.

    Raises:
        OutputError: a file cannot be read.
    """
    try:
        steps = _by_rank(folder, r"steps_rank_(\d+)(\.1)?\.jsonl")
        clock = _last_attempt(_lines(folder / "clock.jsonl"))
        return RunFiles(
            manifest=_object(folder / "manifest.json"),
            metrics=_object(folder / "metrics.json"),
            steps={
                rank: sorted(lines, key=lambda line: line["step"]) for rank, lines in steps.items()
            },
            samples=_by_rank(folder, r"samples_rank_(\d+)\.jsonl"),
            requests=_last_attempt(_lines(folder / "requests.jsonl")),
            offsets_s={line["of_rank"]: line["offset_s"] for line in clock},
        )
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder} cannot be read ({error.strerror}): make its files "
            "readable, or copy the folder"
        ) from error


def resource_use(run: RunFiles) -> tuple[float | None, float | None]:
    """CPU and GPU use while generating, in percent: of one core per rank, and of the GPUs."""
    cpu, gpu = [], []
    for lines in run.samples.values():
        cpu.append([line["cpu_percent"] for line in lines if line.get("cpu_percent") is not None])
        gpus = [line["gpu"] for line in lines if line.get("gpu")]
        gpu.append([one["utilisation"] for one in gpus if one.get("utilisation") is not None])
    return _mean_of_means(cpu), _mean_of_means(gpu)


def _mean_of_means(lists: Sequence[Sequence[float]]) -> float | None:
    means = [sum(values) / len(values) for values in lists if values]
    return sum(means) / len(means) if means else None


def _by_rank(folder: Path, pattern: str) -> dict[int, Sequence[Line]]:
    lines: dict[int, list[Line]] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(pattern, path.name)
        if match:
            lines.setdefault(int(match[1]), []).extend(_lines(path))
    return {rank: kept for rank in sorted(lines) if (kept := _last_attempt(lines[rank]))}


def _last_attempt(lines: Sequence[Line]) -> Sequence[Line]:
    last = max((line.get("attempt", 1) for line in lines), default=1)
    return [line for line in lines if line.get("attempt", 1) == last]


def _lines(path: Path) -> list[Line]:
    """The objects of a JSONL file; a line that a kill has torn is skipped."""
    if not path.exists():
        return []
    found: list[Line] = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def _object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise OutputError(f"{path} is not JSON ({error}): copy the run's folder again") from error
    return value if isinstance(value, dict) else {}
