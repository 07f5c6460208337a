"""Shared memory of killed ranks: only what no process uses goes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from mpipipe.topology.leftovers import remove_leftovers


def segment(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(bytes(mmap.PAGESIZE))
    return path


def later(path: Path, seconds: float) -> float:
    return path.stat().st_ctime + seconds


def test_old_segments_that_no_process_has_mapped_are_removed(tmp_path: Path) -> None:
    left = segment(tmp_path, "mpich_shm_left")
    used = segment(tmp_path, "mpich_shm_used")
    other = segment(tmp_path, "other")
    with used.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert remove_leftovers(tmp_path, Path("/proc"), later(other, 61)) == 1
    assert (left.exists(), used.exists(), other.exists()) == (False, True, True)


def test_a_young_segment_may_not_be_mapped_yet(tmp_path: Path) -> None:
    path = segment(tmp_path, "mpich_shm_young")
    assert remove_leftovers(tmp_path, Path("/proc"), later(path, 59)) == 0
    assert path.exists()


def test_segments_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = segment(tmp_path, "mpich_shm_theirs")
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    assert remove_leftovers(tmp_path, Path("/proc"), later(path, 61)) == 0
    assert path.exists()


def test_a_host_without_these_folders_is_no_error(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path / "shm", tmp_path / "proc") == 0
    path = segment(tmp_path, "mpich_shm_left")
    assert remove_leftovers(tmp_path, tmp_path / "proc", later(path, 61)) == 0
    assert path.exists()
