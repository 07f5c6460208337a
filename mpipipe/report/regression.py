"""Two reports of the same cases: what became worse or better beyond the noise. Pure.

A figure has changed when the intervals of both medians are sound, do not touch, and lie 1 % apart
or more. Where nothing has changed, two times five runs look so on one side for one figure in 250.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mpipipe.report.document import Cell, Table
from mpipipe.report.figures import FIGURES
from mpipipe.report.numbers import NOTHING, interval, number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mpipipe.experiments.record import Record
    from mpipipe.experiments.statistics import Spread
    from mpipipe.report.figures import Figure
    from mpipipe.report.rows import Row

__all__ = ["Change", "changes_between", "changes_table", "other_conditions", "regressions"]

_LEAST_CHANGE = 0.01

Kind = Literal["worse", "better", "same", "too few runs"]


_CONDITIONS: Mapping[str, Callable[[Record], Iterable[object]]] = {
    "the commits": lambda run: [run.commit or "no checkout"],
    "the configurations (by their hashes)": lambda run: [run.config_hash],
    "the hosts": lambda run: run.hosts,
    "the GPUs": lambda run: run.gpus,
    "the versions of torch": lambda run: [run.versions.get("torch", "unknown")],
}


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one case, before and now."""

    case: str
    figure: str
    before: Spread | None
    now: Spread | None
    kind: Kind
    reason: str = ""  # of a case that came to no result

    @property
    def sentence(self) -> str:
        """What became of it, to be printed."""
        if self.reason:
            return f"{self.case}: {self.reason}"
        assert self.before is not None
        assert self.now is not None
        return (
            f"{self.case}: {self.figure}: {number(self.before.median)} "
            f"({interval(self.before) or 'no interval'}) → {number(self.now.median)} "
            f"({interval(self.now) or 'no interval'}), {self.percent}"
        )

    @property
    def percent(self) -> str:
        """How much of it, relative to before."""
        if self.before is None or self.now is None or not self.before.median:
            return NOTHING
        return f"{100 * (self.now.median / self.before.median - 1):+.1f} %"


def changes_between(old: Mapping[str, Row], new: Mapping[str, Row]) -> list[Change]:
    """Every judged figure of the cases that both have, in the order of `new`; by rows' names."""
    both = [name for name in new if name in old]
    return [change for name in both for change in _of_case(name, old[name], new[name])]


def other_conditions(old: Mapping[str, Row], new: Mapping[str, Row]) -> list[str]:
    """What else differs between the two, a sentence each: it may be the cause of a change."""
    both = [name for name in new if name in old]
    sentences = []
    for what, values_of in _CONDITIONS.items():
        before, now = (
            sorted(
                {str(value) for name in both for run in rows[name].runs for value in values_of(run)}
            )
            for rows in (old, new)
        )
        if before != now:
            told = " → ".join(", ".join(values) or "none" for values in (before, now))
            sentences.append(f"{what} differ: {told}.")
    return sentences


def _of_case(name: str, before: Row, now: Row) -> Iterator[Change]:
    if before.throughput is not None and now.throughput is None:
        reason = now.failures[0].reason if now.failures else "no run was made"
        yield Change(name, "result", None, None, "worse", f"came to no result any more: {reason}")
        return
    for figure in FIGURES:
        old, new = before.figures[figure.key], now.figures[figure.key]
        if figure.better is not None and old is not None and new is not None:
            yield Change(name, figure.title, old, new, _kind(figure, old, new))


def _kind(figure: Figure, before: Spread, now: Spread) -> Kind:
    if not (before.is_sound and now.is_sound):
        return "too few runs"
    least = _LEAST_CHANGE * abs(before.median)
    if now.low - before.high > 0 and now.median - before.median >= least:
        return "better" if figure.better == "higher" else "worse"
    if before.low - now.high > 0 and before.median - now.median >= least:
        return "worse" if figure.better == "higher" else "better"
    return "same"


def regressions(changes: Sequence[Change]) -> list[Change]:
    """Those that became worse beyond the noise."""
    return [change for change in changes if change.kind == "worse"]


def changes_table(changes: Sequence[Change]) -> Table:
    """All changes, for the page."""
    return Table(
        "Against the older records",
        ("Case and figure", "Before", "Now", "Change", "Verdict"),
        tuple(_row(change) for change in changes),
        ("Worse, better: the intervals do not touch, and the medians are 1 % apart or more.",),
    )


def _row(change: Change) -> tuple[Cell, ...]:
    return (
        Cell(f"{change.case}: {change.figure}", is_number=False),
        _median(change.before),
        _median(change.now),
        Cell(change.percent),
        Cell(change.kind, change.reason, warns=change.kind == "worse", is_number=False),
    )


def _median(found: Spread | None) -> Cell:
    return Cell(number(found.median) if found else NOTHING, interval(found))
