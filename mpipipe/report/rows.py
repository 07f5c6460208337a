"""An experiment's records by their cases: medians with intervals, what went wrong. Pure.

What is said of speed is `experiments.verdict`'s; here are the other figures beside it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.experiments.statistics import Spread, spread_of
from mpipipe.experiments.verdict import judge, with_token_flags
from mpipipe.report.figures import FIGURES, PARTS, THROUGHPUT, RunFacts, stage_parts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mpipipe.experiments.record import Case, Ceiling, Flag, Matrix, Record
    from mpipipe.experiments.verdict import CaseVerdict, ExperimentVerdict

__all__ = ["Failure", "Row", "Section", "make_section"]

_FLAGS: tuple[Flag, ...] = ("other tokens", "throttled", "foreign load", "too short")
_ARMS = ("memory-filling", "fixed-total", "weak", "batch", "arrangements")
_CERTAIN = Spread(1, 1.0, 1.0, 1.0, 1.0, None)  # of the case that the others are compared with


@dataclass(frozen=True, slots=True)
class Failure:
    """Runs of a case that came to no result, for one reason."""

    outcome: str
    reason: str
    num_runs: int


@dataclass(frozen=True, slots=True)
class Row:
    """A case and what its runs came to."""

    case: Case
    runs: tuple[Record, ...]  # in the order of their repeats
    num_planned: int
    size: int  # ranks; in a batch sweep prompts in flight
    figures: Mapping[str, Spread | None]  # by the keys of `FIGURES`
    parts: tuple[Mapping[str, float], ...]  # per stage, medians in seconds, by `PARTS`
    failures: tuple[Failure, ...]
    flags: Mapping[str, int]  # runs with it
    ceiling: Ceiling | None
    base: str  # the case of the arm with which it is compared; may be itself
    base_size: int
    is_comparable: bool  # all runs of it and of `base` came to a result, each with the same tokens
    speedup: Spread | None  # of throughput over `base`, repeat by repeat
    efficiency: Spread | None  # speedup over how many times as large the case is

    @property
    def done(self) -> tuple[Record, ...]:
        """The runs that came to a result."""
        return tuple(run for run in self.runs if run.outcome == "ok")

    @property
    def places(self) -> int:
        """Sequences that the plan lets run at once; 0: no run has told."""
        return max((run.num_places or 0 for run in self.runs), default=0)

    @property
    def same_tokens(self) -> bool:
        """Whether all runs made the same tokens; else their speed means nothing."""
        return "other tokens" not in self.flags

    @property
    def throughput(self) -> Spread | None:
        """Output tokens per second while generating."""
        return self.figures[THROUGHPUT.key]

    @property
    def typical(self) -> Record | None:
        """The run of median throughput."""
        ranked = sorted(self.done, key=lambda run: (run.tokens_per_s or 0.0, run.repeat))
        return ranked[(len(ranked) - 1) // 2] if ranked else None


@dataclass(frozen=True, slots=True)
class Section:
    """An experiment as it is reported: its rows, by arm and by size."""

    label: str  # the folder's name below the one that is reported; empty for that one itself
    matrix: Matrix
    verdict: ExperimentVerdict
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The experiment's, and the folder's where it has another."""
        experiment = self.matrix.experiment
        return experiment if self.label in {"", experiment} else f"{experiment} ({self.label})"

    @property
    def arms(self) -> dict[str, list[Row]]:
        """The rows of each arm."""
        arms: dict[str, list[Row]] = {}
        for row in self.rows:
            arms.setdefault(row.case.arm, []).append(row)
        return arms

    @property
    def records(self) -> list[Record]:
        """Of all rows."""
        return [run for row in self.rows for run in row.runs]


def make_section(label: str, matrix: Matrix, records: Sequence[Record]) -> Section:
    """An experiment out of its matrix and its records so far; warm-up launches do not count."""
    measured = [record for record in records if record.repeat > 0]
    flags = with_token_flags(measured)
    flagged = [dataclasses.replace(record, flags=flags[record.name]) for record in measured]
    verdict = judge(matrix, measured)
    runs = {case.name: [r for r in flagged if r.case.name == case.name] for case in matrix.cases}
    sizes = {case.name: _size(case, runs[case.name]) for case in matrix.cases}
    ordered = sorted(
        verdict.cases, key=lambda found: (_ARMS.index(found.case.arm), sizes[found.case.name])
    )
    rows = (_row(found, runs[found.case.name], matrix.repeat, sizes) for found in ordered)
    return Section(label, matrix, verdict, tuple(rows))


def _size(case: Case, runs: Sequence[Record]) -> int:
    if case.arm != "batch":
        return case.num_ranks
    places = [run.num_places for run in runs if run.num_places]
    return case.batch or (places[0] if places else 0)


def _row(found: CaseVerdict, runs: Sequence[Record], repeat: int, sizes: Mapping[str, int]) -> Row:
    facts = [
        RunFacts(run.metrics or {}, run.wall_s, run.energy_j, run.cpu_percent, run.gpu_percent)
        for run in runs
        if run.outcome == "ok"
    ]
    size = sizes[found.case.name]
    base = found.base or found.case.name
    speedup = found.speedup if found.base else _CERTAIN if found.speed else None
    return Row(
        case=found.case,
        runs=tuple(sorted(runs, key=lambda run: run.repeat)),
        num_planned=repeat,
        size=size,
        figures={figure.key: _spread(map(figure.of, facts)) for figure in FIGURES},
        parts=_median_parts(facts),
        failures=_failures(runs),
        flags={flag: num for flag in _FLAGS if (num := sum(flag in run.flags for run in runs))},
        ceiling=next((run.ceiling for run in runs if run.ceiling is not None), None),
        base=base,
        base_size=sizes[base],
        is_comparable=found.is_comparable,
        speedup=speedup,
        efficiency=_divided(speedup, size / sizes[base]) if sizes[base] else None,
    )


def _spread(values: Iterable[float | None]) -> Spread | None:
    return spread_of([value for value in values if value is not None])


def _divided(found: Spread | None, divisor: float) -> Spread | None:
    if found is None:
        return None
    return dataclasses.replace(
        found,
        median=found.median / divisor,
        low=found.low / divisor,
        high=found.high / divisor,
    )


def _failures(runs: Sequence[Record]) -> tuple[Failure, ...]:
    counts = Counter((run.outcome, run.reason) for run in runs if run.outcome != "ok")
    return tuple(Failure(outcome, reason, n) for (outcome, reason), n in sorted(counts.items()))


def _median_parts(facts: Sequence[RunFacts]) -> tuple[Mapping[str, float], ...]:
    runs = [stage_parts(run) for run in facts]
    num_stages = min(map(len, runs), default=0)
    medians = []
    for stage in range(num_stages):
        values = {name: spread_of([run[stage][name] for run in runs]) for name in PARTS}
        medians.append({name: found.median for name, found in values.items() if found})
    return tuple(medians)
