"""The schema of a run's files: the page names each field, and lines are held against the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from mpipipe.logs.pages import FILES_PAGE, page
from mpipipe.logs.schema import DOCUMENTS, LINE_FILES, SCHEMA, FileSchema, check_line, schema_of
from mpipipe.logs.steps import PARTS
from mpipipe.logs.summary import LOADING
from mpipipe.metrics.boot import PREPROCESSING, PartName
from tests.unit.written_run import WrittenRun

WORDS = set(re.findall(r"`([^`\n]+)`", page(FILES_PAGE)))


@pytest.mark.parametrize("kind", [*LINE_FILES, *DOCUMENTS], ids=lambda kind: kind.title)
def test_the_page_names_every_field_of_every_file(kind: FileSchema) -> None:
    assert kind.title in WORDS
    assert [field.name for field in kind.fields if field.name not in WORDS] == []
    assert {field.kind for field in kind.fields} <= {"int", "float", "str", "list", "object"}


def test_the_page_names_the_schema_the_parts_and_the_boot_events() -> None:
    assert f"\nSchema {SCHEMA}." in page(FILES_PAGE)
    assert {f"{part}_s" for part in PARTS} <= WORDS
    assert set(get_args(PartName)) <= WORDS
    assert {*PREPROCESSING, *LOADING} <= set(get_args(PartName))


def test_the_lines_of_the_tests_own_runs_keep_to_it(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path)
    run.write()
    held = [path.name for path in tmp_path.iterdir() if schema_of(path.name)]
    assert len(held) == 10
    for name in held:
        if name.endswith(".json"):
            continue
        for line in run.lines(name):
            assert check_line(name, line) == []


def test_what_is_wrong_with_a_line_is_told() -> None:
    line = {"run": "0", "attempt": True, "job": None, "replica": 0, "rank": 0, "stage": 0}
    line |= {"t_s": 1, "of_rank": None, "offset_s": "1", "more": 1}
    assert check_line("clock.jsonl", line) == [
        "clock.jsonl: attempt is True, not int",
        "clock.jsonl: of_rank is null",
        "clock.jsonl: offset_s is '1', not float",
        "clock.jsonl: error_s is missing",
        "clock.jsonl: more is not in the schema",
    ]
    assert check_line("clock.jsonl", []) == ["clock.jsonl: not an object"]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("rank_12.log", "rank_<r>.log"),
        ("steps_rank_0.1.jsonl", "steps_rank_<r>.jsonl"),
        ("steps_rank_0.all.jsonl", "steps_rank_<r>.jsonl"),
        ("steps_rank_0.all2.jsonl", "steps_rank_<r>.jsonl"),
        ("samples_rank_3.jsonl", "samples_rank_<r>.jsonl"),
        ("completions.jsonl", None),
    ],
)
def test_which_schema_a_file_has(name: str, title: str | None) -> None:
    kind = schema_of(name)
    assert (kind.title if kind else None) == title
    if kind is None:
        with pytest.raises(ValueError, match="no file of a run"):
            check_line(name, {})
