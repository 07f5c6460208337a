"""How fast copies are: told by events that have passed, and by none that has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpipipe.kv_cache import copy_times
from mpipipe.kv_cache.copy_times import CopyTimes


class ScriptedEvent:
    """An event that passes when its stream's copies are said to have ended."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: ScriptedStream) -> None:
        self._stream = stream
        self._number, self._at_ms = stream.num_recorded, stream.now_ms
        stream.num_recorded += 1

    def query(self) -> bool:
        return self._number < self._stream.num_passed

    def elapsed_time(self, later: ScriptedEvent) -> float:
        return later._at_ms - self._at_ms


class ScriptedStream:
    """Counts its events, and how many of them have passed."""

    def __init__(self) -> None:
        self.num_recorded = self.num_passed = 0
        self.now_ms = 0.0


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "Event", ScriptedEvent)
    return ScriptedStream()


def copy(times: CopyTimes, stream: Any, num_bytes: int, milliseconds: float) -> None:
    began = times.begin(stream)
    stream.now_ms += milliseconds
    times.end(stream, began, num_bytes)


def test_copies_that_have_ended_count(stream: Any) -> None:
    times = CopyTimes()
    assert times.bytes_per_s is None
    copy(times, stream, 1000, 2.0)
    copy(times, stream, 5000, 4.0)
    assert times.bytes_per_s is None, "both are under way"
    stream.num_passed = 3  # the second has begun
    assert times.bytes_per_s == pytest.approx(1000 / 2e-3)
    stream.num_passed = 4
    assert times.bytes_per_s == pytest.approx(6000 / 6e-3)
    times.add(6000, 6e-3)
    assert times.bytes_per_s == pytest.approx(1e6)


def test_of_copies_under_way_only_some_are_timed(
    stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_times, "_NUM_TIMED", 3)
    times = CopyTimes()
    for _ in range(5):
        copy(times, stream, 1000, 1.0)
    assert stream.num_recorded == 6
    stream.num_passed = 6
    copy(times, stream, 1000, 1.0)
    assert stream.num_recorded == 8, "there is room again"
    stream.num_passed = 8
    assert times.bytes_per_s == pytest.approx(4000 / 4e-3)
