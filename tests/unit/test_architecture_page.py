"""ARCHITECTURE.md leads to files that exist: every path that it names, and in every room."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
# `scheduler/core.py`, `tests/unit/`, `launch/site.env`: written from the package or from the root.
PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/?)`")
SUFFIXES = (".py", ".md", ".env", ".sh", ".toml", ".importlinter", "/")


def named_paths() -> list[str]:
    return sorted({path for path in PATH.findall(PAGE) if path.endswith(SUFFIXES)})


@pytest.mark.parametrize("path", named_paths())
def test_a_path_that_the_page_names_exists(path: str) -> None:
    assert any((folder / path).exists() for folder in (ROOT, ROOT / "mpipipe")), path


def test_the_page_names_every_package() -> None:
    packages = {path.parent.name for path in (ROOT / "mpipipe").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"[\w]+", PAGE))


def test_the_page_is_short_enough_to_be_read() -> None:
    assert len(PAGE.splitlines()) <= 140
