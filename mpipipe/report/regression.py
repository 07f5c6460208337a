"""Two reports of the same cases: what became worse or better beyond the noise. Pure.

A figure has changed when the intervals of both medians are sound, do not touch, and lie 1 % apart
or more. Where nothing has changed, two times five runs look so on one side for one figure in 250.
So only throughput and memory count as regressions; with them count a smaller share of ok runs,
runs that do not make the same tokens any more, and a case that has no result or is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from mpipipe.report.document import Cell, Table
from mpipipe.report.figures import FIGURES, MEMORY, THROUGHPUT
from mpipipe.report.numbers import NOTHING, interval, number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mpipipe.experiments.record import Record
    from mpipipe.experiments.statistics import Spread
    from mpipipe.report.figures import Figure
    from mpipipe.report.rows import Row

__all__ = ["Change", "changes_between", "changes_table", "other_conditions", "regressions"]

_LEAST_CHANGE = 0.01
_COUNTED = (THROUGHPUT, MEMORY)

Judged = Literal["worse", "worse, not counted", "better", "same"]
Kind = Judged | Literal["too few runs", "other tokens", "not recorded"]


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
    reason: str = ""  # of what is not a change of two medians: the sentence about it

    @property
    def is_judged_figure(self) -> bool:
        """Whether it is a figure with runs enough before and now."""
        judged: tuple[Kind, ...] = get_args(Judged)
        return self.before is not None and self.now is not None and self.kind in judged

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
    """Every judged figure of the cases that both have, in the order of `new`, and what is gone."""
    both = [name for name in new if name in old]
    changes = [change for name in both for change in _of_case(name, old[name], new[name])]
    gone = "the case is not among the new records"
    return changes + [
        Change(name, "case", None, None, "worse", gone) for name in old if name not in new
    ]


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
    others = [name for name in both if _makes_other_tokens(old[name], new[name])]
    if others:
        sentences.append(f"the tokens differ from those before: {', '.join(others)}.")
    return sentences


def _makes_other_tokens(before: Row, now: Row) -> bool:
    """Whether all runs of each made the same tokens, and the two rows did not."""
    hashes = [{run.tokens_hash for run in row.done} - {None} for row in (before, now)]
    return all(len(found) == 1 for found in hashes) and hashes[0] != hashes[1]


def _of_case(name: str, before: Row, now: Row) -> Iterator[Change]:
    if before.throughput is not None and now.throughput is None:
        reason = now.failures[0].reason if now.failures else "no run was made"
        yield Change(name, "result", None, None, "worse", f"came to no result any more: {reason}")
        return
    yield from _of_runs(name, before, now)
    same_tokens = before.same_tokens and now.same_tokens
    for figure in FIGURES:
        old, new = before.figures[figure.key], now.figures[figure.key]
        if figure.better is None or old is None:
            continue
        if new is None:
            reason = f"{figure.title} was {number(old.median)}, and is not recorded any more"
            yield Change(name, figure.title, old, None, "not recorded", reason)
        elif same_tokens or figure is MEMORY:
            yield Change(name, figure.title, old, new, _kind(figure, old, new))
        else:
            yield Change(name, figure.title, old, new, "other tokens")


def _of_runs(name: str, before: Row, now: Row) -> Iterator[Change]:
    """What has changed in how many runs came to a result, and whether their tokens agree."""
    ok_before, ok_now = (
        len(row.done) / len(row.runs) if row.runs else None for row in (before, now)
    )
    if ok_before is not None and ok_now is not None and ok_now != ok_before:
        reason = (
            f"{len(now.done)} of {len(now.runs)} runs are ok, and before "
            f"{len(before.done)} of {len(before.runs)}"
        )
        is_worse = ok_now < ok_before
        reason += f": {now.failures[0].reason}" if is_worse else ""
        yield Change(name, "ok runs", None, None, "worse" if is_worse else "better", reason)
    if before.same_tokens and not now.same_tokens:
        reason = "its runs made different tokens, and before they made the same"
        yield Change(name, "tokens", None, None, "worse", reason)


def _kind(figure: Figure, before: Spread, now: Spread) -> Kind:
    if not (before.is_sound and now.is_sound):
        return "too few runs"
    least = _LEAST_CHANGE * abs(before.median)
    is_higher = now.low > before.high and now.median - before.median >= least
    is_lower = now.high < before.low and before.median - now.median >= least
    if not (is_higher or is_lower):
        return "same"
    if is_higher == (figure.better == "higher"):
        return "better"
    return "worse" if figure in _COUNTED else "worse, not counted"


def regressions(changes: Sequence[Change]) -> list[Change]:
    """Those that became worse beyond the noise, and count."""
    return [change for change in changes if change.kind == "worse"]


def changes_table(changes: Sequence[Change]) -> Table:
    """All changes, for the page."""
    return Table(
        "Against the older records",
        ("Case and figure", "Before", "Now", "Change", "Verdict"),
        tuple(_row(change) for change in changes),
        (
            (
                "Worse, better: the intervals do not touch, and the medians are 1 % apart or more. "
                "Of the figures, throughput and memory count as regressions."
            ),
            (
                "Too few runs: fewer than five, before or now. Other tokens: the runs of a case do "
                "not make the same tokens, before or now, so its speed means nothing."
            ),
        ),
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
