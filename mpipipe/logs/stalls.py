"""Steps that took far longer than usual, and which rank held the others up. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mpipipe.logs.facts import RankFacts, RunFacts
from mpipipe.logs.steps import LongStep

__all__ = ["Stall", "find_stalls"]

# The order in which the parts of a step follow each other. Overhead lies on both sides of compute.
_IN_ORDER = ("idle", "wait", "transfer", "overhead", "compute", "send")
_BUSY = ("compute", "overhead", "send")


@dataclass(frozen=True, slots=True)
class Stall:
    """A moment at which the pipeline stood still."""

    step: int  # that the rank at fault was doing
    rank: int  # that held the others up
    stage: int | None
    phase: str
    part: str  # in which its time is booked
    start_s: float  # on rank 0's clock
    seconds: float
    usual_s: float  # a step of that phase on that rank
    cause: str


@dataclass(frozen=True, slots=True)
class _Long:
    """The longest part of a long step, on rank 0's clock."""

    rank: RankFacts
    step: LongStep
    part: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


def find_stalls(run: RunFacts, *, least_s: float = 0.5, factor: float = 10.0) -> list[Stall]:
    """The stalls of a run, in the order in which they happened.

    A step is part of one when it took `least_s` and `factor` times the median of its phase on its
    rank. Steps of several ranks at one time are one stall.
    """
    found = sorted(
        (_long(run, rank, step) for rank in run.ranks for step in _too_long(rank, least_s, factor)),
        key=lambda long: long.start_s,
    )
    return [_judge(run, group) for group in _overlapping(found)]


def _too_long(rank: RankFacts, least_s: float, factor: float) -> Iterator[LongStep]:
    usual_s = {phase: rank.steps.usual_s(phase) for phase in rank.steps.phases}
    for step in rank.steps.longest:
        if step.seconds >= max(least_s, factor * usual_s[step.phase]):
            yield step


def _long(run: RunFacts, rank: RankFacts, step: LongStep) -> _Long:
    part = max(_IN_ORDER, key=lambda name: step.parts_s[name])
    ends = dict(zip(_IN_ORDER, accumulate(step.parts_s[name] for name in _IN_ORDER), strict=True))
    end_s = run.clocks.on_head(rank.rank, step.start_s + ends[part])
    return _Long(rank, step, part, end_s - step.parts_s[part], end_s)


def _overlapping(found: Sequence[_Long]) -> list[list[_Long]]:
    groups: list[list[_Long]] = []
    end_s = float("-inf")
    for long in found:
        if groups and long.start_s < end_s:
            groups[-1].append(long)
        else:
            groups.append([long])
        end_s = max(end_s, long.end_s)
    return groups


def _judge(run: RunFacts, group: Sequence[_Long]) -> Stall:
    rank, long, cause = _at_fault(run, group)
    others = any(one.rank is not rank for one in group)
    return Stall(
        step=long.step.step,
        rank=rank.rank,
        stage=rank.stage,
        phase=long.step.phase,
        part=long.part,
        start_s=long.start_s,
        seconds=long.seconds,
        usual_s=long.rank.steps.usual_s(long.step.phase),
        cause=cause + (", its peers waited" if others else ""),
    )


def _at_fault(run: RunFacts, group: Sequence[_Long]) -> tuple[RankFacts, _Long, str]:
    """Which rank held the others up, by what each of them was doing; its step, and what it did."""
    if (long := _held_up(run, group)) is not None:
        return long.rank, long, "gave no sign"
    if (long := _longest(group, _BUSY)) is not None:
        return long.rank, long, f"took {long.seconds:.1f} s for {_WORD[long.part]}"
    if (long := _longest(group, ("transfer",))) is not None:
        cause = "did not receive what the stage before had sent: the link, or the rank was stopped"
        return long.rank, long, cause
    if (long := _longest(group, ("wait",))) is not None:
        before = run.before(long.rank)
        if before is not long.rank and all(one.rank is not before for one in group):
            return before, long, "has no step that tells why"
        return long.rank, long, "did not go on although the stage before was done"
    of_head = [long for long in group if long.rank.stage == 0]
    long = (of_head or list(group))[0]
    return long.rank, long, "scheduled nothing"


def _longest(group: Sequence[_Long], parts: Sequence[str]) -> _Long | None:
    chosen = (long for long in group if long.part in parts)
    return max(chosen, key=lambda long: long.seconds, default=None)


_WORD = {"compute": "its compute", "overhead": "getting to its compute", "send": "sending"}


def _held_up(run: RunFacts, group: Sequence[_Long]) -> _Long | None:
    """The step of a rank that noticed itself that it had stood still for most of the time."""
    for long in group:
        for pause in long.rank.pauses:
            end_s = run.clocks.on_head(long.rank.rank, pause.end_s)
            overlap_s = min(end_s, long.end_s) - max(end_s - pause.seconds, long.start_s)
            if overlap_s >= 0.5 * long.seconds:
                return long
    return None
