"""One prompt object → text, messages or token ids, and its sampling settings.

Three forms: `{"prompt"}`, `{"messages"}`, and an OpenAI batch line `{"custom_id", "body"}`; keyword
arguments of the library are judged as the settings of a line are. `prompts.py` reads files and
finds ids, `chat_fields.py` reads messages and tools. Invariant: every key is understood, ignored on
purpose (`_IGNORED`), of a value that changes nothing (`_NEUTRAL`), or an error: a misspelt setting
is never silently the default.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpipipe.config.binding import fit, nearest, short
from mpipipe.config.chat_fields import (
    CHAT_KEYS,
    PLAIN_CHAT,
    ChatMessage,
    ChatOptions,
    chat_messages,
    chat_options,
    without_chat,
)
from mpipipe.config.checks import check_sampling
from mpipipe.errors import PromptError, SettingError
from mpipipe.sampling_options import OPTION_NAMES
from mpipipe.types import SamplingParams

__all__ = ["ID_KEYS", "PromptLine", "PromptReader", "keyword_sampling", "prompt_seed"]

ID_KEYS = ("id", "custom_id")
_TEXT_KEYS = ("prompt", "messages")
_ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
}
_LOGPROB_KEYS = ("logprobs", "top_logprobs")
_SETTING_KEYS = (*OPTION_NAMES, *_ALIASES, *_LOGPROB_KEYS)
# Settings that are not supported, of the OpenAI API, vLLM and SGLang, by the values that ask for
# nothing. So does null, everywhere.
_BY_NEUTRAL_VALUES: tuple[tuple[tuple[Any, ...], tuple[str, ...]], ...] = (
    ((1,), ("n", "best_of", "length_penalty")),
    ((0,), ("min_tokens", "min_new_tokens")),
    ((False,), ("echo", "use_beam_search", "early_stopping")),
    ((False,), ("include_stop_str_in_output", "no_stop_trim")),
    ((True,), ("skip_special_tokens", "spaces_between_special_tokens")),
    (([],), ("functions", "allowed_token_ids", "bad_words", "documents")),
    (([],), ("guided_choice", "logits_processors")),
    (({},), ("logit_bias",)),
    (({"type": "text"},), ("response_format",)),
    ((["text"],), ("modalities",)),
    (("medium",), ("verbosity",)),
    (("none", "auto"), ("function_call",)),
    (("",), ("suffix",)),
    ((), ("audio", "reasoning_effort", "web_search_options", "chat_template")),
    ((), ("truncate_prompt_tokens", "prompt_logprobs", "structured_outputs", "json_schema")),
    ((), ("guided_json", "guided_regex", "guided_grammar", "regex", "ebnf")),
)
_NEUTRAL = {name: values for values, names in _BY_NEUTRAL_VALUES for name in names}
# What does not decide the tokens: names, notes, how an answer travels, hints for speed.
_IGNORED = """
    metadata model user store service_tier stream stream_options safety_identifier prompt_cache_key
    prompt_cache_retention prediction priority request_id cache_salt return_token_ids
    return_tokens_as_token_ids
    """.split()  # noqa: SIM905 - a list of them would take a screen
# Dictionaries as sets that keep their order.
_BATCH_KEYS = dict.fromkeys((*ID_KEYS, "method", "url", "body", "metadata"))
_PROMPT_KEYS = (*ID_KEYS, *_TEXT_KEYS, *_SETTING_KEYS, *CHAT_KEYS, "add_special_tokens")
_LINE_KEYS = dict.fromkeys((*_PROMPT_KEYS, *_NEUTRAL, *_IGNORED))
_JUDGED_KEYS = frozenset((*_SETTING_KEYS, *_NEUTRAL))
_MAX_REMEMBERED = 1000  # settings, and characters of each
_COMPLETIONS_URL = re.compile(r"(.*/)?completions/?")


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One prompt as asked for: with `error`, or with `sampling` and its content.

    The content is one of `text`, `messages` and `token_ids`.
    """

    index: int  # position among the prompts, from 0: the order of completions.jsonl
    line_number: int  # in the file, from 1; blank lines count
    prompt_id: str  # unique in the run
    text: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    chat_options: ChatOptions = PLAIN_CHAT  # used with `messages`
    sampling: SamplingParams | None = None
    error: PromptError | None = None
    token_ids: tuple[int, ...] | None = None  # taken as they are


class PromptReader:
    """Reads prompt objects under the settings of one run, `defaults`.

    Most lines of a file ask for the same sampling: what was judged once is remembered.
    """

    def __init__(self, defaults: SamplingParams) -> None:
        self.defaults = defaults
        self._judged: dict[str, SamplingParams] = {}  # by the settings as asked for

    def read(
        self, index: int, line_number: int, prompt_id: str, given: Mapping[str, Any]
    ) -> PromptLine:
        """The line with the content of `given`, and the defaults with its overrides.

        Raises:
            PromptError: kinds missing_prompt, empty_prompt, invalid_prompt, invalid_messages,
                invalid_sampling, unknown_field.
        """
        asked = given
        if "body" in given:
            _reject_unknown(given, _BATCH_KEYS)
            _check_endpoint(given)
            asked = given["body"]
            if not isinstance(asked, Mapping):
                raise PromptError("invalid_prompt", f"body = {short(asked)} must be an object")
        _reject_unknown(asked, _LINE_KEYS)
        asked = {key: value for key, value in asked.items() if value is not None}
        text, messages, token_ids = _content(asked)
        options = PLAIN_CHAT
        if not asked.keys().isdisjoint(CHAT_KEYS):
            if messages is None:
                without_chat(asked)
            else:
                options = chat_options(asked, messages)
        # A chat's template writes the special tokens; in a text the run's setting decides.
        if "add_special_tokens" in asked and (
            messages is None or asked["add_special_tokens"] is not False
        ):
            raise _not_supported("add_special_tokens", asked, "it is prompts.add_special_tokens")
        return PromptLine(
            index,
            line_number,
            prompt_id,
            text=text,
            messages=messages,
            chat_options=options,
            sampling=self._sampling(asked, prompt_id),
            token_ids=token_ids,
        )

    def _sampling(self, asked: Mapping[str, Any], prompt_id: str) -> SamplingParams:
        """Greedy lines with equal settings share them; one that draws has a seed of its own."""
        settings = {key: value for key, value in asked.items() if key in _JUDGED_KEYS}
        try:
            words = "" if "seed" in settings else repr(settings)  # tells 1 from 1.0 and from true
        except (ValueError, RecursionError):  # a number of too many digits, lists in lists
            words = ""
        sampling = self._judged.get(words)
        if sampling is None:
            sampling = _sampling(settings, self.defaults)
            if 0 < len(words) <= _MAX_REMEMBERED and len(self._judged) < _MAX_REMEMBERED:
                self._judged[words] = sampling
        if sampling.is_greedy or "seed" in settings:
            return sampling
        return sampling.with_seed(prompt_seed(self.defaults.seed, prompt_id))


def prompt_seed(run_seed: int, prompt_id: str) -> int:
    """The seed of one prompt, in [0, 2^63): BLAKE2b of run seed and id, the same everywhere."""
    digest = hashlib.blake2b(f"{run_seed}:{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyword_sampling(settings: Mapping[str, object], defaults: SamplingParams) -> SamplingParams:
    """`defaults` under the keyword arguments of the library, judged as those of a line are.

    Raises:
        SettingError: a setting that is unknown, or a value that a line may not have either.
    """
    asked = {key: value for key, value in settings.items() if value is not None}
    for key, value in asked.items():
        if key not in _SETTING_KEYS and key not in _NEUTRAL:
            guess = nearest(key, _SETTING_KEYS)
            hint = f"did you mean {guess}?" if guess else f"it may be {', '.join(_SETTING_KEYS)}"
            raise SettingError(f"{key} = {short(value)}: there is no such setting; {hint}")
    try:
        return _sampling(asked, defaults)
    except PromptError as error:
        raise SettingError(str(error)) from None


def _reject_unknown(line: Mapping[str, Any], known: Mapping[str, None]) -> None:
    if line.keys() <= known.keys():
        return
    given = {key for key, value in line.items() if value is not None}
    has_text = not given.isdisjoint((*_TEXT_KEYS, "body"))
    for key, value in line.items():
        if key not in known and value is not None:
            hint = 'notes of your own go under "metadata"'
            if not has_text and {"role", "content"} <= given:
                hint = 'turns of a conversation go into a list under "messages"'
            elif not has_text and isinstance(value, list):
                hint = (
                    'turns of a conversation go under "messages", each with role and content, the '
                    f'text of a prompt goes under "prompt", {hint}'
                )
            elif not has_text and isinstance(value, Mapping):
                hint = f'what a batch line asks for goes under "body", {hint}'
            elif not has_text and isinstance(value, str):
                hint = f'the text of a prompt goes under "prompt", {hint}'
            elif guess := nearest(key.lower(), known):
                hint = f'did you mean "{guess}"? ({hint})'
            raise PromptError("unknown_field", f'unknown field "{key:.60}": {hint}')


def _check_endpoint(line: Mapping[str, Any]) -> None:
    url, method = line.get("url") or "completions", line.get("method") or "POST"
    if not isinstance(url, str) or not _COMPLETIONS_URL.fullmatch(url):
        raise PromptError(
            "invalid_prompt",
            f"url = {short(url)} is not served: it must be /v1/chat/completions or /v1/completions",
        )
    if not isinstance(method, str) or method.upper() != "POST":
        raise PromptError("invalid_prompt", f"method = {short(method)} must be POST")


_Content = tuple[str | None, tuple[ChatMessage, ...] | None, tuple[int, ...] | None]


def _content(asked: Mapping[str, Any]) -> _Content:
    given = [key for key in _TEXT_KEYS if key in asked]
    if not given:
        raise PromptError("missing_prompt", 'neither "prompt" nor "messages" is given: add one')
    if len(given) > 1:
        raise PromptError("invalid_prompt", 'both "prompt" and "messages" are given: keep one')
    if given == ["messages"]:
        return None, chat_messages(asked["messages"]), None
    text = asked["prompt"]
    if isinstance(text, list) and len(text) == 1 and type(text[0]) is not int:
        text = text[0]  # the batch form allows a list of prompts
    if isinstance(text, list) and text and all(type(number) is int for number in text):
        return None, None, tuple(text)
    if not isinstance(text, str):
        raise PromptError(
            "invalid_prompt", f"prompt = {short(text)} must be one text, or a list of token ids"
        )
    if not text.strip():
        raise PromptError("empty_prompt", "the prompt is empty: write some text")
    return text, None, None


def _sampling(asked: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    changes: dict[str, Any] = {}
    for key, given in asked.items():
        if key not in _SETTING_KEYS or key in _LOGPROB_KEYS:
            continue
        name = _ALIASES.get(key, key)
        value = _fitting(name, key, given)
        if name in changes and changes[name] != value:
            raise PromptError(
                "invalid_sampling", f"{key} = {short(value)} contradicts another name of {name}"
            )
        changes[name] = value
    logprobs = _num_logprobs(asked)
    if logprobs is not None:
        changes.setdefault("num_logprobs", logprobs)
    for key in asked:
        if key in _NEUTRAL and not any(_same(asked[key], neutral) for neutral in _NEUTRAL[key]):
            raise _not_supported(key, asked, "remove it")
    try:
        sampling = defaults.replace(**changes)
        check_sampling(sampling)
    except ValueError as error:
        raise PromptError("invalid_sampling", str(error)) from None
    return sampling


def _not_supported(key: str, asked: Mapping[str, Any], remedy: str) -> PromptError:
    return PromptError(
        "invalid_sampling", f"{key} = {short(asked[key])} is not supported: {remedy}"
    )


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and true is not 1; never for what JSON does not have, such as an array."""
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    return isinstance(value, int | float | str | list | dict) and bool(value == neutral)


def _fitting(name: str, key: str, value: Any) -> Any:
    if name == "stop" and isinstance(value, str):
        value = [value]
    if name == "top_k" and _same(value, -1):  # vLLM's way to switch it off
        value = 0
    try:
        return fit(f"generation.{name}", value)
    except ValueError as error:
        raise PromptError("invalid_sampling", f"{key} = {short(value)} {error}") from None


def _num_logprobs(asked: Mapping[str, Any]) -> int | None:
    """`num_logprobs` out of `logprobs` (count, or a flag with `top_logprobs`); None: not asked."""
    flag, top = asked.get("logprobs"), asked.get("top_logprobs")
    if flag is None and not top and not isinstance(top, bool):
        return None
    if type(flag) is int and flag >= 0 and top is None:
        return flag
    if flag is False and not top:
        return -1
    if flag is True and (top is None or (type(top) is int and top >= 0)):
        return top or 0
    raise PromptError(
        "invalid_sampling",
        f"logprobs = {short(flag)} with top_logprobs = {short(top)} has no meaning: give "
        "logprobs as a count, or true with top_logprobs as a count",
    )
