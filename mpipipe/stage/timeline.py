"""Books a stage's device time: marks on the lane become the events of a `StageAccount`.

Four marks per step cut the lane's time without gaps: taken up → input there → computed → sent. What
lies between one step's `sent` and the next one's `taken up` is idle: the lane had run dry. So the
parts add up to the lane's wall clock by construction. Reading the marks waits for nothing: a step
is booked once its last mark has been reached.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpipipe.metrics.accounting import ScheduledStep, StageAccount
    from mpipipe.stage.lane import Lane, Mark

__all__ = ["LaneTimeline", "StepMarks"]


@dataclass(slots=True)
class StepMarks:
    """Marks around one step's work."""

    step: ScheduledStep
    taken_up: Mark
    input_there: Mark
    computed: Mark
    sent: Mark
    compute_s: float | None = None  # of a compute thread's own: the rest is overhead


class LaneTimeline:
    """Feeds one stage's account from its lane.

    Args:
        lane: where the marks are.
        account: told of every step, in seconds of the host's clock.
    """

    def __init__(self, lane: Lane, account: StageAccount) -> None:
        self._lane = lane
        self._account = account
        self._pending: deque[StepMarks] = deque()
        self._latest: Mark | None = None
        self._latest_s = 0.0

    def begin(self, now_s: float) -> None:
        """A generate call starts now; the lane is empty."""
        self._latest, self._latest_s = self._lane.mark(), now_s
        self._account.begin(now_s)

    def add(self, marks: StepMarks) -> None:
        """A step was put on the lane."""
        self._pending.append(marks)

    def collect(self) -> None:
        """Book the steps that are done."""
        while self._pending and self._pending[0].sent.reached():
            self._book(self._pending.popleft())

    def end(self, now_s: float) -> None:
        """The generate call is over and the lane is empty; what is left counts as idle."""
        self.collect()
        assert not self._pending, "the lane was drained"
        self._account.end(max(now_s, self._latest_s))

    def _book(self, marks: StepMarks) -> None:
        number = marks.step.step
        self._account.step_scheduled(number, self._advance(marks.taken_up))
        self._account.input_ready(number, self._advance(marks.input_there))
        self._account.computed(number, self._advance(marks.computed), marks.compute_s)
        self._account.sent(marks.step, self._advance(marks.sent))

    def _advance(self, mark: Mark) -> float:
        """The host time of `mark`, from that of the mark before it.

        CUDA gives differences as float32 milliseconds: exact to 0.5 µs between neighbours, to
        8 µs over a hundred seconds. So they are added up from mark to mark.
        """
        assert self._latest is not None, "begin comes first"
        self._latest_s += self._latest.seconds_until(mark)
        self._latest = mark
        return self._latest_s
