"""Which id each line of a prompt file has, whatever is wrong with it or with its neighbours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpipipe.config.prompts import (
    _FoundPrompt,
    _id_of_broken_line,
    _own_ids,
    _read_id,
    read_prompts,
)
from mpipipe.config.schema import GenerationConfig


def ids(folder: Path, *lines: str, limit: int = 0) -> list[str]:
    path = folder / "p.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return [line.prompt_id for line in read_prompts(path, GenerationConfig(), limit)]


def test_a_broken_line_never_takes_the_id_of_another(tmp_path: Path) -> None:
    good, last = '{"id": 0, "prompt": "x"}', '{"id": 2, "prompt": "y"}'
    assert ids(tmp_path, good, '{"prompt": "cut off', last) == ["0", "2#line2", "2"]
    assert ids(tmp_path, good, '{"id": 2, "prompt": "cut', last) == ["0", "2#line2", "2"]
    assert ids(tmp_path, good, '{"id": 1, "prompt": "cut', last) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "a", "prompt": "x", "temperature": -1}',
        '{"id": "a", "prompt": "x", "zzz": 1}',
        '{"id": "a", "prompt": ""}',
        '{"id": "a"}',
        '{"id": "a", "custom_id": "b", "prompt": "x"}',
        '{"id": true, "custom_id": "a", "prompt": "x"}',
        '{"custom_id": "a", "body": 3}',
        '{"prompt": "x", "temperature": NaN, "id": "a"}',
        '{"prompt": "x", "temperature": 1e999, "id": "a"}',
        '{"prompt": "x", "prompt": "y", "id": "a"}',
        '{"id": "a", "prompt": "\\ud800"}',
        '{"id": "a", "prompt": "cut off',
        '{"id": "a", "prompt": ' + "[" * 5000,
        '{ "custom_id" : "a" , "seed": ' + "9" * 5000 + "}",
    ],
)
def test_an_id_that_can_be_read_is_kept_whatever_else_is_wrong(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "x"}}\n{line}\n')
    found = read_prompts(path, GenerationConfig())[1]
    assert found.prompt_id == "a"
    assert found.error is not None


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "a", "id": "b", "prompt": "x"}',  # which of them?
        '{"prompt": {"id": "a"}, "x": ',  # of another object
        '{"id": "\\ud800", "prompt": "x"}',  # no text
        '{"id": 12',  # may go on
        '{"id": "a',
        '{"id": [1], "prompt": ',
        '{"id": "\\x", "prompt": ',
        '"id": "a", "prompt": "x"}',
        "",
    ],
)
def test_an_id_in_doubt_is_none(line: str) -> None:
    assert _id_of_broken_line(line.encode()) is None
    assert _id_of_broken_line(b'{"id": "caf\xe9", "prompt": ') is None


def test_equal_id_and_custom_id_are_one() -> None:
    assert _read_id({"id": 7, "custom_id": "7"}) == ("7", None)
    prompt_id, problem = _read_id({"id": "a", "custom_id": "b"})
    assert prompt_id == "a"
    assert problem is not None


def test_ids_are_those_of_the_whole_file_also_with_a_limit(tmp_path: Path) -> None:
    lines = ['{"prompt": "x"}', '{"prompt": "y"', '{"id": "1", "prompt": "z"}']
    lines += ['{"id": 2, "prompt": "z"}', '{"id": "2#line2", "prompt": "z"}']
    whole = ids(tmp_path, *lines)
    assert whole == ["1#line1", "2#line2#line2", "1", "2", "2#line2"]
    for limit in range(1, 6):
        assert ids(tmp_path, *lines, limit=limit) == whole[:limit]


claims = st.lists(
    st.tuples(
        st.none() | st.sampled_from(["1", "2", "3", "1#line1", "2#line3", "a"]), st.booleans()
    )
)


@given(claims)
def test_ids_are_unique_and_the_first_whole_line_has_its_own(
    said: list[tuple[str | None, bool]],
) -> None:
    lines = [
        _FoundPrompt(number, prompt_id, {} if is_whole else None)
        for number, (prompt_id, is_whole) in enumerate(said, start=1)
    ]
    own, _ = _own_ids(lines)
    assert len(set(own)) == len(own) == len(lines)
    for prompt_id in {line.prompt_id for line in lines} - {None}:
        first = [line for line in lines if line.prompt_id == prompt_id and line.fields == {}]
        first += [line for line in lines if line.prompt_id == prompt_id]
        assert own[first[0].number - 1] == prompt_id


def test_many_equal_ids_take_linear_time(tmp_path: Path) -> None:
    lines = [json.dumps({"id": "a", "prompt": "x"})] * 20_000
    assert len(set(ids(tmp_path, *lines))) == 20_000
