"""The stream's events become a stage's account: the parts add up, and only finished steps count."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, cast

import pytest

from mpipipe.clock import ScriptedClock
from mpipipe.metrics.accounting import StageAccount, StepPhase, TimeParts
from mpipipe.stage.timeline import StepEvents, StreamTimeline

if TYPE_CHECKING:
    from mpipipe.stage.stream import Event, Stream


@dataclass
class Step:
    step: int
    slot: int = 0
    num_tokens: int = 3
    num_sampled: int = 3
    steady: bool = True
    num_sequences: int = 3
    phase: StepPhase = "decode"


@dataclass
class ScriptedEvent:
    """Reached at `at_s` of the device's own clock, whose zero is anywhere."""

    stream: ScriptedStream
    at_s: float

    def query(self) -> bool:
        return self.stream.now_s >= self.at_s

    def seconds_until(self, later: Event) -> float:
        assert isinstance(later, ScriptedEvent)
        assert self.query()
        assert later.query()
        return later.at_s - self.at_s


@dataclass
class ScriptedStream:
    """Marks where the test wants them; the host's clock shows 100 s when the device's shows 5000.

    `rate`: seconds of the device in one of the host. `lost_s`: what the device did not count.
    """

    now_s: float = 5000.0
    rate: float = 1.0
    lost_s: float = 0.0
    busy_until_s: float = 0.0
    host: ScriptedClock = field(default_factory=lambda: ScriptedClock(100.0))
    events: list[ScriptedEvent] = field(default_factory=list)

    def device_s(self, host_s: float) -> float:
        return 5000.0 + (host_s - 100.0) * self.rate - self.lost_s

    def pass_to(self, host_s: float) -> None:
        """Let time pass until the host's clock shows `host_s`."""
        self.host.advance(host_s - self.host.now_s())
        self.now_s = self.device_s(host_s)

    def record_event(self) -> ScriptedEvent:
        return self.at(max(self.now_s, self.busy_until_s))

    def at(self, at_s: float) -> ScriptedEvent:
        self.events.append(ScriptedEvent(self, at_s))
        return self.events[-1]


class Timed:
    """A timeline that begins at host time 100."""

    def __init__(self) -> None:
        self.stream = ScriptedStream()
        self.account = StageAccount(0)
        self.timeline = StreamTimeline(cast("Stream", self.stream), self.account, self.stream.host)
        self.timeline.begin(100.0)

    def add(self, number: int, *offsets: float, compute_s: float | None = None) -> None:
        """A step whose events are so many seconds after the beginning."""
        taken_up, input_there, computed, sent = (self.stream.at(5000.0 + o) for o in offsets)
        self.timeline.add(
            StepEvents(Step(number), taken_up, input_there, computed, sent, compute_s)
        )

    def reach(self, offset: float) -> None:
        self.stream.now_s = 5000.0 + offset
        self.timeline.collect()

    @property
    def overall(self) -> TimeParts:
        return self.account.snapshot().overall

    @property
    def num_steps(self) -> int:
        return self.account.snapshot().num_steps


def test_four_marks_cut_a_step_into_wait_compute_and_send_and_the_rest_is_idle() -> None:
    timed = Timed()
    timed.add(0, 1.0, 1.5, 4.0, 4.25)
    timed.add(1, 4.25, 4.25, 6.0, 6.0)
    timed.add(2, 9.0, 9.5, 10.0, 10.0)  # the stream had run dry for 3 s
    timed.reach(10.0)
    timed.timeline.end(110.5)
    overall = timed.overall
    assert overall.idle_s == pytest.approx(1.0 + 3.0 + 0.5)
    assert overall.wait_s == pytest.approx(0.5 + 0.5)
    assert overall.compute_s == pytest.approx(2.5 + 1.75 + 0.5)
    assert overall.send_s == pytest.approx(0.25)
    assert overall.overhead_s == 0
    assert overall.wall_s == pytest.approx(10.5)


def test_what_a_compute_thread_did_not_need_itself_is_overhead() -> None:
    timed = Timed()
    timed.add(0, 0.0, 0.5, 3.0, 3.0, compute_s=2.25)
    timed.reach(3.0)
    timed.timeline.end(103.0)
    overall = timed.overall
    assert (overall.compute_s, overall.overhead_s) == pytest.approx((2.25, 0.25))
    assert overall.wall_s == pytest.approx(3.0)


def test_a_step_is_booked_once_its_last_mark_is_reached_and_in_order() -> None:
    timed = Timed()
    timed.add(0, 0.0, 0.0, 1.0, 1.0)
    timed.add(1, 1.0, 1.0, 2.0, 2.5)
    timed.reach(0.99)
    assert timed.num_steps == 0
    timed.reach(1.0)
    assert timed.num_steps == 1
    timed.reach(2.4)
    assert timed.num_steps == 1
    timed.reach(2.5)
    assert timed.num_steps == 2
    assert [record.step for record in timed.account.recent()] == [0, 1]


def test_records_are_in_the_hosts_time() -> None:
    timed = Timed()
    timed.add(0, 1.0, 1.5, 4.0, 4.25)
    timed.reach(5.0)
    (record,) = timed.account.recent()
    assert (record.start_s, record.scheduled_s) == pytest.approx((100.0, 101.0))
    assert (record.compute_end_s, record.send_end_s) == pytest.approx((104.0, 104.25))


def test_time_between_two_calls_is_not_counted() -> None:
    timed = Timed()
    timed.add(0, 0.0, 0.0, 1.0, 1.0)
    timed.reach(1.0)
    timed.timeline.end(101.0)
    timed.stream.now_s = 5050.0
    timed.timeline.begin(150.0)
    timed.add(1, 50.5, 50.5, 51.0, 51.0)
    timed.reach(51.0)
    timed.timeline.end(151.0)
    assert timed.overall.wall_s == pytest.approx(2.0)
    assert timed.overall.idle_s == pytest.approx(0.5)


def test_a_device_clock_that_runs_fast_takes_no_time_away() -> None:
    """Events and the host's clock differ by a little: the end is never before the last step."""
    timed = Timed()
    timed.add(0, 0.0, 0.0, 1.0, 1.001)
    timed.reach(2.0)
    timed.timeline.end(101.0)
    assert timed.overall.wall_s == pytest.approx(1.001)
    assert timed.overall.idle_s == 0


def test_an_end_with_steps_on_the_stream_is_our_bug() -> None:
    timed = Timed()
    timed.add(0, 0.0, 0.0, 1.0, 1.0)
    with pytest.raises(AssertionError, match="drained"):
        timed.timeline.end(100.5)


def test_the_parts_of_any_run_add_up_to_its_wall_clock() -> None:
    rng, timed, at_s = Random(1), Timed(), 0.0
    for number in range(500):
        offsets = []
        for _ in range(4):
            at_s += rng.choice([0.0, rng.random() * 1e-3])
            offsets.append(at_s)
        timed.add(number, *offsets)
        if rng.random() < 0.3:
            timed.reach(at_s - rng.random() * 1e-2)
    timed.reach(at_s)
    timed.timeline.end(100.0 + at_s + 0.25)
    assert timed.num_steps == 500
    assert timed.overall.wall_s == pytest.approx(at_s + 0.25, abs=1e-6)
    steady = timed.account.snapshot().steady
    assert steady.wall_s <= at_s


# ---- two clocks that drift apart -----------------------------------------------------------------


class Drifting:
    """A GPU with a clock of its own, which runs one step after another."""

    def __init__(self, rate: float = 1.0) -> None:
        self.stream = ScriptedStream(rate=rate)
        self.account = StageAccount(0, num_recent=10_000)
        self.timeline = StreamTimeline(cast("Stream", self.stream), self.account, self.stream.host)
        self.timeline.begin(100.0)
        self.ends_s: list[float] = []  # of the steps, by the host

    def run(self, num_steps: int, seconds: float = 0.02) -> None:
        for _ in range(num_steps):
            self.step(seconds)

    def step(self, seconds: float) -> None:
        """Polled when it begins, in its middle, 0.1 ms before it ends, and when it has ended."""
        stream = self.stream
        began_s, ended_s = stream.host.now_s(), stream.host.now_s() + seconds
        begin, end = (stream.device_s(at_s) for at_s in (began_s, ended_s))
        began, ended = stream.at(begin), stream.at(end)
        stream.busy_until_s = end
        self.timeline.add(StepEvents(Step(len(self.ends_s)), began, began, ended, ended))
        for at_s in (began_s, began_s + seconds / 2, ended_s - 1e-4, ended_s):
            stream.pass_to(at_s)
            self.timeline.collect()
        self.ends_s.append(ended_s)

    def wait(self, seconds: float) -> None:
        """Nothing is on the stream; polled 25 times a second, and at once when asked to."""
        until_s = self.stream.host.now_s() + seconds
        while (now_s := self.stream.host.now_s()) < until_s:
            self.stream.pass_to(now_s + (1e-5 if self.timeline.collect() else 0.04))

    @property
    def overall(self) -> TimeParts:
        return self.account.snapshot().overall

    @property
    def errors_s(self) -> list[float]:
        """How far the end of each step is from what the host's clock showed."""
        told = [record.send_end_s for record in self.account.recent()]
        return [told_s - end_s for told_s, end_s in zip(told, self.ends_s, strict=True)]


DRIFTS = pytest.mark.parametrize("drift", [100e-6, -100e-6])


@DRIFTS
def test_a_device_clock_that_drifts_stays_with_the_hosts(drift: float) -> None:
    """Set once, it would be 12 ms off after two minutes."""
    timed = Drifting(1.0 + drift)
    timed.run(6_000)
    # As much as it drifts from one mark to the next, and until that is made up; a poll's interval.
    assert max(map(abs, timed.errors_s)) < 2.5e-4


@DRIFTS
def test_a_mark_behind_a_long_step_counts_from_the_last_look_that_missed_it(drift: float) -> None:
    timed = Drifting(1.0 + drift)
    timed.run(60, seconds=2.0)
    assert max(map(abs, timed.errors_s)) < 1e-3


@DRIFTS
def test_a_device_clock_that_drifts_stays_with_the_hosts_while_nothing_runs(drift: float) -> None:
    timed = Drifting(1.0 + drift)
    timed.wait(600.0)
    timed.run(1)
    assert abs(timed.errors_s[0]) < 2.5e-4


@DRIFTS
def test_setting_the_clock_takes_no_time_from_the_parts(drift: float) -> None:
    timed = Drifting(1.0 + drift)
    timed.run(3_000)
    ends_s = [record.send_end_s for record in timed.account.recent()]
    assert ends_s == sorted(ends_s)
    timed.timeline.end(160.0)
    overall = timed.overall
    assert overall.wall_s == pytest.approx(60.0, abs=2.5e-4)
    assert overall.compute_s == pytest.approx(60.0, abs=2.5e-4)


def test_a_large_difference_is_made_up_little_by_little() -> None:
    """No step may be more than 1 % longer for it."""
    timed = Drifting()
    timed.run(50)
    timed.stream.lost_s = 0.03
    timed.stream.host.advance(0.03)  # in which the device did not count
    timed.run(500)
    lengths_s = [record.compute_s for record in timed.account.recent()]
    assert len(timed.errors_s) == 550
    assert max(lengths_s) < 0.02 * 1.0101
    assert abs(timed.errors_s[51]) > 0.025
    assert abs(timed.errors_s[-1]) < 2.5e-4


def test_a_new_mark_on_a_busy_stream_is_looked_at_once_more_soon() -> None:
    timed = Drifting()
    timed.stream.pass_to(100.49)
    assert not timed.timeline.collect()
    timed.stream.pass_to(100.5)
    timed.stream.busy_until_s = timed.stream.device_s(100.6)
    assert timed.timeline.collect()
    assert not timed.timeline.collect()  # it is under way: as often as the rest
