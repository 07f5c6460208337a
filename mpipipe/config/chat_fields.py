"""Chat messages, tools and options of a prompt object, in the form that chat templates take.

As transformers and vLLM have it: the arguments of a function call, JSON text in OpenAI's form,
become an object; an assistant's turn without content has an empty text. `models/chat.py` renders
them. Invariant: what cannot reach the template is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpipipe.config.binding import short
from mpipipe.config.files import parse_json
from mpipipe.errors import PromptError

__all__ = [
    "CHAT_KEYS",
    "PLAIN_CHAT",
    "ChatMessage",
    "ChatOptions",
    "chat_messages",
    "chat_options",
    "without_chat",
]

ChatMessage = dict[str, Any]  # {"role": …, "content": …, …}, what chat templates take

CHAT_KEYS = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields that are texts, by role. Templates differ in what they call the reasoning of an assistant.
_TEXT_FIELDS = {
    "assistant": ("reasoning_content", "reasoning", "thinking"),
    "tool": ("name", "tool_call_id"),
}
# Arguments of `apply_chat_template` itself, which are said in another place or decided here.
_NO_TEMPLATE_KWARGS = """
    conversation conversations messages tools chat_template add_generation_prompt
    continue_final_message tokenize padding truncation max_length return_tensors return_dict
    return_assistant_tokens_mask tokenizer_kwargs
    """.split()  # noqa: SIM905 - a list of them would take a screen


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a chat template gets beside the messages."""

    tools: tuple[dict[str, Any], ...] = ()  # function schemas, as OpenAI writes them
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # `chat_template_kwargs`
    add_generation_prompt: bool = True  # end with the cue for the model's answer
    continue_final_message: bool = False  # no cue, no end of turn: the last message goes on


PLAIN_CHAT = ChatOptions()


def chat_messages(value: Any) -> tuple[ChatMessage, ...]:
    """The messages of a chat.

    Raises:
        PromptError: kinds invalid_messages, empty_prompt.
    """
    if not isinstance(value, list) or not value:
        raise _invalid(f"messages = {short(value)} must be a list with role and content")
    messages = tuple(_message(entry, number) for number, entry in enumerate(value, start=1))
    if not any(message["content"].strip() or "tool_calls" in message for message in messages):
        raise PromptError("empty_prompt", "all messages are empty: write some text")
    return messages


def chat_options(asked: Mapping[str, Any], messages: tuple[ChatMessage, ...]) -> ChatOptions:
    """What `asked`, without nulls, says to the template of `messages`.

    Raises:
        PromptError: kind invalid_messages.
    """
    tools = _tools(asked.get("tools", []))
    _check_tool_choice(asked, has_tools=bool(tools))
    goes_on = _flag(asked, "continue_final_message", False)
    cue = _flag(asked, "add_generation_prompt", not goes_on)
    if goes_on and cue:
        raise _invalid(
            "continue_final_message and add_generation_prompt contradict each other: the last "
            "message either goes on or is answered; set one of them"
        )
    if goes_on and not messages[-1]["content"].strip():
        raise _invalid("continue_final_message = true needs some text in the last message")
    return ChatOptions(tools, _template_kwargs(asked), cue, goes_on)


def without_chat(asked: Mapping[str, Any]) -> None:
    """Check that a plain prompt asks for nothing that only a chat can have.

    Raises:
        PromptError: kind invalid_prompt.
    """
    for key in CHAT_KEYS:
        neutral = key in asked and (
            not asked[key]  # [], {} and false
            or (key == "tool_choice" and asked[key] in ("none", "auto"))
            or (key in ("parallel_tool_calls", "add_generation_prompt") and asked[key] is True)
        )
        if key in asked and not neutral:
            raise PromptError(
                "invalid_prompt",
                f"{key} = {short(asked[key])} is for chats: give messages instead of prompt",
            )


def _invalid(message: str) -> PromptError:
    return PromptError("invalid_messages", message)


def _message(entry: Any, number: int) -> ChatMessage:
    where = f"message {number}"
    if not isinstance(entry, Mapping) or "role" not in entry:
        raise _invalid(f"{where} must be an object with role and content")
    role = entry["role"]
    if not isinstance(role, str) or role not in _ROLES:
        raise _invalid(
            f"{where}: role = {short(role)} must be system, developer, user, assistant or tool"
        )
    said = {key: value for key, value in entry.items() if value is not None}
    if role == "assistant":  # what an API has answered may be asked again, its empty lists too
        said = {key: value for key, value in said.items() if value != [] or key == "content"}
    texts = _TEXT_FIELDS.get(role, ())
    extra = set(said) - {"role", "content", "name", *texts}
    if role == "assistant":
        extra.discard("tool_calls")
    if extra:
        raise _invalid(f"{where}: unknown field {min(extra)!r}: remove it")
    calls = _tool_calls(said.get("tool_calls", []), where)
    if entry.get("content") is None and not calls:
        raise _invalid(f"{where} must be an object with role and content")
    role = "system" if role == "developer" else role
    message: ChatMessage = {"role": role, "content": _text(entry.get("content"), where)}
    if calls:
        message["tool_calls"] = calls
    for key in texts:
        if not isinstance(said.get(key, ""), str):
            raise _invalid(f"{where}: {key} = {short(said[key])} must be a text")
    message |= {key: said[key] for key in texts if key in said}
    return message


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    ]
    if len(texts) < len(parts):
        raise _invalid(f"{where}: content must be a text or a list of text parts")
    return "".join(texts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _invalid(f"{where}: tool_calls = {short(value)} must be a list")
    return [_tool_call(call, f"{where}, tool call {n}") for n, call in enumerate(value, start=1)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = _function(call)
    if function is None:
        raise _invalid(f"{where} must be an object with a function that has a name")
    if call.get("type", "function") != "function":
        raise _invalid(f"{where}: type = {short(call['type'])} must be function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise _invalid(f"{where}: the arguments are not valid JSON: {error}") from None
    if not isinstance(arguments, dict | None):
        raise _invalid(f"{where}: arguments = {short(arguments)} must be an object, as JSON text")
    return {**call, "type": "function", "function": {**function, "arguments": arguments or {}}}


def _function(value: Any) -> Mapping[str, Any] | None:
    """The function of a call or a tool; None: there is none with a name."""
    found = value.get("function") if isinstance(value, Mapping) else None
    return found if isinstance(found, Mapping) and isinstance(found.get("name"), str) else None


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list):
        raise _invalid(f"tools = {short(value)} must be a list of functions")
    for number, tool in enumerate(value, start=1):
        if _function(tool) is None or tool.get("type") != "function":
            raise _invalid(
                f'tool {number} must be {{"type": "function", "function": {{"name": …}}}}, '
                f"not {short(tool)}"
            )
    return tuple(value)


def _check_tool_choice(asked: Mapping[str, Any], *, has_tools: bool) -> None:
    """What is not said to a template, but to an engine that forces or forbids a call."""
    choice = asked.get("tool_choice", "auto")
    if choice != "auto" and (has_tools or choice != "none"):
        raise _invalid(
            f"tool_choice = {short(choice)} is not supported: the model is free to call a tool or "
            "not; remove it (and the tools, if none shall be called)"
        )
    if not _flag(asked, "parallel_tool_calls", True) and has_tools:
        raise _invalid(
            "parallel_tool_calls = false is not supported: the model is free to call several; "
            "remove it"
        )


def _template_kwargs(asked: Mapping[str, Any]) -> Mapping[str, Any]:
    found = asked.get("chat_template_kwargs", {})
    if not isinstance(found, dict):
        raise _invalid(f"chat_template_kwargs = {short(found)} must be an object")
    for key in found:
        if key in _NO_TEMPLATE_KWARGS:
            raise _invalid(
                f"chat_template_kwargs has {key!r}, which is no variable of a template: write it "
                "beside chat_template_kwargs if it may be set at all"
            )
    return found


def _flag(asked: Mapping[str, Any], key: str, default: bool) -> bool:
    value = asked.get(key, default)
    if not isinstance(value, bool):
        raise _invalid(f"{key} = {short(value)} must be true or false")
    return value
