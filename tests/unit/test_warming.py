"""What `mpipipe warm` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpipipe.cli.warming import boot_lines
from mpipipe.clock import ScriptedClock
from mpipipe.metrics.boot import BootTimeline, PartName


def test_the_parts_of_the_boot_and_the_caches_that_there_are_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(kernels))
    monkeypatch.setenv("MPIPIPE_CACHE", str(tmp_path / "mpipipe"))
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
        f"kernels: {kernels}",
    ]
    told = boot_lines(boot, "they are not compiled after so long a time")
    assert told[1].endswith(
        "ranks compiled what they use: they are not compiled after so long a time"
    )
