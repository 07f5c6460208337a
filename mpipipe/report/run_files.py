"""What a page shows of a run folder: its documents and the lines of its last attempt.

`mpipipe.logs` reads the files, also of a run that was killed, brings the ranks' times together, and
finds what held the run up. Clocks of different attempts have nothing in common, so only the last
one's lines are shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpipipe.logs.attempts import choose_attempt
from mpipipe.logs.clocks import RankClocks, read_clocks
from mpipipe.logs.facts import read_facts
from mpipipe.logs.reading import Line, RunFiles, number
from mpipipe.logs.summary import RunTime, summarise

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["RunLines", "read_run", "resource_use"]

_MOST_STEPS = 20_000  # of a rank; log.steps = "all" may have kept millions
_TIMES = ("start_s", "compute_s", "idle_s", "wait_s", "transfer_s", "overhead_s")


@dataclass(frozen=True, slots=True)
class RunLines:
    """A run's files; empty where one is not there. Lines by rank."""

    manifest: Mapping[str, Any]
    metrics: Mapping[str, Any]
    steps: Mapping[int, Sequence[Line]]  # ranks with steps only; the last ones of each
    samples: Mapping[int, Sequence[Line]]
    admitted_s: float | None  # the first prompt's first step, on rank 0's clock
    clocks: RankClocks
    time: RunTime  # where each second went, as `mpipipe logs summary` tells

    @property
    def began_s(self) -> float | None:
        """When generating began, on rank 0's clock."""
        if self.admitted_s is not None:
            return self.admitted_s
        starts = [
            self.clocks.on_head(rank, lines[0]["start_s"]) for rank, lines in self.steps.items()
        ]
        starts += [t for line in self.samples.get(0, ()) if (t := number(line, "t_s")) is not None]
        return min(starts, default=None)


def read_run(folder: Path) -> RunLines:
    """Everything in `folder` that a page shows.

    Raises:
        OutputError: a file is there, but cannot be read.
    """
    files = RunFiles(folder)
    attempt, metrics = choose_attempt(files), files.document("metrics.json")
    steps = {rank: _steps(files, rank, attempt) for rank in files.ranks()}
    return RunLines(
        manifest=files.document("manifest.json"),
        metrics=metrics,
        steps={rank: lines for rank, lines in steps.items() if lines},
        samples={rank: list(files.sample_lines(rank, attempt)) for rank in files.ranks()},
        admitted_s=min(_admissions(files, attempt), default=None),
        clocks=read_clocks(files.lines("clock.jsonl", attempt)),
        time=summarise(read_facts(files, attempt), metrics),
    )


def _steps(files: RunFiles, rank: int, attempt: int) -> list[Line]:
    """The last whole steps of a rank, in their order; one with a damaged time is left out."""
    lines = (
        line
        for _, line in files.step_lines(rank, attempt)
        if all(number(line, name) is not None for name in _TIMES)
    )
    return sorted(deque(lines, maxlen=_MOST_STEPS), key=lambda line: float(line["start_s"]))


def _admissions(files: RunFiles, attempt: int) -> Iterator[float]:
    for line in files.lines("requests.jsonl", attempt):
        admitted_s = number(line, "admitted_s")
        if admitted_s is not None:
            yield admitted_s


def resource_use(run: RunLines) -> tuple[float | None, float | None]:
    """CPU and GPU use in percent, means over the samples: of one core per rank, and of the GPUs."""
    cpu, gpu = [], []
    for lines in run.samples.values():
        cpu.append([p for line in lines if (p := number(line, "cpu_percent")) is not None])
        cards = [line["gpu"] for line in lines if isinstance(line.get("gpu"), dict)]
        gpu.append([p for card in cards if (p := number(card, "utilisation")) is not None])
    return _mean_of_means(cpu), _mean_of_means(gpu)


def _mean_of_means(lists: Sequence[Sequence[float]]) -> float | None:
    means = [sum(values) / len(values) for values in lists if values]
    return sum(means) / len(means) if means else None
