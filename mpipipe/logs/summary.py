"""Where each second of a run went, per rank and for the run, and what held it up. Pure.

The life of a rank, from the start of its process to its last sign, is cut into boot events, the
parts of the generate phase, and the shutdown; what is left is unexplained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpipipe.logs.culprit import Culprit, find_culprit
from mpipipe.logs.facts import RankFacts, RunFacts
from mpipipe.logs.reading import Line, number, whole
from mpipipe.logs.steps import PARTS
from mpipipe.metrics.boot import PREPROCESSING, READING
from mpipipe.metrics.drafts import DraftUse
from mpipipe.metrics.spared import SparedWork

__all__ = ["COLUMNS", "RankTime", "RunTime", "summarise"]

LOADING = (
    "build",
    "read weights",
    "convert weights",
    "cache",
    "kernels",
    "warm-up",
    "capture",
    "edges",
)
_WAITING = "wait"  # the boot event, not the part of a step
COLUMNS = ("boot", "preprocessing", "load", "barriers", *PARTS, "shutdown", "unexplained")


@dataclass(frozen=True, slots=True)
class RankTime:
    """One rank's seconds by what they were used for; their sum is `wall_s`."""

    rank: int
    stage: int | None
    host: str
    wall_s: float
    seconds: Mapping[str, float]  # by COLUMNS
    boot: Mapping[str, float]  # by boot event
    num_steps: int
    num_steps_kept: int  # lines of steps that were read


@dataclass(frozen=True, slots=True)
class RunTime:
    """The run's time, and what held it up."""

    run: str
    attempt: int
    num_attempts: int
    state: str
    wall_s: float
    generate_s: float
    ranks: tuple[RankTime, ...]
    time: Mapping[str, float | None]  # preprocessing_s, io_read_s, io_write_s, communication_s
    culprit: Culprit
    spared: SparedWork  # what was not computed; zero where the run did not tell

    @property
    def shares(self) -> Mapping[str, float]:
        """Share of all ranks' time by COLUMNS."""
        total_s = sum(rank.wall_s for rank in self.ranks)
        return {
            name: sum(rank.seconds[name] for rank in self.ranks) / total_s if total_s > 0 else 0.0
            for name in COLUMNS
        }

    def to_dict(self) -> dict[str, Any]:
        """What `mpipipe logs summary --json` prints."""
        values = dataclasses.asdict(self)
        values["spared"]["tokens_per_step"] = self.spared.tokens_per_step
        return {**values, "shares": dict(self.shares)}


def summarise(run: RunFacts, metrics: Line) -> RunTime:
    """The summary of one attempt; `metrics`: its `metrics.json`, or empty."""
    ranks = tuple(_rank_time(rank) for rank in run.ranks)
    return RunTime(
        run=run.run,
        attempt=run.attempt,
        num_attempts=run.num_attempts,
        state=run.state,
        wall_s=run.wall_s,
        generate_s=run.generate_s,
        ranks=ranks,
        time=_time(ranks, metrics),
        culprit=find_culprit(run),
        spared=_spared(metrics),
    )


def _spared(metrics: Line) -> SparedWork:
    drafts, requests = metrics.get("drafts"), metrics.get("requests")
    drafts = drafts if isinstance(drafts, dict) else {}
    requests = requests if isinstance(requests, dict) else {}
    names = ("num_drafted", "num_accepted", "num_saved_steps")
    return SparedWork.of_run(
        max(0, whole(metrics, "num_shared_tokens")),
        DraftUse(*(max(0, whole(drafts, name)) for name in names)),
        num_output_tokens=whole(requests, "num_output_tokens"),
        num_unfinished=whole(requests, "num_unfinished"),
    )


def _rank_time(rank: RankFacts) -> RankTime:
    seconds = dict.fromkeys(COLUMNS, 0.0)
    boot: dict[str, float] = {}
    booked_s = rank.started_s or 0.0
    for event in sorted(rank.boot, key=lambda event: (event.start_s, event.end_s)):
        # Where two overlap, the time belongs to the one that began first.
        spent_s = max(0.0, event.end_s - max(booked_s, event.start_s))
        booked_s = max(booked_s, event.end_s)
        boot[event.name] = boot.get(event.name, 0.0) + spent_s
        seconds[_column(event.name)] += spent_s
    for part in PARTS:
        seconds[part] = rank.parts_s.get(part, 0.0)
    if rank.generated_s is not None and rank.ended_s is not None:
        seconds["shutdown"] = max(0.0, rank.ended_s - rank.generated_s)
    seconds["unexplained"] = max(0.0, rank.wall_s - sum(seconds.values()))
    return RankTime(
        rank=rank.rank,
        stage=rank.stage,
        host=rank.host,
        wall_s=rank.wall_s,
        seconds=seconds,
        boot=boot,
        num_steps=rank.num_steps,
        num_steps_kept=rank.steps.num_steps,
    )


def _column(name: str) -> str:
    if name in PREPROCESSING:
        return "preprocessing"
    if name in LOADING:
        return "load"
    return "barriers" if name == _WAITING else "boot"


def _read_s(ranks: tuple[RankTime, ...]) -> float | None:
    if not ranks:
        return None
    return sum(max(rank.boot.get(part, 0.0) for rank in ranks) for part in READING)


def _time(ranks: tuple[RankTime, ...], metrics: Line) -> dict[str, float | None]:
    """As the run measured it; of a run that did not end, what its lines tell."""
    told = metrics.get("time")
    told = told if isinstance(told, dict) else {}
    derived: dict[str, float | None] = {
        "preprocessing_s": max((rank.seconds["preprocessing"] for rank in ranks), default=None),
        "io_read_s": _read_s(ranks),
        "io_write_s": None,
        "communication_s": max(
            (rank.seconds["transfer"] + rank.seconds["send"] for rank in ranks), default=None
        ),
    }
    return {name: number(told, name) if name in told else value for name, value in derived.items()}
