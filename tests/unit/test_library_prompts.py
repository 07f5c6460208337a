"""The library's prompts and keyword settings are judged as the lines of a file are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpipipe.config.load import load_config
from mpipipe.config.prompt_fields import keyword_sampling, prompt_seed
from mpipipe.config.prompts import library_prompts, read_prompts
from mpipipe.config.schema import GenerationConfig
from mpipipe.errors import ConfigError, SettingError
from mpipipe.types import SamplingParams

CHAT = [{"role": "user", "content": "Hi"}]


def test_texts_chats_and_objects_are_prompts_called_by_their_position() -> None:
    lines = library_prompts(
        ["a", CHAT, tuple(CHAT), {"id": "own", "prompt": "b", "max_tokens": 2}, {"prompt": "c"}],
        SamplingParams(seed=5, max_new_tokens=9, temperature=0.5),
    )
    assert [line.error for line in lines] == [None] * 5
    assert [line.prompt_id for line in lines] == ["0", "1", "2", "own", "4"]
    assert [line.index for line in lines] == [0, 1, 2, 3, 4]
    assert lines[1].messages == lines[2].messages == tuple(CHAT)
    sampling = [line.sampling for line in lines if line.sampling is not None]
    assert [one.max_new_tokens for one in sampling] == [9, 9, 9, 2, 9]
    assert sampling[0].seed == prompt_seed(5, "0")
    assert sampling[3].seed == prompt_seed(5, "own")


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("\ud800", "invalid_json"),
        ([{"role": "user", "content": "\udfff"}], "invalid_json"),
        ({"prompt": "x", "temperature": float("nan")}, "invalid_json"),
        ({"prompt": "x", "seed": 10**5000}, "invalid_json"),
        ("", "empty_prompt"),
        (" ", "empty_prompt"),
        (7, "invalid_json"),
        (None, "invalid_json"),
        (b"x", "invalid_prompt"),
        (object(), "invalid_prompt"),
        ({"prompt": {1, 2}}, "invalid_prompt"),
        ([1, 2, 3], "invalid_messages"),
        ({"prompt": "x", "stop": [""]}, "invalid_sampling"),
        ({"prompt": "x", "sed": 1}, "unknown_field"),
        ({"id": "good", "prompt": "x"}, "duplicate_id"),
    ],
)
def test_one_bad_prompt_is_its_own_error(prompt: object, kind: str) -> None:
    lines = library_prompts([{"id": "good", "prompt": "x"}, prompt, "y"], SamplingParams())
    assert [line.error is None for line in lines] == [True, False, True]
    assert lines[1].error is not None
    assert lines[1].error.kind == kind
    assert str(lines[1].error).startswith("prompt 1")
    assert len({line.prompt_id for line in lines}) == 3


@pytest.mark.parametrize(
    ("prompt", "prompt_id"),
    [
        ({"id": "x", "prompt": "a", "temperature": float("nan")}, "x"),
        ({"custom_id": 7, "prompt": object()}, "7"),
        ({"id": 10**5000, "prompt": "a"}, "0"),
        ({"id": "\ud800", "prompt": "a"}, "0"),
        ({"id": object(), "prompt": "a"}, "0"),
    ],
)
def test_an_id_stays_whatever_else_no_line_can_say(prompt: dict[str, Any], prompt_id: str) -> None:
    (line,) = library_prompts([prompt], SamplingParams())
    assert line.error is not None
    assert line.prompt_id == prompt_id


class Ambiguous:
    """As an array of numpy: compared, it is neither true nor false."""

    def __eq__(self, other: object) -> Any:
        return self

    def __hash__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")


def test_an_argument_of_a_foreign_kind_is_named() -> None:
    with pytest.raises(SettingError, match="is not supported"):
        keyword_sampling({"n": Ambiguous()}, SamplingParams())
    with pytest.raises(SettingError, match="is out of range"):
        keyword_sampling({"temperature": float("nan")}, SamplingParams())


def test_a_circle_is_no_prompt() -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    found = library_prompts([circle, deep], SamplingParams())
    assert all(line.error is not None for line in found)


WRONG: list[dict[str, Any]] = [
    {"seed": -1}, {"seed": 2**63}, {"seed": 10**5000}, {"seed": True}, {"seed": 1.0},
    {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": -1},
    {"temperature": "hot"}, {"temperature": True}, {"top_p": float("nan")}, {"top_p": 0},
    {"top_k": -2}, {"top_k": 1.5}, {"min_p": 1}, {"repetition_penalty": float("inf")},
    {"frequency_penalty": 2.5}, {"presence_penalty": float("nan")}, {"presence_penalty": "1"},
    {"repetition_penalty": 0}, {"max_new_tokens": 0}, {"max_new_tokens": None, "max_tokens": 0},
    {"max_new_tokens": 1, "max_tokens": 2}, {"stop": [""]}, {"stop": ""}, {"stop": "\ud800"},
    {"stop": [1]}, {"stop": 3}, {"stop_token_ids": [-1]}, {"stop_token_ids": [True]},
    {"stop_token_ids": 3}, {"stop_token_ids": [2**70]}, {"ignore_eos": 1}, {"num_logprobs": -2},
    {"num_logprobs": True}, {"n": 2}, {"nonsense": 1}, {"prompt": "x"}, {"tools": [1]},
]  # fmt: skip


@pytest.mark.parametrize("settings", WRONG, ids=range(len(WRONG)))
def test_a_wrong_setting_is_a_value_error_that_names_it(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError) as caught:
        keyword_sampling(settings, SamplingParams())
    assert isinstance(caught.value, ValueError)
    assert any(key in str(caught.value) for key in (*settings, "max_new_tokens"))


@pytest.mark.parametrize("settings", WRONG, ids=range(len(WRONG)))
def test_the_same_value_is_wrong_on_a_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    if "prompt" in settings:
        return
    try:
        text = json.dumps({"id": "a", "prompt": "x", **settings})
    except ValueError:  # more digits than JSON is written with
        return
    path = tmp_path / "p.jsonl"
    path.write_text(text + '\n{"prompt": "y"}\n')
    found = read_prompts(path, GenerationConfig())
    assert [line.error is None for line in found] == [False, True]


@pytest.mark.parametrize(
    "word",
    ["seed=-1", "seed=9223372036854775808", "temperature=nan", "temperature=inf", "top_p=nan",
     "temperature=true", "repetition_penalty=inf", "stop=['']", "stop_token_ids=[-1]",
     "stop_token_ids=[true]", "max_new_tokens=0", "top_k=true", "num_logprobs=-2",
     "stop=\udcff", "seed=0x" + "f" * 5000, "seed=" + "9" * 5000],
)  # fmt: skip
def test_the_same_value_is_wrong_in_a_configuration(word: str) -> None:
    with pytest.raises(ConfigError, match="generation"):
        load_config(None, [f"generation.{word}"])


def test_keyword_settings_are_read_as_those_of_a_line() -> None:
    defaults = SamplingParams(temperature=0.5, seed=3)
    found = keyword_sampling({"stop": "zs", "max_tokens": 4, "top_k": -1, "seed": None}, defaults)
    assert found == SamplingParams(temperature=0.5, seed=3, stop=("zs",), max_new_tokens=4)
    assert keyword_sampling({"stop": ("a", "b")}, defaults).stop == ("a", "b")
    assert keyword_sampling({"logprobs": True, "top_logprobs": 2}, defaults).num_logprobs == 2
    assert keyword_sampling({"frequency_penalty": 1, "presence_penalty": -0.5}, defaults) == (
        defaults.replace(frequency_penalty=1.0, presence_penalty=-0.5)
    )
    assert keyword_sampling({}, defaults) == defaults


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = [
    "id", "custom_id", "prompt", "messages", "body", "role", "content", "tools", "tool_calls",
    "function", "name", "arguments", "stop", "seed", "n", "url", "chat_template_kwargs", "logprobs",
]  # fmt: skip
anything = st.recursive(
    plain | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.lists(anything, max_size=4))
def test_whatever_is_given_each_prompt_is_good_or_has_an_error(prompts: list[Any]) -> None:
    lines = library_prompts(prompts, SamplingParams())
    assert [line.index for line in lines] == list(range(len(prompts)))
    assert len({line.prompt_id for line in lines}) == len(lines)
    for line in lines:
        assert (line.error is None) == (line.sampling is not None)
        line.prompt_id.encode()
        json.dumps(line.messages, ensure_ascii=False).encode()
