"""What `mpipipe warm` prints."""

from __future__ import annotations

import os
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


def test_a_cache_that_cannot_be_written_and_no_home_folder_are_no_secret_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = BootTimeline(ScriptedClock(100.0))
    boot.end()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("MPIPIPE_CACHE", str(tmp_path / "cache"))
    assert len(boot_lines(boot)) == 1
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    (told,) = boot_lines(boot)[1:]
    assert told.startswith(f"{tmp_path}/cache/tokenizers cannot be written: a tokenizer that is")

    def closed(_: Path) -> bool:
        raise PermissionError("a folder above may not be entered")

    monkeypatch.setattr(Path, "exists", closed)
    monkeypatch.setattr(Path, "is_dir", closed)
    assert boot_lines(boot)[1:] == [told]

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("mpipipe.cli.warming.cache_folder", no_home)
    assert len(boot_lines(boot)) == 1
