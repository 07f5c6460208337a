"""One prompt object → text or messages, and its sampling settings.

Three forms: `{"prompt"}`, `{"messages"}`, and an OpenAI batch line `{"custom_id", "body"}`. Not
here: files, line numbers, duplicate ids (`prompts.py`). Invariant: every key is understood, ignored
on purpose (`_IGNORED`), or an error: a misspelt setting is never silently the default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpipipe.config.binding import fit, nearest
from mpipipe.config.checks import sampling_problem
from mpipipe.errors import PromptError
from mpipipe.types import SamplingParams

__all__ = ["PLAIN_CHAT", "ChatMessage", "ChatOptions", "PromptFields", "find_id", "parse_fields"]

ChatMessage = dict[str, Any]  # {"role": …, "content": …, …}, what chat templates take

_ID_KEYS = ("id", "custom_id")
_TEXT_KEYS = ("prompt", "messages")
_SAMPLING_KEYS = tuple(field.name for field in dataclasses.fields(SamplingParams))
_ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
}
_LOGPROB_KEYS = ("logprobs", "top_logprobs")
_NEUTRAL = {"n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0}
_IGNORED = ("metadata", "model", "user", "store", "service_tier", "stream", "stream_options")
_BATCH_KEYS = (*_ID_KEYS, "method", "url", "body", "metadata")
_LINE_KEYS = (
    *_ID_KEYS,
    *_TEXT_KEYS,
    *_SAMPLING_KEYS,
    *_ALIASES,
    *_LOGPROB_KEYS,
    *_NEUTRAL,
    *_IGNORED,
)
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a chat template gets beside the messages."""

    tools: tuple[dict[str, Any], ...] = ()  # function schemas, as OpenAI writes them
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # `chat_template_kwargs`
    add_generation_prompt: bool = True  # end with the cue for the model's answer
    continue_final_message: bool = False  # no cue, no end of turn: the last message goes on


PLAIN_CHAT = ChatOptions()


@dataclass(frozen=True, slots=True)
class PromptFields:
    """What a prompt object says. Exactly one of `text` and `messages` is set."""

    text: str | None
    messages: tuple[ChatMessage, ...] | None
    sampling: SamplingParams
    chat_options: ChatOptions = PLAIN_CHAT


def find_id(line: Mapping[str, Any]) -> str | None:
    """The object's id as text, None when it has none.

    Raises:
        PromptError: kind `invalid_id`.
    """
    given = [key for key in _ID_KEYS if line.get(key) is not None]
    if len(given) > 1:
        raise PromptError("invalid_id", "both id and custom_id are given: keep one of them")
    if not given:
        return None
    value = line[given[0]]
    if type(value) not in (str, int) or not str(value).strip():
        raise PromptError(
            "invalid_id", f"{given[0]} = {_short(value)} must be a text or a whole number"
        )
    return str(value)


def parse_fields(line: Mapping[str, Any], defaults: SamplingParams) -> PromptFields:
    """Text or messages of `line`, and `defaults` with its overrides.

    Raises:
        PromptError: kinds missing_prompt, empty_prompt, invalid_prompt, invalid_messages,
            invalid_sampling, unknown_field.
    """
    asked = line
    if "body" in line:
        _reject_unknown(line, _BATCH_KEYS)
        asked = line["body"]
        if not isinstance(asked, Mapping):
            raise PromptError("invalid_prompt", f"body = {_short(asked)} must be an object")
    _reject_unknown(asked, _LINE_KEYS)
    asked = {key: value for key, value in asked.items() if value is not None}
    text, messages = _content(asked)
    return PromptFields(text, messages, _sampling(asked, defaults))


def _reject_unknown(line: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in line:
        if key not in known:
            guess = nearest(key, known)
            hint = f'did you mean "{guess}"? ' if guess else ""
            raise PromptError(
                "unknown_field",
                f'unknown field "{key}"; {hint}(notes of your own go under "metadata")',
            )


def _content(asked: Mapping[str, Any]) -> tuple[str | None, tuple[ChatMessage, ...] | None]:
    given = [key for key in _TEXT_KEYS if key in asked]
    if not given:
        raise PromptError("missing_prompt", 'neither "prompt" nor "messages" is given: add one')
    if len(given) > 1:
        raise PromptError("invalid_prompt", 'both "prompt" and "messages" are given: keep one')
    if given == ["messages"]:
        return None, _messages(asked["messages"])
    text = asked["prompt"]
    if isinstance(text, list) and len(text) == 1:  # the batch form allows a list
        text = text[0]
    if not isinstance(text, str):
        raise PromptError("invalid_prompt", f"prompt = {_short(text)} must be one text")
    if not text.strip():
        raise PromptError("empty_prompt", "the prompt is empty: write some text")
    return text, None


def _messages(value: Any) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        raise PromptError(
            "invalid_messages", f"messages = {_short(value)} must be a list with role and content"
        )
    messages = tuple(_message(entry, number) for number, entry in enumerate(value, start=1))
    if not any(message["content"].strip() for message in messages):
        raise PromptError("empty_prompt", "all messages are empty: write some text")
    return messages


def _message(entry: Any, number: int) -> ChatMessage:
    where = f"message {number}"
    if not isinstance(entry, Mapping) or not {"role", "content"} <= entry.keys():
        raise PromptError("invalid_messages", f"{where} must be an object with role and content")
    extra = set(entry) - {"role", "content", "name"}
    if extra:
        raise PromptError("invalid_messages", f"{where}: unknown field {min(extra)!r}: remove it")
    role = entry["role"]
    if not isinstance(role, str) or role not in _ROLES:
        raise PromptError(
            "invalid_messages",
            f"{where}: role = {_short(role)} must be system, developer, user or assistant",
        )
    return {"role": _ROLES[role], "content": _message_text(entry["content"], where)}


def _message_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    ]
    if len(texts) < len(parts):
        raise PromptError(
            "invalid_messages", f"{where}: content must be a text or a list of text parts"
        )
    return "".join(texts)


def _sampling(asked: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    changes: dict[str, Any] = {}
    for key in (*_SAMPLING_KEYS, *_ALIASES):
        if key not in asked:
            continue
        name = _ALIASES.get(key, key)
        value = _fitting(name, key, asked[key])
        if changes.setdefault(name, value) != value:
            raise PromptError(
                "invalid_sampling", f"{key} = {value!r} contradicts another name of {name}"
            )
    logprobs = _num_logprobs(asked)
    if logprobs is not None:
        changes.setdefault("num_logprobs", logprobs)
    for key, only in _NEUTRAL.items():
        if asked.get(key, only) != only:
            raise PromptError(
                "invalid_sampling", f"{key} = {_short(asked[key])} is not supported: remove it"
            )
    try:
        sampling = defaults.replace(**changes)
    except ValueError as error:
        raise PromptError("invalid_sampling", str(error)) from None
    problem = sampling_problem(sampling)
    if problem:
        raise PromptError("invalid_sampling", problem)
    return sampling


def _fitting(name: str, key: str, value: Any) -> Any:
    if name == "stop" and isinstance(value, str):
        value = [value]
    try:
        return fit(f"generation.{name}", value)
    except ValueError as error:
        raise PromptError("invalid_sampling", f"{key} = {_short(value)} {error}") from None


def _num_logprobs(asked: Mapping[str, Any]) -> int | None:
    """`num_logprobs` out of `logprobs` (count, or a flag with `top_logprobs`); None: not asked."""
    flag, top = asked.get("logprobs"), asked.get("top_logprobs")
    if flag is None and top is None:
        return None
    if type(flag) is int and flag >= 0 and top is None:
        return flag
    if flag is False and not top:
        return -1
    if flag is True and (top is None or (type(top) is int and top >= 0)):
        return top or 0
    raise PromptError(
        "invalid_sampling",
        f"logprobs = {_short(flag)} with top_logprobs = {_short(top)} has no meaning: give "
        "logprobs as a count, or true with top_logprobs as a count",
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
