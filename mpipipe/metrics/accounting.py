"""Where every second of a stage went: compute, wait, send, idle or overhead.

The stage worker reports events with their times; nothing here reads a clock. Between `begin` and
`end` of a generate call the wall clock is cut at those events, so each moment belongs to exactly
one part and the parts add up to the wall clock by construction (kept in integer nanoseconds).
Steps are reported in the order they ran, which is the order in which the head sent them. For one
step, from the moment the step before it left the stage:

    idle until it was scheduled → wait until its input was there → compute (less what the compute
    thread did not need itself: overhead) → send, only as long as sending holds the stage up

Memory is bounded: sums, the steps under way, and a ring of the last records.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

__all__ = ["ScheduledStep", "StageAccount", "StageTotals", "StepRecord", "TimeParts"]

_NS = 1_000_000_000
_PARTS = ("compute", "wait", "send", "idle", "overhead")


class ScheduledStep(Protocol):
    """The fields of a step that are counted; `StepScheduled` messages have them."""

    @property
    def step(self) -> int:
        """Number of the step."""
        ...

    @property
    def slot(self) -> int:
        """Slot it belongs to."""
        ...

    @property
    def num_tokens(self) -> int:
        """Rows computed."""
        ...

    @property
    def num_sampled(self) -> int:
        """Tokens drawn at its end."""
        ...

    @property
    def steady(self) -> bool:
        """Every slot was filled and decoding."""
        ...


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step on one stage; times are of the clock that the events came with."""

    step: int
    slot: int
    num_tokens: int
    num_sampled: int
    start_s: float  # the stage was free: the step before had left, or generation began
    scheduled_s: float  # the head's message was here
    input_ready_s: float
    compute_end_s: float
    send_end_s: float
    steady: bool


@dataclass(frozen=True, slots=True)
class TimeParts:
    """Seconds by what they were used for; their sum is the wall clock."""

    compute_s: float = 0.0
    wait_s: float = 0.0  # a step was scheduled, its input had not come
    send_s: float = 0.0  # held up by sending
    idle_s: float = 0.0  # nothing was scheduled
    overhead_s: float = 0.0  # event loop and thread hand-over around the compute

    @property
    def wall_s(self) -> float:
        """All of it."""
        return self.compute_s + self.bubble_s

    @property
    def bubble_s(self) -> float:
        """Time without compute while the run was active, whatever the cause."""
        return self.wait_s + self.send_s + self.idle_s + self.overhead_s

    @property
    def bubble_ratio(self) -> float:
        """Share of the wall clock without compute; 0 when there was none."""
        return self.bubble_s / self.wall_s if self.wall_s > 0 else 0.0

    def __add__(self, other: TimeParts) -> TimeParts:
        return TimeParts(
            *(
                mine + theirs
                for mine, theirs in zip(
                    dataclasses.astuple(self), dataclasses.astuple(other), strict=True
                )
            )
        )


@dataclass(frozen=True, slots=True)
class StageTotals:
    """Sums of one stage over one or more generate calls."""

    stage: int
    num_steps: int = 0
    num_tokens: int = 0
    num_sampled: int = 0
    overall: TimeParts = TimeParts()
    num_steady_steps: int = 0
    steady: TimeParts = TimeParts()  # from one steady step's end to the next one's

    def merged(self, other: StageTotals) -> StageTotals:
        """The sums of both, of the same stage."""
        assert self.stage == other.stage, (self.stage, other.stage)
        return StageTotals(
            stage=self.stage,
            num_steps=self.num_steps + other.num_steps,
            num_tokens=self.num_tokens + other.num_tokens,
            num_sampled=self.num_sampled + other.num_sampled,
            overall=self.overall + other.overall,
            num_steady_steps=self.num_steady_steps + other.num_steady_steps,
            steady=self.steady + other.steady,
        )


class StageAccount:
    """Books one stage's time from the worker's events.

    Per generate call: `begin`, then per step `step_scheduled` (early and for several steps at
    once), `input_ready`, `computed`, `sent` (one step at a time), then `end`. Times that go back
    are taken as the time before them.

    Args:
        stage: whose time it is.
        num_recent: how many of the last records are kept.
    """

    def __init__(self, stage: int, *, num_recent: int = 1024) -> None:
        self._stage = stage
        self._records: deque[StepRecord] = deque(maxlen=num_recent)
        self._scheduled_ns: dict[int, int] = {}
        self._overall_ns = dict.fromkeys(_PARTS, 0)
        self._steady_ns = dict.fromkeys(_PARTS, 0)
        self._free_ns = 0  # everything before is booked
        self._input_ready_ns = 0
        self._computed_ns = 0
        self._compute_only_ns: int | None = None
        self._previous_steady = False
        self._num_steps = 0
        self._num_tokens = 0
        self._num_sampled = 0
        self._num_steady_steps = 0

    def begin(self, now_s: float) -> None:
        """A generate call starts; time since the last one's end is not counted."""
        self._free_ns = _ns(now_s)
        self._scheduled_ns.clear()
        self._previous_steady = False

    def step_scheduled(self, step: int, now_s: float) -> None:
        """The head's message for `step` is here."""
        self._scheduled_ns[step] = _ns(now_s)

    def input_ready(self, step: int, now_s: float) -> None:
        """The inputs of `step` are here, and the stage begins with it."""
        assert step in self._scheduled_ns, step
        self._input_ready_ns = _ns(now_s)

    def computed(self, step: int, now_s: float, compute_s: float | None = None) -> None:
        """The worker has the result of `step`.

        `compute_s`: what the compute thread measured for the step itself; the rest of the time
        since `input_ready` is overhead. Without it all of that time counts as compute.
        """
        assert step in self._scheduled_ns, step
        self._computed_ns = _ns(now_s)
        self._compute_only_ns = None if compute_s is None else _ns(compute_s)

    def sent(self, step: ScheduledStep, now_s: float) -> None:
        """The stage is free for the next step: books the time since it was last free."""
        start_ns = self._free_ns
        scheduled_ns = max(start_ns, self._scheduled_ns.pop(step.step))
        ready_ns = max(scheduled_ns, self._input_ready_ns)
        computed_ns = max(ready_ns, self._computed_ns)
        self._free_ns = max(computed_ns, _ns(now_s))
        busy_ns = computed_ns - ready_ns
        compute_ns = busy_ns
        if self._compute_only_ns is not None:
            compute_ns = min(busy_ns, self._compute_only_ns)
        parts_ns = {
            "idle": scheduled_ns - start_ns,
            "wait": ready_ns - scheduled_ns,
            "compute": compute_ns,
            "overhead": busy_ns - compute_ns,
            "send": self._free_ns - computed_ns,
        }
        self._count(step, parts_ns)
        self._records.append(
            StepRecord(
                step=step.step,
                slot=step.slot,
                num_tokens=step.num_tokens,
                num_sampled=step.num_sampled,
                start_s=start_ns / _NS,
                scheduled_s=scheduled_ns / _NS,
                input_ready_s=ready_ns / _NS,
                compute_end_s=computed_ns / _NS,
                send_end_s=self._free_ns / _NS,
                steady=step.steady,
            )
        )

    def _count(self, step: ScheduledStep, parts_ns: Mapping[str, int]) -> None:
        _book(self._overall_ns, parts_ns)
        if step.steady and self._previous_steady:
            _book(self._steady_ns, parts_ns)
            self._num_steady_steps += 1
        self._previous_steady = step.steady
        self._num_steps += 1
        self._num_tokens += step.num_tokens
        self._num_sampled += step.num_sampled

    def end(self, now_s: float) -> None:
        """The generate call is over; what is left counts as idle, or as wait if a step was due."""
        now_ns = max(self._free_ns, _ns(now_s))
        due_ns = min(self._scheduled_ns.values(), default=now_ns)
        due_ns = min(max(due_ns, self._free_ns), now_ns)
        _book(self._overall_ns, {"idle": due_ns - self._free_ns, "wait": now_ns - due_ns})
        self._scheduled_ns.clear()
        self._free_ns = now_ns

    def snapshot(self) -> StageTotals:
        """The sums so far, over all generate calls; time after the last step is not in them yet."""
        return StageTotals(
            stage=self._stage,
            num_steps=self._num_steps,
            num_tokens=self._num_tokens,
            num_sampled=self._num_sampled,
            overall=_parts(self._overall_ns),
            num_steady_steps=self._num_steady_steps,
            steady=_parts(self._steady_ns),
        )

    @property
    def last_step(self) -> int:
        """Number of the last step that left this stage; -1 before any."""
        return self._records[-1].step if self._records else -1

    def recent(self) -> tuple[StepRecord, ...]:
        """The last records, oldest first."""
        return tuple(self._records)


def _ns(seconds: float) -> int:
    return round(seconds * _NS)


def _book(account_ns: dict[str, int], parts_ns: Mapping[str, int]) -> None:
    for part, ns in parts_ns.items():
        account_ns[part] += ns


def _parts(account_ns: Mapping[str, int]) -> TimeParts:
    return TimeParts(**{f"{part}_s": ns / _NS for part, ns in account_ns.items()})
