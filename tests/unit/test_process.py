from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpipipe.topology.process import process_age_s


def fake_stat(root: Path, name: str, start: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    fields = ["S", *["0"] * 18, start, "0", "0"]
    (root / "proc/self/stat").write_text(f"4711 ({name}) {' '.join(fields)}\n")
    return root


@pytest.mark.parametrize("name", ["python3", "odd) 7 (name"])
def test_the_age_follows_from_the_start_in_ticks_since_boot(tmp_path: Path, name: str) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    root = fake_stat(tmp_path, name, str(40 * ticks))
    assert process_age_s(root, since_boot_s=lambda: 42.5) == pytest.approx(2.5)
    assert process_age_s(root, since_boot_s=lambda: 39.99) == 0.0  # a tick is 10 ms


def test_a_kernel_that_does_not_tell(tmp_path: Path) -> None:
    assert process_age_s(tmp_path) is None
    assert process_age_s(fake_stat(tmp_path, "python3", "-")) is None


def test_this_process_is_some_seconds_old() -> None:
    age_s = process_age_s()
    assert age_s is not None
    assert 0.0 < age_s < 24 * 3600
