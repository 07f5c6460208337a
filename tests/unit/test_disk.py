"""The disk of a folder is measured once for all ranks of a host, and nothing of it is left."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from mpipipe.topology import disk
from mpipipe.topology.disk import disk_bytes_per_s, measure_disk


def test_a_measurement_leaves_nothing_and_is_a_rate(tmp_path: Path) -> None:
    assert measure_disk(tmp_path) > 1e6
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were measured, each at 3.14159 GB/s."""
    folders: list[Path] = []

    def measure(folder: Path) -> float:
        folders.append(folder)
        return 3.14159e9

    monkeypatch.setattr(disk, "measure_disk", measure)
    return folders


def test_all_ranks_of_a_host_take_one_measurement_in_two_digits(
    measured: list[Path], tmp_path: Path
) -> None:
    found: list[int] = []

    def rank() -> None:
        found.append(disk_bytes_per_s(str(tmp_path), kept=tmp_path / "kept"))

    ranks = [threading.Thread(target=rank) for _ in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert found == [3_100_000_000] * 4
    assert measured == [tmp_path]
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o600


def test_an_old_figure_is_measured_again(
    measured: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for now_s, number in ((1000.0, 1), (4000.0, 1), (5000.0, 2), (900.0, 3)):
        monkeypatch.setattr("time.time", lambda now_s=now_s: now_s)
        disk_bytes_per_s(str(tmp_path), kept=tmp_path / "kept")
        assert len(measured) == number


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"1": 2}', "null", "\xff"])
def test_what_is_broken_is_measured_again(
    content: str, measured: list[Path], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.write_text(content, encoding="latin-1")
    assert disk_bytes_per_s(str(tmp_path), kept=kept) == 3_100_000_000
    ((_, rate),) = json.loads(kept.read_text()).values()
    assert rate == 3_100_000_000


def test_without_a_folder_or_room_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    assert disk_bytes_per_s("", kept=kept) == 0
    assert disk_bytes_per_s(str(tmp_path / "none"), kept=kept) == 0

    def full(_: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "measure_disk", full)
    assert disk_bytes_per_s(str(tmp_path), kept=kept) == 0


def test_a_file_that_another_has_put_there_is_not_followed(
    measured: list[Path], tmp_path: Path
) -> None:
    target = tmp_path / "precious"
    target.write_text("{}")
    os.symlink(target, tmp_path / "kept")
    assert disk_bytes_per_s(str(tmp_path), kept=tmp_path / "kept") == 0
    assert measured == []
    assert target.read_text() == "{}"
