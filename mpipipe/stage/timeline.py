"""Books a stage's device time: events on the stream become the events of a `StageAccount`.

Four events per step cut the stream's time without gaps: taken up → input there → computed → sent.
What lies between one step's `sent` and the next one's `taken up` is idle: the stream had run dry.
So the parts add up to the stream's wall clock by construction. Reading the events waits for
nothing: a step is booked once its last event has been reached.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpipipe.metrics.accounting import ScheduledStep, StageAccount
    from mpipipe.stage.stream import Event, Stream

__all__ = ["StepEvents", "StreamTimeline"]


@dataclass(slots=True)
class StepEvents:
    """Marks around one step's work."""

    step: ScheduledStep
    taken_up: Event
    input_there: Event
    computed: Event
    sent: Event
    compute_s: float | None = None  # of a compute thread's own: the rest is overhead


class StreamTimeline:
    """Feeds one stage's account from its stream.

    Args:
        stream: where the events are.
        account: told of every step, in seconds of the host's clock.
    """

    def __init__(self, stream: Stream, account: StageAccount) -> None:
        self._stream = stream
        self._account = account
        self._pending: deque[StepEvents] = deque()
        self._latest: Event | None = None
        self._latest_s = 0.0

    def begin(self, now_s: float) -> None:
        """A generate call starts now; the stream is empty."""
        self._latest, self._latest_s = self._stream.record_event(), now_s
        self._account.begin(now_s)

    def add(self, events: StepEvents) -> None:
        """A step was put on the stream."""
        self._pending.append(events)

    def collect(self) -> None:
        """Book the steps that are done."""
        while self._pending and self._pending[0].sent.query():
            self._book(self._pending.popleft())

    def end(self, now_s: float) -> None:
        """The generate call is over and the stream is empty; what is left counts as idle."""
        self.collect()
        assert not self._pending, "the stream was drained"
        self._account.end(max(now_s, self._latest_s))

    def _book(self, events: StepEvents) -> None:
        number = events.step.step
        self._account.step_scheduled(number, self._advance(events.taken_up))
        self._account.input_ready(number, self._advance(events.input_there))
        self._account.computed(number, self._advance(events.computed), events.compute_s)
        self._account.sent(events.step, self._advance(events.sent))

    def _advance(self, event: Event) -> float:
        """The host time of `event`, from that of the event before it.

        CUDA gives differences as float32 milliseconds: exact to 0.5 µs between neighbours, to
        8 µs over a hundred seconds. So they are added up from event to event.
        """
        assert self._latest is not None, "begin comes first"
        self._latest_s += self._latest.seconds_until(event)
        self._latest = event
        return self._latest_s
