"""Each way in which a prompt line can be wrong, and the kind of its error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpipipe.config.prompts import read_prompts
from mpipipe.config.schema import GenerationConfig

CHAT = [{"role": "user", "content": "Hi"}]


def error_of(folder: Path, line: object) -> tuple[str, str]:
    path = folder / "p.jsonl"
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    path.write_bytes(raw + b'\n{"id": "good", "prompt": "x"}\n')
    found = read_prompts(path, GenerationConfig())
    assert found[1].error is None  # a bad line never stops the next
    assert found[0].error is not None
    assert found[0].text is None
    assert found[0].messages is None
    assert found[0].sampling is None
    return found[0].error.kind, str(found[0].error)


@pytest.mark.parametrize(
    ("line", "kind", "part"),
    [
        (b'{"prompt": "x"', "invalid_json", "line 1 is not valid JSON"),
        (b'{"prompt": "x", "prompt": "y"}', "invalid_json", "'prompt' is there twice"),
        (b'{"prompt": "x", "temperature": NaN}', "invalid_json", "NaN"),
        (b'{"prompt": "\\ud800"}', "invalid_json", "surrogate"),
        (b"[" * 100_000, "invalid_json", "nested"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "invalid_json", "line 1"),
        (b"just text", "invalid_json", "line 1"),
        ([1], "invalid_json", "list"),
        (3, "invalid_json", "is a number, not"),
        (None, "invalid_json", "is null, not"),
        (b'{"prompt": "caf\xe9"}', "invalid_utf8", "UTF-8"),
        ({"id": "a"}, "missing_prompt", '"prompt"'),
        ({"prompt": None}, "missing_prompt", '"prompt"'),
        ({"custom_id": "a", "body": {"model": "m"}}, "missing_prompt", '"prompt"'),
        ({"prompt": ""}, "empty_prompt", "empty"),
        ({"prompt": " \n"}, "empty_prompt", "empty"),
        (b'""', "empty_prompt", "empty"),
        ({"messages": [{"role": "user", "content": ""}]}, "empty_prompt", "empty"),
        ({"prompt": 3}, "invalid_prompt", "3"),
        ({"prompt": ["a", "b"]}, "invalid_prompt", "one text"),
        ({"prompt": [1, "b"]}, "invalid_prompt", "token ids"),
        ({"prompt": [1, True]}, "invalid_prompt", "token ids"),
        ({"prompt": [1, 2.0]}, "invalid_prompt", "token ids"),
        ({"prompt": []}, "invalid_prompt", "token ids"),
        ({"prompt": "x", "messages": CHAT}, "invalid_prompt", "both"),
        ({"prompt": "x", "logprobs": 10**20}, "invalid_sampling", "num_logprobs"),
        ({"prompt": "x", "logprobs": True, "top_logprobs": 2**31}, "invalid_sampling", "logprobs"),
        ({"prompt": "x", "top_k": 2**31}, "invalid_sampling", "top_k"),
        ({"prompt": "x", "max_tokens": 2**62}, "invalid_sampling", "max_new_tokens"),
        ({"custom_id": "a", "body": "x"}, "invalid_prompt", "body"),
        ({"messages": []}, "invalid_messages", "role and content"),
        ({"messages": "hi"}, "invalid_messages", "role and content"),
        ({"messages": ["hi"]}, "invalid_messages", "message 1"),
        ({"messages": [*CHAT, {"role": "user"}]}, "invalid_messages", "message 2"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_messages", "'robot'"),
        ({"messages": [{"role": [], "content": "x"}]}, "invalid_messages", "role"),
        ({"messages": [{"role": "user", "content": None}]}, "invalid_messages", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_messages",
         "text parts"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "invalid_messages",
         "tool_calls"),
        ({"prompt": "x", "temprature": 1}, "unknown_field", '"temperature"'),
        ({"prompt": "x", "Temperature": 1}, "unknown_field", 'mean "temperature"'),
        ({"input": "x"}, "unknown_field", 'text of a prompt goes under "prompt"'),
        ({"prompt": None, "text": "x"}, "unknown_field", 'text of a prompt goes under "prompt"'),
        ({"role": "user", "content": "x"}, "unknown_field", 'a list under "messages"'),
        ({"custom_id": "a", "body": {"prompt": "x"}, "seed": 1}, "unknown_field", '"seed"'),
        ({"custom_id": "a", "body": {"prompt": "x", "max_token": 1}}, "unknown_field",
         '"max_tokens"'),
        ({"prompt": "x", "temperature": "hot"}, "invalid_sampling", "'hot'"),
        ({"prompt": "x", "temperature": -1}, "invalid_sampling", "temperature"),
        ({"prompt": "x", "temperature": True}, "invalid_sampling", "temperature"),
        ({"prompt": "x", "max_tokens": 0}, "invalid_sampling", "max_new_tokens"),
        ({"prompt": "x", "max_tokens": 10**30}, "invalid_sampling", "max_tokens"),
        ({"prompt": "x", "seed": 2**64 - 1}, "invalid_sampling", "go to 9223372036854775807"),
        ({"prompt": "x", "stop_token_ids": [2**64]}, "invalid_sampling", "whole numbers go to"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "unknown_field", '"messages"'),
        ({"custom_id": "a", "params": {"messages": CHAT}}, "unknown_field", 'under "body"'),
        ({"prompt": "x", "max_tokens": 1, "max_new_tokens": 2}, "invalid_sampling", "contradicts"),
        ({"prompt": "x", "top_p": 0}, "invalid_sampling", "top_p"),
        ({"prompt": "x", "seed": -1}, "invalid_sampling", "seed"),
        ({"prompt": "x", "stop": [""]}, "invalid_sampling", "stop"),
        ({"prompt": "x", "stop": [1]}, "invalid_sampling", "a list of texts"),
        ({"prompt": "x", "logprobs": -2}, "invalid_sampling", "logprobs"),
        ({"prompt": "x", "logprobs": False, "top_logprobs": 2}, "invalid_sampling", "logprobs"),
        ({"prompt": "x", "n": 2}, "invalid_sampling", "n = 2"),
        ({"prompt": "x", "presence_penalty": 2.5}, "invalid_sampling", "presence_penalty"),
        ({"id": 1.5, "prompt": "x"}, "invalid_id", "1.5"),
        ({"id": True, "prompt": "x"}, "invalid_id", "True"),
        ({"id": "", "prompt": "x"}, "invalid_id", "id"),
        ({"id": "a", "custom_id": "b", "prompt": "x"}, "invalid_id", "both"),
    ],
)  # fmt: skip
def test_a_bad_line_is_its_own_error_with_its_line_number(
    tmp_path: Path, line: object, kind: str, part: str
) -> None:
    found_kind, message = error_of(tmp_path, line)
    assert found_kind == kind
    assert part in message
    assert message.startswith("line 1")
