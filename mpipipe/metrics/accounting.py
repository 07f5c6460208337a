"""Where every second of a stage went: compute, wait, transfer, send, idle or overhead.

The stage worker reports events with their times; nothing here reads a clock. Between `begin` and
`end` of a generate call the wall clock is cut at those events, so each moment belongs to exactly
one part and the parts add up to the wall clock by construction (kept in integer nanoseconds).
Steps are reported in the order they ran, which is the order in which the head sent them. For one
step, from the moment the step before it left the stage:

    idle until it was scheduled → wait until the stage before had computed its input → transfer
    until that input was there → compute (less what the compute thread did not need itself:
    overhead) → send, only as long as sending holds the stage up

When the stage before was done is told late, in batches (`upstream_computed`). Until then all the
time without the input counts as wait, and for good where it is never told.

Memory is bounded: sums, the steps under way or not yet divided, and a ring of the last records.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = [
    "ScheduledStep",
    "StageAccount",
    "StageTotals",
    "StepPhase",
    "StepRecord",
    "StepTotals",
    "TimeParts",
]

_NS = 1_000_000_000
_PARTS = ("compute", "wait", "transfer", "send", "idle", "overhead")

_MOST_TIMES = 4096  # of the stage before: many more than steps are in flight

StepPhase = Literal["prefill", "decode", "mixed", "verify"]


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
    def num_sequences(self) -> int:
        """Sequences that have a share of it."""
        ...

    @property
    def phase(self) -> StepPhase:
        """Chunks of prompts, one token of each sequence, or both; or drafted tokens."""
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
    num_sequences: int = 0
    phase: StepPhase = "decode"
    compute_s: float = 0.0  # less than from `input_ready_s` to `compute_end_s` by the overhead
    bytes_in: int = 0  # of tensors from and to other ranks
    bytes_out: int = 0


@dataclass(frozen=True, slots=True)
class TimeParts:
    """Seconds by what they were used for; their sum is the wall clock."""

    compute_s: float = 0.0
    wait_s: float = 0.0  # a step was scheduled, the stage before still computed its input
    transfer_s: float = 0.0  # the stage before was done, the input had not come
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
        return self.wait_s + self.communication_s + self.idle_s + self.overhead_s

    @property
    def communication_s(self) -> float:
        """Time that moving tensors has cost the stage; transfers beside the compute cost none."""
        return self.transfer_s + self.send_s

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
class StepTotals:
    """Steps of one kind, and their compute."""

    num_steps: int = 0
    compute_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """Of a step; 0 without any."""
        return self.compute_s / self.num_steps if self.num_steps else 0.0

    def __add__(self, other: StepTotals) -> StepTotals:
        return StepTotals(self.num_steps + other.num_steps, self.compute_s + other.compute_s)

    def __sub__(self, other: StepTotals) -> StepTotals:
        return StepTotals(self.num_steps - other.num_steps, self.compute_s - other.compute_s)


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
    bytes_in: int = 0  # of tensors from other ranks
    bytes_out: int = 0
    num_undivided: int = 0  # steps with a wait whose transfer is not known: it counts as wait
    prefill: StepTotals = StepTotals()  # of prompt chunks alone
    decode: StepTotals = StepTotals()  # of one token of each sequence alone

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
            bytes_in=self.bytes_in + other.bytes_in,
            bytes_out=self.bytes_out + other.bytes_out,
            num_undivided=self.num_undivided + other.num_undivided,
            prefill=self.prefill + other.prefill,
            decode=self.decode + other.decode,
        )


@dataclass(frozen=True, slots=True)
class _Undivided:
    """A step that is booked but for how its wait divides."""

    record: StepRecord
    needs: int  # the step of the stage before, counted over all calls, that made its input
    due_ns: int
    ready_ns: int
    in_steady: bool


class _UpstreamTimes:
    """When the stage before had computed its latest steps, counted over all calls."""

    def __init__(self) -> None:
        self._first = 0
        self._times_ns: deque[int | None] = deque()

    def add(self, first_step: int, times_ns: Sequence[int | None]) -> None:
        assert first_step == self._first + len(self._times_ns), "times come in the order of steps"
        self._times_ns.extend(times_ns)
        self.forget_before(first_step + len(times_ns) - _MOST_TIMES)

    def __len__(self) -> int:
        return len(self._times_ns)

    def find(self, step: int) -> int | None:
        """None: not told yet, or not known. 0 of one that was forgotten: long ago."""
        place = step - self._first
        if place < 0:
            return 0
        return self._times_ns[place] if place < len(self._times_ns) else None

    def forget_before(self, step: int) -> None:
        while self._first < step and self._times_ns:
            self._times_ns.popleft()
            self._first += 1


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
        # Gets every record once, in order, with its transfer in seconds; None: it is not known.
        self.on_step: Callable[[StepRecord, float | None], None] | None = None
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
        self._first_step = 0  # steps before this call: counted over all calls its first one
        self._num_bytes = {"in": 0, "out": 0}
        self._counts = dict.fromkeys(("steps", "tokens", "sampled", "steady_steps"), 0)
        self._kinds: dict[StepPhase, StepTotals] = {}
        self._upstream = _UpstreamTimes()
        self._undivided: deque[_Undivided] = deque()
        self._num_given_up = 0

    def begin(self, now_s: float) -> None:
        """A generate call starts; time since the last one's end is not counted."""
        self._free_ns = _ns(now_s)
        self._scheduled_ns.clear()
        self._previous_steady = False
        self._first_step = self._counts["steps"]

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

    def sent(
        self,
        step: ScheduledStep,
        now_s: float,
        *,
        needs: int = -1,
        bytes_in: int = 0,
        bytes_out: int = 0,
    ) -> None:
        """The stage is free for the next step: books the time since it was last free.

        Args:
            step: the one that was run.
            now_s: this moment.
            needs: the step of the stage before that made its input; -1: no other stage did.
            bytes_in: of tensors that it received from other ranks.
            bytes_out: of tensors that it sent to other ranks.
        """
        start_ns = self._free_ns
        scheduled_ns = max(start_ns, self._scheduled_ns.pop(step.step))
        ready_ns = max(scheduled_ns, self._input_ready_ns)
        computed_ns = max(ready_ns, self._computed_ns)
        self._free_ns = max(computed_ns, _ns(now_s))
        compute_ns = busy_ns = computed_ns - ready_ns
        if self._compute_only_ns is not None:
            compute_ns = min(busy_ns, self._compute_only_ns)
        parts_ns = {
            "idle": scheduled_ns - start_ns,
            "wait": ready_ns - scheduled_ns,
            "compute": compute_ns,
            "overhead": busy_ns - compute_ns,
            "send": self._free_ns - computed_ns,
        }
        edges_ns = (start_ns, scheduled_ns, ready_ns, computed_ns, self._free_ns)
        record = _record(step, edges_ns, compute_ns, (bytes_in, bytes_out))
        in_steady = self._count(record, parts_ns)
        self._records.append(record)
        needs = needs if needs < 0 else needs + self._first_step
        self._undivided.append(_Undivided(record, needs, scheduled_ns, ready_ns, in_steady))
        self._divide()

    def _count(self, record: StepRecord, parts_ns: Mapping[str, int]) -> bool:
        """Add to the sums; returns whether those of the steady state are among them."""
        counts = self._counts
        _book(self._overall_ns, parts_ns)
        in_steady = record.steady and self._previous_steady
        if in_steady:
            _book(self._steady_ns, parts_ns)
            counts["steady_steps"] += 1
        self._previous_steady = record.steady
        kind = self._kinds.get(record.phase, StepTotals())
        self._kinds[record.phase] = kind + StepTotals(1, record.compute_s)
        counts["steps"] += 1
        counts["tokens"] += record.num_tokens
        counts["sampled"] += record.num_sampled
        self.add_bytes(record.bytes_in, record.bytes_out)
        return in_steady

    def add_bytes(self, bytes_in: int, bytes_out: int) -> None:
        """Count bytes of tensors that belong to no step that follows."""
        self._num_bytes["in"] += bytes_in
        self._num_bytes["out"] += bytes_out

    def end(self, now_s: float) -> None:
        """The generate call is over; what is left counts as idle, or as wait if a step was due."""
        now_ns = max(self._free_ns, _ns(now_s))
        due_ns = min(self._scheduled_ns.values(), default=now_ns)
        due_ns = min(max(due_ns, self._free_ns), now_ns)
        _book(self._overall_ns, {"idle": due_ns - self._free_ns, "wait": now_ns - due_ns})
        self._scheduled_ns.clear()
        self._free_ns = now_ns

    # ---- dividing the time without the input -----------------------------------------------------

    def upstream_computed(self, first_step: int, times_s: Sequence[float | None]) -> None:
        """When the stage before had computed its steps from `first_step` on, on this clock.

        `first_step` counts over all calls; every step of that stage is told once, in order. None:
        it is not known, and what waited for that step is given up.
        """
        times_ns = [None if time_s is None else _ns(time_s) for time_s in times_s]
        self._upstream.add(first_step, times_ns)
        self._divide()

    def give_up(self, before_s: float) -> None:
        """No longer await the times for steps that left before `before_s`: it stays a wait."""
        while self._undivided and self._undivided[0].record.send_end_s < before_s:
            self._num_given_up += 1
            self._tell(self._undivided.popleft(), None)
            self._divide()

    @property
    def is_divided(self) -> bool:
        """Whether every step that is booked has its transfer, or will have none."""
        return not self._undivided

    def _divide(self) -> None:
        """Move what was a transfer out of the waits, as far as it is known, in order."""
        while self._undivided:
            booked = self._undivided[0]
            done_ns: int | None = booked.ready_ns
            if booked.needs >= 0 and booked.ready_ns > booked.due_ns:
                done_ns = self._upstream.find(booked.needs)
            if done_ns is None:
                return
            self._undivided.popleft()
            self._upstream.forget_before(booked.needs)
            transfer_ns = booked.ready_ns - min(max(done_ns, booked.due_ns), booked.ready_ns)
            for account_ns in (self._overall_ns, *([self._steady_ns] * booked.in_steady)):
                account_ns["wait"] -= transfer_ns
                account_ns["transfer"] += transfer_ns
            self._tell(booked, transfer_ns / _NS)

    def _tell(self, booked: _Undivided, transfer_s: float | None) -> None:
        if self.on_step is not None:
            self.on_step(booked.record, transfer_s)

    # ---- what it was so far ----------------------------------------------------------------------

    def snapshot(self) -> StageTotals:
        """The sums so far, over all generate calls; time after the last step is not in them yet."""
        counts = self._counts
        return StageTotals(
            stage=self._stage,
            num_steps=counts["steps"],
            num_tokens=counts["tokens"],
            num_sampled=counts["sampled"],
            overall=_parts(self._overall_ns),
            num_steady_steps=counts["steady_steps"],
            steady=_parts(self._steady_ns),
            bytes_in=self._num_bytes["in"],
            bytes_out=self._num_bytes["out"],
            num_undivided=self._num_given_up + len(self._undivided),
            prefill=self._kinds.get("prefill", StepTotals()),
            decode=self._kinds.get("decode", StepTotals()),
        )

    @property
    def num_steps(self) -> int:
        """Steps that have left this stage, over all calls."""
        return self._counts["steps"]

    @property
    def last_step(self) -> int:
        """Number of the last step that left this stage; -1 before any."""
        return self._records[-1].step if self._records else -1

    def recent(self) -> tuple[StepRecord, ...]:
        """The last records, oldest first."""
        return tuple(self._records)


def _record(
    step: ScheduledStep, edges_ns: Sequence[int], compute_ns: int, num_bytes: tuple[int, int]
) -> StepRecord:
    start_s, scheduled_s, input_ready_s, compute_end_s, send_end_s = [ns / _NS for ns in edges_ns]
    return StepRecord(
        step=step.step,
        slot=step.slot,
        num_tokens=step.num_tokens,
        num_sampled=step.num_sampled,
        start_s=start_s,
        scheduled_s=scheduled_s,
        input_ready_s=input_ready_s,
        compute_end_s=compute_end_s,
        send_end_s=send_end_s,
        steady=step.steady,
        num_sequences=step.num_sequences,
        phase=step.phase,
        compute_s=compute_ns / _NS,
        bytes_in=num_bytes[0],
        bytes_out=num_bytes[1],
    )


def _ns(seconds: float) -> int:
    return round(seconds * _NS)


def _book(account_ns: dict[str, int], parts_ns: Mapping[str, int]) -> None:
    for part, ns in parts_ns.items():
        account_ns[part] += ns


def _parts(account_ns: Mapping[str, int]) -> TimeParts:
    return TimeParts(**{f"{part}_s": ns / _NS for part, ns in account_ns.items()})
