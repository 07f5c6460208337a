"""The host's clock for points of a device's stream: the two clocks drift apart, so it is set again.

A GPU counts time with an oscillator of its own; 20 to 100 µs a second away from the host's are
normal, which is some milliseconds after minutes. Every half second a mark goes onto the stream. It
was passed between the last look that did not find it passed and the first one that did. Where the
device's time does not say so, the difference is made up over the next half second of the device's
time: device time becomes host time piecewise linearly, without jumps, and never goes back.

Marks wait for nothing. On a CPU, whose marks are the host's own time, there is nothing to make up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpipipe.clock import Clock
    from mpipipe.stage.stream import Event, Stream

__all__ = ["DeviceClock"]

_INTERVAL_S = 0.5
# A part of a step is at most so much too long or too short because a difference is made up.
_MOST_SLEW = 0.01


@dataclass(slots=True)
class _Mark:
    """A point of the stream that was not found passed yet."""

    event: Event
    not_before_s: float  # by the host's clock


class DeviceClock:
    """Host times of one stream's points.

    Args:
        stream: whose device.
        clock: the host's, in seconds.
    """

    def __init__(self, stream: Stream, clock: Clock) -> None:
        self._stream = stream
        self._clock = clock
        self._latest: Event | None = None  # the latest mark that was passed
        self._latest_device_s = 0.0
        self._host_s = 0.0  # of that mark
        self._to_make_up_s = 0.0  # over the next `_INTERVAL_S` of the device
        self._looked_s = 0.0  # when a mark was made, or found passed
        self._mark: _Mark | None = None

    def begin(self, now_s: float) -> Event:
        """The stream is empty and it is `now_s`: returns the event of device time 0."""
        event = self._stream.record_event()
        self._latest, self._latest_device_s = event, 0.0
        self._host_s, self._to_make_up_s = now_s, 0.0
        self._looked_s, self._mark = now_s, None
        return event

    def poll(self) -> bool:
        """Look whether the mark was passed, or make one when it is time.

        True: the device is about to pass a new one if it has nothing to do, so look again at once.
        """
        now_s = self._clock.now_s()
        is_new = self._mark is None and now_s - self._looked_s >= _INTERVAL_S
        if is_new:
            self._mark = _Mark(self._stream.record_event(), now_s)
        if self._mark is None:
            return False
        if self._mark.event.query():
            self._set(self._mark, self._clock.now_s())
            self._mark = None
            return False
        self._mark.not_before_s = now_s
        return is_new

    def on_host(self, device_s: float) -> float:
        """The host's time when the device's was `device_s` after `begin`."""
        passed_s = device_s - self._latest_device_s
        return self._host_s + passed_s + self._to_make_up_s * min(1.0, passed_s / _INTERVAL_S)

    def _set(self, mark: _Mark, seen_s: float) -> None:
        """`mark` was passed between `mark.not_before_s` and `seen_s`: go on from there."""
        assert self._latest is not None, "begin comes first"
        device_s = self._latest_device_s + self._latest.seconds_until(mark.event)
        host_s = self.on_host(device_s)
        error_s = min(max(host_s, mark.not_before_s), seen_s) - host_s
        most_s = _MOST_SLEW * _INTERVAL_S
        self._latest, self._latest_device_s = mark.event, device_s
        self._host_s, self._to_make_up_s = host_s, min(max(error_s, -most_s), most_s)
        self._looked_s = seen_s
