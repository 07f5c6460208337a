"""What `mpipipe warm` prints."""

from __future__ import annotations

import pytest

from mpipipe.cli.warming import boot_lines
from mpipipe.clock import ScriptedClock
from mpipipe.metrics.boot import BootTimeline, PartName


def test_the_parts_of_the_boot_and_the_caches_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/shared/kernels")
    monkeypatch.setenv("MPIPIPE_CACHE", "/shared/mpipipe")
    clock = ScriptedClock(100.0)
    boot = BootTimeline(clock)
    parts: list[tuple[PartName, float]] = [
        ("imports", 3.0),
        ("plan", 0.01),
        ("kernels", 2.25),
        ("imports", 1.0),
    ]
    for name, seconds in parts:
        boot.begin(name)
        clock.advance(seconds)
    boot.end()
    assert boot_lines(boot) == [
        "ready after 6.3 s: imports 4.0 s · kernels 2.2 s",
        "kernels are in /shared/kernels, the tokenizer is in /shared/mpipipe",
    ]
