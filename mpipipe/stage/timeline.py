"""Books a stage's device time: events on the stream become the events of a `StageAccount`.

Four events per step cut the stream's time without gaps: taken up → input there → computed → sent.
What lies between one step's `sent` and the next one's `taken up` is idle: the stream had run dry.
So the parts add up to the stream's wall clock by construction. Reading the events waits for
nothing: a step is booked once its last event has been reached. `device_clock` puts the stream's
time on the host's clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.stage.device_clock import DeviceClock

if TYPE_CHECKING:
    from mpipipe.clock import Clock
    from mpipipe.metrics.accounting import ScheduledStep, StageAccount
    from mpipipe.stage.step_times import StepTimesLink
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
    needs: int = -1  # the step of the stage before that made its input; -1: no other stage did
    bytes_in: int = 0  # of tensors from and to other ranks
    bytes_out: int = 0


class StreamTimeline:
    """Feeds one stage's account from its stream.

    Args:
        stream: where the events are.
        account: told of every step, in seconds of the host's clock.
        clock: the host's.
        link: to the stages before and behind; None: there are none.
    """

    def __init__(
        self,
        stream: Stream,
        account: StageAccount,
        clock: Clock,
        link: StepTimesLink | None = None,
    ) -> None:
        self._device_clock = DeviceClock(stream, clock)
        self._account = account
        self._link = link
        self._pending: deque[StepEvents] = deque()
        self._latest: Event | None = None
        self._latest_device_s = 0.0  # since `begin`

    def begin(self, now_s: float) -> None:
        """A generate call starts now; the stream is empty."""
        self._latest, self._latest_device_s = self._device_clock.begin(now_s), 0.0
        self._account.begin(now_s)

    def add(self, events: StepEvents) -> None:
        """A step was put on the stream."""
        self._pending.append(events)

    def collect(self) -> bool:
        """Book the steps that are done; True: look again at once, a clock is being read."""
        look_again = self._device_clock.poll()
        while self._pending and self._pending[0].sent.query():
            self._book(self._pending.popleft())
        if self._link is not None:
            self._link.poll()
        return look_again

    def end(self, now_s: float, bytes_in: int = 0) -> None:
        """The generate call is over and the stream is empty; what is left counts as idle.

        `bytes_in`: received since the last step.
        """
        self.collect()
        assert not self._pending, "the stream was drained"
        self._account.end(max(now_s, self._device_clock.on_host(self._latest_device_s)))
        self._account.add_bytes(bytes_in, 0)
        if self._link is not None:
            self._link.flush()

    async def settle(self) -> None:
        """Wait a moment until what other stages tell about this one's steps is here."""
        if self._link is not None:
            await self._link.settle()

    def _book(self, events: StepEvents) -> None:
        number = events.step.step
        self._account.step_scheduled(number, self._advance(events.taken_up))
        self._account.input_ready(number, self._advance(events.input_there))
        computed_s = self._advance(events.computed)
        self._account.computed(number, computed_s, events.compute_s)
        self._account.sent(
            events.step,
            self._advance(events.sent),
            needs=events.needs,
            bytes_in=events.bytes_in,
            bytes_out=events.bytes_out,
        )
        if self._link is not None:
            self._link.computed(computed_s)

    def _advance(self, event: Event) -> float:
        """The host time of `event`, from the device time of the event before it.

        CUDA gives differences as float32 milliseconds: exact to 0.5 µs between neighbours, to
        8 µs over a hundred seconds. So they are added up from event to event.
        """
        assert self._latest is not None, "begin comes first"
        self._latest_device_s += self._latest.seconds_until(event)
        self._latest = event
        return self._device_clock.on_host(self._latest_device_s)
