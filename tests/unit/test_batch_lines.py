"""OpenAI batch lines: what changes nothing is accepted, what a template needs reaches it."""

from __future__ import annotations

from typing import Any

import pytest

from mpipipe.config.chat_fields import PLAIN_CHAT, ChatOptions
from mpipipe.config.prompts import PromptLine, library_prompts
from mpipipe.types import SamplingParams

CHAT = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}


def line_of(**body: Any) -> PromptLine:
    """The prompt of a batch line with a chat and `body`."""
    (line,) = library_prompts(
        [{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
          "body": {"messages": CHAT, **body}}],
        SamplingParams(top_k=7),
    )  # fmt: skip
    return line


def kind_of(line: PromptLine) -> tuple[str, str]:
    assert line.error is not None
    return line.error.kind, str(line.error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("response_format", {"type": "text"}), ("logit_bias", {}), ("tools", []), ("n", 1),
        ("tool_choice", "none"), ("tool_choice", "auto"), ("parallel_tool_calls", True),
        ("parallel_tool_calls", False), ("logprobs", False), ("logprobs", None), ("seed", None),
        ("top_logprobs", 0), ("modalities", ["text"]), ("stop", None), ("stop", []),
        ("frequency_penalty", 0.0), ("presence_penalty", 0), ("best_of", 1), ("functions", []),
        ("function_call", "none"), ("verbosity", "medium"), ("min_tokens", 0), ("suffix", None),
        ("skip_special_tokens", True), ("spaces_between_special_tokens", True), ("echo", False),
        ("length_penalty", 1.0), ("use_beam_search", False), ("add_generation_prompt", True),
        ("continue_final_message", False), ("chat_template_kwargs", {}), ("bad_words", []),
        ("include_stop_str_in_output", False), ("guided_json", None), ("reasoning_effort", None),
        ("prediction", {"type": "content", "content": "x"}), ("stream", True), ("store", True),
        ("user", "me"), ("service_tier", "auto"), ("prompt_cache_key", "k"), ("priority", 3),
        ("add_special_tokens", False), ("audio", None), ("a_field_of_tomorrow", None),
        ("min_p", 0.0), ("repetition_penalty", 1.0), ("documents", []),
    ],
)  # fmt: skip
def test_a_value_that_changes_nothing_is_accepted(key: str, value: object) -> None:
    line = line_of(**{key: value})
    assert line.error is None
    assert line.sampling is not None
    assert line.sampling.replace(seed=0) == SamplingParams(top_k=7)
    assert line.chat_options == PLAIN_CHAT


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("response_format", {"type": "json_object"}), ("logit_bias", {"1": 5}), ("n", 2),
        ("n", True), ("modalities", ["text", "audio"]),
        ("functions", [{"name": "f"}]), ("function_call", {"name": "f"}), ("verbosity", "low"),
        ("min_tokens", 4), ("skip_special_tokens", False), ("echo", True), ("suffix", "x"),
        ("length_penalty", 1.5), ("use_beam_search", True), ("guided_json", {"type": "object"}),
        ("reasoning_effort", "high"), ("web_search_options", {}), ("bad_words", ["x"]),
        ("include_stop_str_in_output", True), ("documents", [{"text": "x"}]),
        ("chat_template", "{{ x }}"), ("add_special_tokens", True), ("prompt_logprobs", 1),
        ("audio", {"voice": "x"}), ("allowed_token_ids", [1]),
    ],
)  # fmt: skip
def test_a_value_that_would_change_something_is_an_error_that_names_it(
    key: str, value: object
) -> None:
    kind, message = kind_of(line_of(**{key: value}))
    assert kind == "invalid_sampling"
    assert f"{key} = " in message
    assert "not supported" in message


def test_penalties_are_those_of_the_openai_api() -> None:
    line = line_of(frequency_penalty=0.5, presence_penalty=-2)
    assert line.sampling is not None
    assert line.sampling.frequency_penalty == 0.5
    assert line.sampling.presence_penalty == -2.0
    for key, value in (("frequency_penalty", 2.5), ("presence_penalty", -2.01)):
        kind, message = kind_of(line_of(**{key: value}))
        assert kind == "invalid_sampling"
        assert message.endswith(f"{key} = {value} is out of range: it must be from -2 to 2")
    assert kind_of(line_of(presence_penalty=True))[0] == "invalid_sampling"


def test_minus_one_switches_top_k_off() -> None:
    line = line_of(top_k=-1)
    assert line.sampling is not None
    assert line.sampling.top_k == 0
    assert kind_of(line_of(top_k=-2))[0] == "invalid_sampling"


def test_tools_and_options_reach_the_template() -> None:
    line = line_of(
        tools=[TOOL], tool_choice="auto", chat_template_kwargs={"enable_thinking": False}
    )
    assert line.error is None
    assert line.chat_options == ChatOptions((TOOL,), {"enable_thinking": False})


def test_turns_of_tools_are_as_templates_expect_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"x": [1]}'}}
    bare = {"function": {"name": "v", "arguments": ""}}
    line = line_of(
        messages=[
            *CHAT,
            {"role": "assistant", "content": None, "tool_calls": [call, bare], "refusal": None,
             "annotations": [], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "c1", "name": "w", "content": "sunny"},
            {"role": "assistant", "content": "Fine.", "tool_calls": []},
        ]
    )  # fmt: skip
    assert line.error is None
    assert line.messages == (
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "w", "arguments": {"x": [1]}},
                },
                {"type": "function", "function": {"name": "v", "arguments": {}}},
            ],
            "reasoning_content": "hm",
        },
        {"role": "tool", "content": "sunny", "name": "w", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Fine."},
    )


def test_a_final_message_that_goes_on_has_no_cue() -> None:
    messages = [*CHAT, {"role": "assistant", "content": "It is"}]
    line = line_of(messages=messages, continue_final_message=True)
    assert line.chat_options == ChatOptions((), {}, False, True)
    both = line_of(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert both.chat_options == line.chat_options


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "contradict"),
        ({"continue_final_message": "yes"}, "true or false"),
        ({"add_generation_prompt": 1}, "true or false"),
        (
            {"continue_final_message": True, "messages": [*CHAT, {"role": "user", "content": " "}]},
            "needs some text",
        ),
        ({"tools": {}}, "tools = {}"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tool 1"),
        ({"tools": [TOOL, {"type": "function", "function": {}}]}, "tool 2"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "none"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "w"}}}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'tokenize'"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "'add_generation_prompt'"),
        ({"chat_template_kwargs": {"messages": "x"}}, "'messages'"),
        ({"chat_template_kwargs": {"conversations": "x"}}, "'conversations'"),
        ({"chat_template_kwargs": {"tools": "x"}}, "'tools'"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "'chat_template'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "role and content"),
        ({"messages": [{"role": "user", "content": None, "tool_calls": [{}]}]}, "'tool_calls'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "tool call 1"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "tool_calls = 'x'"),
        (
            {"messages": [{"role": "assistant",
                           "tool_calls": [{"function": {"name": "w", "arguments": "{"}}]}]},
            "not valid JSON",
        ),
        (
            {"messages": [{"role": "assistant",
                           "tool_calls": [{"function": {"name": "w", "arguments": "[1]"}}]}]},
            "must be an object",
        ),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 3}]}, "tool_call_id = 3"),
    ],
)  # fmt: skip
def test_what_no_template_can_be_told_is_an_error(body: dict[str, Any], part: str) -> None:
    kind, message = kind_of(line_of(**body))
    assert kind == "invalid_messages"
    assert part in message


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({"url": "/v1/embeddings"}, "invalid_prompt"),
        ({"url": "/v1/responses"}, "invalid_prompt"),
        ({"url": 3}, "invalid_prompt"),
        ({"method": "GET"}, "invalid_prompt"),
        ({"url": "https://host/v1/completions", "method": "post"}, None),
        ({"url": None, "method": None}, None),
    ],
)
def test_only_the_endpoints_of_completions_are_served(
    extra: dict[str, Any], kind: str | None
) -> None:
    (line,) = library_prompts(
        [{"custom_id": "a", "body": {"prompt": "x"}, **extra}], SamplingParams()
    )
    assert (line.error.kind if line.error else None) == kind


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"tools": [], "tool_choice": "auto", "add_generation_prompt": True}, None),
        ({"tools": [TOOL]}, "invalid_prompt"),
        ({"chat_template_kwargs": {"a": 1}}, "invalid_prompt"),
        ({"continue_final_message": True}, "invalid_prompt"),
        ({"add_special_tokens": False}, "invalid_sampling"),
    ],
)
def test_a_plain_prompt_has_no_options_of_a_chat(body: dict[str, Any], kind: str | None) -> None:
    (line,) = library_prompts([{"prompt": "x", **body}], SamplingParams())
    assert (line.error.kind if line.error else None) == kind
