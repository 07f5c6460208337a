"""The parts of a rank's boot: without gaps, waiting apart from work, told as they end."""

from __future__ import annotations

import pytest

from mpipipe.clock import ScriptedClock
from mpipipe.metrics.boot import BootPart, BootTimeline


@pytest.fixture
def clock() -> ScriptedClock:
    return ScriptedClock(100.0)


def named(timeline: BootTimeline) -> list[tuple[str, float]]:
    return [(part.name, round(part.seconds, 6)) for part in timeline.parts]


def test_each_part_ends_where_the_next_begins(clock: ScriptedClock) -> None:
    timeline = BootTimeline(clock, started_s=98.0)
    timeline.begin("imports", at_s=98.5)
    clock.advance(1.0)
    timeline.begin("mpi")
    clock.advance(3.0)
    timeline.begin("ready")
    clock.advance(0.25)
    timeline.end()
    clock.advance(9.0)
    timeline.begin("plan")
    assert named(timeline) == [("process", 0.5), ("imports", 2.5), ("mpi", 3.0), ("ready", 0.25)]
    ends = [part.start_s + part.seconds for part in timeline.parts]
    assert ends[:-1] == [part.start_s for part in timeline.parts[1:]]
    assert sum(part.seconds for part in timeline.parts) == timeline.wall_s == 6.25


def test_waiting_for_others_is_apart_from_work_and_says_for_what(clock: ScriptedClock) -> None:
    timeline = BootTimeline(clock)
    timeline.begin("plan")
    clock.advance(2.0)
    with timeline.waiting("plan"):
        clock.advance(5.0)
    clock.advance(1.0)
    timeline.end()
    assert named(timeline) == [("plan", 2.0), ("wait", 5.0), ("plan", 1.0)]
    assert [part.phase for part in timeline.parts] == ["", "plan", ""]
    assert timeline.own_s(since_s=100.0) == 3.0
    assert timeline.own_s(since_s=106.0) == 1.0
    with timeline.waiting("merge"):
        clock.advance(1.0)
    assert len(timeline.parts) == 3


def test_a_part_too_short_to_matter_belongs_to_the_next(clock: ScriptedClock) -> None:
    timeline = BootTimeline(clock)
    timeline.begin("configuration")
    clock.advance(0.0005)
    with timeline.waiting("configuration"):
        clock.advance(1.0)
    timeline.begin("handshake")
    clock.advance(1.0)
    timeline.end()
    assert named(timeline) == [("wait", 1.0005), ("handshake", 1.0)]


def test_work_that_alternates_is_divided(clock: ScriptedClock) -> None:
    timeline = BootTimeline(clock)
    timeline.begin("read weights")
    clock.advance(4.0)
    timeline.divide("convert weights", 1.5, num_bytes=6_100)
    clock.advance(0.5)
    timeline.begin("cache")
    timeline.divide("convert weights", 99.0, num_bytes=0)  # cannot be longer than the part was
    clock.advance(1.0)
    timeline.end()
    assert named(timeline) == [
        ("read weights", 2.5), ("convert weights", 2.0), ("cache", 0.0), ("convert weights", 1.0),
    ]  # fmt: skip
    assert [part.num_bytes for part in timeline.parts] == [6_100, 0, 0, 0]


def test_parts_are_told_as_they_end_and_those_before_too(clock: ScriptedClock) -> None:
    told: list[BootPart] = []
    timeline = BootTimeline(clock)
    clock.advance(1.0)
    timeline.begin("mpi")
    clock.advance(1.0)
    timeline.begin("configuration")
    timeline.listen(told.append)
    assert [part.name for part in told] == ["process", "mpi"]
    clock.advance(1.0)
    timeline.end()
    assert tuple(told) == timeline.parts


def test_what_does_not_apply_is_not_told() -> None:
    assert BootPart("plan", 1.0, 2.0).fields() == {"name": "plan", "start_s": 1.0, "seconds": 2.0}
    part = BootPart("wait", 1.0, 2.0, num_bytes=7, phase="load")
    assert list(part.fields()) == ["name", "start_s", "seconds", "bytes", "phase"]
    assert part.event() == {
        "name": "wait",
        "start_s": 1.0,
        "end_s": 3.0,
        "bytes": 7,
        "phase": "load",
    }
