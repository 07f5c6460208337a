from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpipipe.config.prompt_fields import prompt_seed
from mpipipe.config.prompts import PromptLine, read_prompts
from mpipipe.config.schema import GenerationConfig
from mpipipe.errors import ConfigError

GENERATION = GenerationConfig(max_new_tokens=20, temperature=0.5, top_k=7, seed=11)
CHAT = [{"role": "user", "content": "Hi"}]


def read(
    folder: Path, *lines: object, limit: int = 0, generation: GenerationConfig = GENERATION
) -> list[PromptLine]:
    """Lines that are no bytes are written as JSON."""
    path = folder / "p.jsonl"
    raw = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return read_prompts(path, generation, limit)


def test_prompt_with_id_takes_the_runs_settings(tmp_path: Path) -> None:
    (line,) = read(tmp_path, {"id": "a", "prompt": " Hello "})
    assert (line.index, line.line_number, line.prompt_id, line.text) == (0, 1, "a", " Hello ")
    assert line.messages is None
    assert line.sampling is not None
    assert line.sampling.max_new_tokens == 20
    assert line.sampling.temperature == 0.5
    assert line.sampling.top_k == 7


def test_id_defaults_to_the_line_number_and_blank_lines_count(tmp_path: Path) -> None:
    lines = read(tmp_path, {"prompt": "a"}, b"", b"  \t", {"prompt": "b"}, {"id": 7, "prompt": "c"})
    assert [(x.index, x.line_number, x.prompt_id) for x in lines] == [
        (0, 1, "1"),
        (1, 4, "4"),
        (2, 5, "7"),
    ]


def test_messages_are_kept_with_roles_and_joined_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (line,) = read(
        tmp_path,
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": parts, "name": "me"},
                {"role": "assistant", "content": ""},
            ]
        },
    )
    assert line.text is None
    assert line.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": ""},
    )


def test_openai_batch_line(tmp_path: Path) -> None:
    (line,) = read(
        tmp_path,
        {
            "custom_id": "r-1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "any", "messages": CHAT, "max_completion_tokens": 5, "temperature": 1,
                "top_p": 0.9, "stop": "END", "seed": 3, "logprobs": True, "top_logprobs": 2,
                "n": 1, "presence_penalty": 0.0, "stream": False, "frequency_penalty": None,
            },
        },
    )  # fmt: skip
    assert line.prompt_id == "r-1"
    assert line.messages == ({"role": "user", "content": "Hi"},)
    sampling = line.sampling
    assert sampling is not None
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (5, 1.0, 0.9)
    assert (sampling.stop, sampling.seed, sampling.num_logprobs) == (("END",), 3, 2)
    assert sampling.top_k == 7  # not given: the run's


def test_completion_batch_line_may_hold_the_prompt_in_a_list(tmp_path: Path) -> None:
    (line,) = read(tmp_path, {"custom_id": "r", "body": {"prompt": ["Hi"], "logprobs": 0}})
    assert line.text == "Hi"
    assert line.sampling is not None
    assert line.sampling.num_logprobs == 0


@pytest.mark.parametrize(
    ("field", "value", "name", "expected"),
    [
        ("max_new_tokens", 3, "max_new_tokens", 3),
        ("max_tokens", 3, "max_new_tokens", 3),
        ("max_output_tokens", 3, "max_new_tokens", 3),
        ("temperature", 0, "temperature", 0.0),
        ("top_k", 1, "top_k", 1),
        ("top_p", 0.25, "top_p", 0.25),
        ("min_p", 0.25, "min_p", 0.25),
        ("repetition_penalty", 1.25, "repetition_penalty", 1.25),
        ("frequency_penalty", -0.25, "frequency_penalty", -0.25),
        ("presence_penalty", 2, "presence_penalty", 2.0),
        ("seed", 9, "seed", 9),
        ("stop", ["a", "b"], "stop", ("a", "b")),
        ("stop", "a", "stop", ("a",)),
        ("stop_token_ids", [1, 2], "stop_token_ids", (1, 2)),
        ("ignore_eos", True, "ignore_eos", True),
        ("num_logprobs", 4, "num_logprobs", 4),
        ("logprobs", 4, "num_logprobs", 4),
        ("logprobs", True, "num_logprobs", 0),
        ("logprobs", False, "num_logprobs", -1),
        ("temperature", None, "temperature", 0.5),
    ],
)
def test_each_setting_may_be_overridden_by_a_line(
    tmp_path: Path, field: str, value: object, name: str, expected: object
) -> None:
    (line,) = read(tmp_path, {"prompt": "x", field: value})
    assert line.error is None
    assert line.sampling is not None
    assert getattr(line.sampling, name) == expected


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6]]])
def test_a_prompt_may_be_token_ids(tmp_path: Path, prompt: object) -> None:
    (line,) = read(tmp_path, {"prompt": prompt, "max_tokens": 3})
    assert (line.error, line.text, line.token_ids) == (None, None, (5, 6))
    assert line.sampling is not None
    assert line.sampling.max_new_tokens == 3


@pytest.mark.parametrize("prompt", [[7], [[7]]])
def test_a_prompt_may_be_one_token_id(tmp_path: Path, prompt: object) -> None:
    (line,) = read(tmp_path, {"prompt": prompt})
    assert (line.error, line.text, line.token_ids) == (None, None, (7,))


def test_overrides_do_not_leak_to_the_next_line(tmp_path: Path) -> None:
    lines = read(tmp_path, {"prompt": "x", "max_tokens": 1}, {"prompt": "y"})
    assert [x.sampling.max_new_tokens for x in lines if x.sampling] == [1, 20]


def test_lines_that_ask_for_the_same_are_judged_alike_each_with_its_seed(tmp_path: Path) -> None:
    """What was judged once is remembered: 1, true and 1.0 are three different things."""
    asked: list[dict[str, Any]] = [
        {"max_tokens": 1, "stop": ["x"]}, {"max_tokens": True, "stop": ["x"]},
        {"max_tokens": 1.0, "stop": ["x"]}, {"max_tokens": 1, "stop": ["x"], "seed": 5},
        {"max_tokens": 1, "stop": ["y"]}, {"max_tokens": 1, "stop": ["x"], "n": 1},
        {"max_tokens": 1, "stop": ["x"], "n": 2}, {},
    ]  # fmt: skip
    alone = [
        read(tmp_path, {"id": str(i), "prompt": "a", **more})[0] for i, more in enumerate(asked)
    ]
    twice = [{"id": str(i), "prompt": "a", **more} for i, more in enumerate(asked + asked)]
    together = read(tmp_path, *twice)
    for line in together:
        one = alone[line.index % len(asked)]
        assert (line.error is None) is (one.error is None)
        if line.sampling is None or one.sampling is None:
            assert line.sampling is one.sampling
            continue
        seed = line.sampling.seed
        assert seed == (5 if line.index % len(asked) == 3 else prompt_seed(11, line.prompt_id))
        assert line.sampling == one.sampling.replace(seed=seed)
    assert [line.index for line in together if line.error] == [1, 2, 6, 9, 10, 14]


def test_a_bad_line_keeps_its_id_for_the_record(tmp_path: Path) -> None:
    lines = read(tmp_path, {"id": "a", "prompt": ""}, b"{", {"id": "b", "prompt": "x", "zz": 1})
    assert [x.prompt_id for x in lines] == ["a", "2", "b"]
    assert all(x.error for x in lines)


def test_the_first_of_equal_ids_keeps_it_and_later_ones_are_errors(tmp_path: Path) -> None:
    lines = read(
        tmp_path,
        {"id": "a", "prompt": "1"},
        {"id": "b", "prompt": "2"},
        {"id": "a", "prompt": "3"},
        {"id": "a", "prompt": "4"},
    )
    assert [x.prompt_id for x in lines] == ["a", "b", "a#line3", "a#line4"]
    assert [x.error.kind if x.error else None for x in lines] == [
        None,
        None,
        "duplicate_id",
        "duplicate_id",
    ]
    message = str(lines[2].error)
    assert "line 3" in message
    assert "line 1" in message


def test_a_number_and_the_same_text_are_the_same_id(tmp_path: Path) -> None:
    lines = read(tmp_path, {"id": 5, "prompt": "1"}, {"id": "5", "prompt": "2"})
    assert lines[1].prompt_id == "5#line2"


def test_a_line_without_an_id_leaves_the_ids_of_others_alone(tmp_path: Path) -> None:
    lines = read(tmp_path, {"prompt": "1"}, {"prompt": "2"}, {"id": 1, "prompt": "3"})
    assert [x.prompt_id for x in lines] == ["1#line1", "2", "1"]
    assert [x.error for x in lines] == [None, None, None]


def test_ids_stay_unique_even_when_a_line_has_the_made_up_id(tmp_path: Path) -> None:
    lines = read(
        tmp_path,
        {"id": "a#line3", "prompt": "1"},
        {"id": "a", "prompt": "2"},
        {"id": "a", "prompt": "3"},
        {"id": "a#line3", "prompt": "4"},
        {"id": "a", "prompt": "5"},
        {"id": "a#line5", "prompt": "6"},
    )
    ids = [x.prompt_id for x in lines]
    assert len(set(ids)) == len(ids)
    assert ids[0] == "a#line3"


def test_byte_order_mark_crlf_and_unicode_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    second = '{"id": "b", "prompt": "x\u2028y\u0085z"}'
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "prompt": "x"}\r\n' + second.encode() + b"\r\n")
    lines = read_prompts(path, GENERATION)
    assert [x.prompt_id for x in lines] == ["a", "b"]
    assert [x.error for x in lines] == [None, None]
    assert lines[1].text == "x\u2028y\u0085z"


def test_files_that_were_joined_keep_their_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "joined.jsonl"
    path.write_bytes(2 * b'\xef\xbb\xbf{"prompt": "x"}\r\n' + b"\xef\xbb\xbf\r\n")
    lines = read_prompts(path, GenerationConfig())
    assert [(line.text, line.error) for line in lines] == [("x", None)] * 2


def test_escaped_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    (line,) = read(tmp_path, b'{"prompt": "\\ud83d\\ude00"}')
    assert line.text == "\U0001f600"


def test_limit_takes_the_first_prompts_only(tmp_path: Path) -> None:
    lines = read(tmp_path, {"prompt": "a"}, b"", b"{", {"prompt": "c"}, limit=2)
    assert [x.line_number for x in lines] == [1, 3]


def test_seed_depends_on_run_seed_and_id_only(tmp_path: Path) -> None:
    def seeds(lines: list[PromptLine]) -> dict[str, int]:
        return {x.prompt_id: x.sampling.seed for x in lines if x.sampling}

    a, b = {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x", "temperature": 1}
    first = seeds(read(tmp_path, a, b))
    assert first == seeds(read(tmp_path, b, a))
    assert first["a"] != first["b"]
    other = seeds(read(tmp_path, a, b, generation=GenerationConfig(seed=12)))
    assert other["a"] != first["a"]
    assert first["a"] == prompt_seed(11, "a")


def test_greedy_prompts_that_ask_for_the_same_share_their_settings(tmp_path: Path) -> None:
    """A seed would change nothing: a long file has one object, not one for each prompt."""
    greedy = {"prompt": "x", "temperature": 0}
    lines = read(tmp_path, greedy, greedy, greedy | {"max_tokens": 3}, greedy | {"seed": 5})
    first, second, other, seeded = [line.sampling for line in lines]
    assert first is second
    assert first is not None
    assert first.seed == 11
    assert other == first.replace(max_new_tokens=3)
    assert seeded == first.replace(seed=5)


def test_seed_is_the_same_on_every_machine_and_version() -> None:
    assert prompt_seed(0, "a") == SEED_0_A
    assert 0 <= prompt_seed(2**63 - 1, "é") < 2**63


SEED_0_A = 6841154156042874738


def test_inline_prompts_are_texts_or_objects(tmp_path: Path) -> None:
    objects: list[str | dict[str, Any]] = ["Hello", {"id": "x", "messages": CHAT}, ""]
    lines = read_prompts(None, GENERATION, inline=objects)
    assert [x.prompt_id for x in lines] == ["1", "x", "3"]
    assert lines[0].text == "Hello"
    assert lines[1].messages == ({"role": "user", "content": "Hi"},)
    assert lines[2].error is not None
    assert lines[2].error.kind == "empty_prompt"


def test_missing_empty_and_foreign_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_prompts(tmp_path / "nope.jsonl", GENERATION)
    with pytest.raises(ConfigError, match="is a folder"):
        read_prompts(tmp_path, GENERATION)
    with pytest.raises(ConfigError, match="holds no prompts"):
        read(tmp_path, b"", b"  ")
    with pytest.raises(ConfigError, match=r"set prompts\.path"):
        read_prompts(None, GENERATION)
    utf16 = tmp_path / "u.jsonl"
    utf16.write_bytes('{"prompt": "x"}'.encode("utf-16"))
    with pytest.raises(ConfigError, match="UTF-16"):
        read_prompts(utf16, GENERATION)
