"""A prompt file, or the prompts of a library call → `PromptLine`s in input order.

Each has its text or its own error. Accepted lines are documented in prompts/README.md.
`runtime.requests` tokenises them and applies chat templates. Invariants: one `PromptLine` per
non-blank line, also for a bad one; `index` counts them from 0; `prompt_id` is unique among them; a
bad line never stops the others.

Which prompt gets an id, in this order: the first line that is valid JSON and says it; a broken line
whose id can still be read; and, when all of these have theirs, the others, which get their line
number, and `#line<number>` behind what is taken. So ids depend on the content of the whole file
only, and a resumed run finds them again.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipipe.config.binding import is_text, short
from mpipipe.config.checks import default_sampling
from mpipipe.config.files import parse_json
from mpipipe.config.legacy import InlinePrompt
from mpipipe.config.load import LoadedConfig
from mpipipe.config.prompt_fields import ID_KEYS, PromptLine, PromptReader
from mpipipe.config.prompt_file import file_label, problem_of_lines, read_prompt_file
from mpipipe.config.schema import GenerationConfig
from mpipipe.errors import ConfigError, PromptError
from mpipipe.garbage import no_garbage_collection
from mpipipe.types import SamplingParams

__all__ = ["PromptLine", "configured_prompts", "library_prompts", "read_prompts"]

# The first field of an object that may be cut off anywhere after it.
_FIRST_FIELD = re.compile(
    r'\s*\{\s*"(?:id|custom_id)"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)*"|-?\d{1,19})\s*,'
)


@dataclass(frozen=True, slots=True)
class _FoundPrompt:
    """What is in the place of one prompt: an object, or the error that hides it."""

    number: int  # of the line, or of the prompt of a library call
    prompt_id: str | None  # that it says; None: nothing that can be read
    fields: Mapping[str, Any] | None = None
    error: PromptError | None = None


def configured_prompts(loaded: LoadedConfig) -> list[PromptLine]:
    """The prompts that a configuration names.

    Raises:
        ConfigError: as `read_prompts` does.
    """
    prompts = loaded.config.prompts
    path = Path(prompts.path) if prompts.path else None
    return read_prompts(path, loaded.config.generation, prompts.limit, loaded.inline_prompts)


def read_prompts(
    path: Path | None,
    generation: GenerationConfig,
    limit: int = 0,
    inline: Sequence[InlinePrompt] = (),
) -> list[PromptLine]:
    """The prompts of the JSONL file `path` (`-`: standard input), or `inline` without a path.

    `limit` takes only the first prompts (0: all); their ids are those that they have in the whole
    file. Where tokens are drawn, the prompt's seed derives from `generation.seed` and its id,
    unless the line gives one.

    Raises:
        ConfigError: no such file, no file of JSON lines, or no prompt in it.
    """
    defaults = default_sampling(generation)
    if path is None:
        found = [_object_prompt(prompt, number, "line") for number, prompt in enumerate(inline, 1)]
        if not found:
            raise ConfigError(
                "there are no prompts: give a JSONL file, as in `mpipipe run MODEL prompts.jsonl`, "
                "or set prompts.path to one"
            )
        return _prompt_lines(found, defaults, "line", limit)
    with no_garbage_collection():
        found = _file_prompts(path)
        if not found:
            raise ConfigError(
                f"{file_label(path)} holds no prompts: write one JSON object per line"
            )
        return _prompt_lines(found, defaults, "line", limit)


def library_prompts(prompts: Iterable[object], defaults: SamplingParams) -> list[PromptLine]:
    """The prompts of a library call: texts, lists of messages, or objects as on a line of a file.

    Judged as the lines of a file are. A prompt without an id is called by its position, from 0;
    `PromptLine.line_number` is this position. `defaults.seed` is the run's seed.
    """
    found = [_library_prompt(prompt, number) for number, prompt in enumerate(prompts)]
    return _prompt_lines(found, defaults, "prompt")


def _file_prompts(path: Path) -> list[_FoundPrompt]:
    """Every non-blank line of the file.

    Raises:
        ConfigError: the file as a whole is no file of JSON lines.
    """
    raw = read_prompt_file(path)
    raw = raw.removeprefix(codecs.BOM_UTF8)
    found = [_line_prompt(line, number) for number, line in _lines(raw)]
    if found and found[0].fields is None:
        none_readable = all(prompt.fields is None for prompt in found)
        if problem := problem_of_lines(raw, none_readable=none_readable):
            raise ConfigError(f"{file_label(path)} {problem}")
    return found


def _lines(raw: bytes) -> Iterator[tuple[int, bytes]]:
    # Bytes are split at newlines only: U+2028 and its like are ordinary characters in JSON.
    for number, line in enumerate(io.BytesIO(raw), start=1):
        # Files that were joined have the byte order mark of each at its first line.
        if stripped := line.removeprefix(codecs.BOM_UTF8).strip():
            yield number, stripped


def _line_prompt(line: bytes, number: int) -> _FoundPrompt:
    try:
        return _object_prompt(parse_json(line.decode("utf-8")), number, "line")
    except UnicodeDecodeError:
        error = PromptError("invalid_utf8", f"line {number} is not UTF-8 text: save it as UTF-8")
    except ValueError as invalid:
        error = PromptError("invalid_json", f"line {number} is not valid JSON: {invalid}")
    return _FoundPrompt(number, _id_of_broken_line(line), error=error)


def _library_prompt(prompt: object, number: int) -> _FoundPrompt:
    """As a line that says the same: through JSON, so that what no line can say is refused alike."""
    if isinstance(prompt, list | tuple):
        prompt = {"messages": prompt}
    elif isinstance(prompt, Mapping):
        prompt = dict(prompt)
    try:
        return _object_prompt(parse_json(json.dumps(prompt)), number, "prompt")
    except (TypeError, RecursionError) as fault:
        kind, reason = "invalid_prompt", f"is nothing that JSON can hold: {fault}"
    except ValueError as fault:
        kind, reason = "invalid_json", f"is not valid JSON: {fault}"
    error = PromptError(kind, f"prompt {number} {reason}")
    return _FoundPrompt(number, _id_beside_other_faults(prompt), error=error)


def _id_beside_other_faults(prompt: object) -> str | None:
    """The id of a prompt that no line can say, read as that of a broken line."""
    if not isinstance(prompt, dict):
        return None
    given = {key: prompt[key] for key in ID_KEYS if key in prompt}
    try:
        return _id_of_broken_line(json.dumps(given).encode())
    except (TypeError, ValueError, RecursionError):
        return None


_JSON_NAMES = {list: "a list", bool: "true or false", type(None): "null"}


def _object_prompt(value: Any, number: int, unit: str) -> _FoundPrompt:
    if isinstance(value, str):  # an inline prompt, or a line that is just a quoted text
        value = {"prompt": value}
    if not isinstance(value, Mapping):
        what = _JSON_NAMES.get(type(value), "a number")
        error = PromptError("invalid_json", f"{unit} {number} is {what}, not a JSON object")
        return _FoundPrompt(number, None, error=error)
    prompt_id, problem = _read_id(value)
    if problem is not None:
        problem = PromptError(problem.kind, f"{unit} {number}: {problem}")
    return _FoundPrompt(number, prompt_id, value, problem)


def _prompt_lines(
    found: Sequence[_FoundPrompt], defaults: SamplingParams, unit: str, limit: int = 0
) -> list[PromptLine]:
    own, owners = _own_ids(found, unit)
    reader = PromptReader(defaults)
    lines = []
    for index in range(min(limit or len(found), len(found))):
        prompt, prompt_id = found[index], own[index]
        try:
            line = _prompt_line(index, prompt, prompt_id, reader, unit)
            if prompt.prompt_id not in {None, prompt_id}:
                owner = found[owners[prompt.prompt_id]]
                raise _duplicate(prompt, owner, unit)
        except PromptError as error:
            line = PromptLine(index, prompt.number, prompt_id, error=error)
        lines.append(line)
    return lines


def _prompt_line(
    index: int, found: _FoundPrompt, prompt_id: str, reader: PromptReader, unit: str
) -> PromptLine:
    """What the prompt asks for; raises PromptError where it cannot be completed."""
    if found.error is not None:
        raise found.error
    assert found.fields is not None, "a prompt without an error has its fields"
    try:
        return reader.read(index, found.number, prompt_id, found.fields)
    except PromptError as error:
        raise PromptError(error.kind, f"{unit} {found.number}: {error}") from None


def _duplicate(found: _FoundPrompt, owner: _FoundPrompt, unit: str) -> PromptError:
    return PromptError(
        "duplicate_id",
        f"{unit} {found.number}: the id {found.prompt_id!r} belongs to {unit} {owner.number} "
        "already: give each its own",
    )


# ---- ids -----------------------------------------------------------------------------------------


def _read_id(line: Mapping[str, Any]) -> tuple[str | None, PromptError | None]:
    """The object's id as text, None without a readable one; and what is wrong with it."""
    if line.keys().isdisjoint(ID_KEYS):
        return None, None
    if "custom_id" not in line and type(known := line["id"]) is str and known.strip():
        return known, None  # of almost every line
    given = {key: line[key] for key in ID_KEYS if line.get(key) is not None}
    readable = [found for value in given.values() if (found := _as_text(value)) is not None]
    prompt_id = readable[0] if readable else None
    if len(readable) < len(given):
        key = next(key for key, value in given.items() if _as_text(value) is None)
        return prompt_id, PromptError(
            "invalid_id", f"{key} = {short(given[key])} must be a text or a whole number"
        )
    if len(set(readable)) > 1:
        return prompt_id, PromptError(
            "invalid_id", "both id and custom_id are given, and differ: keep one of them"
        )
    return prompt_id, None


def _as_text(value: object) -> str | None:
    if type(value) is int:
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def _id_of_broken_line(line: bytes) -> str | None:
    """The id of a line that is no valid JSON; None where it cannot be read beyond doubt.

    Read from an object that is complete but for what `parse_json` refuses, or from the beginning of
    one that is cut off, if the id is its first field.
    """
    text = line.decode("utf-8", "surrogateescape").strip()
    value: Any = None
    if text.startswith("{"):
        try:
            value = json.loads(text, object_pairs_hook=tuple)  # repeated keys stay visible
        except (ValueError, RecursionError):
            found = _FIRST_FIELD.match(text)
            with contextlib.suppress(ValueError):  # an escape that is none
                value = (("id", json.loads(found[1])),) if found else None
    pairs = value if isinstance(value, tuple) else ()
    ids = {_as_text(field) for key, field in pairs if key in ID_KEYS and field is not None}
    prompt_id = ids.pop() if len(ids) == 1 else None
    return prompt_id if prompt_id is not None and is_text(prompt_id) else None


def _own_ids(found: Sequence[_FoundPrompt], unit: str = "line") -> tuple[list[str], dict[str, int]]:
    """An id for each of `found`, that no other has, and the position in it that each id has.

    `unit` names what their numbers count.
    """
    owners: dict[str, int] = {}  # id -> position in `found`
    for is_whole in (True, False):
        for position, prompt in enumerate(found):
            if prompt.prompt_id is not None and (prompt.fields is not None) is is_whole:
                owners.setdefault(prompt.prompt_id, position)
    own: list[str] = []
    for position, prompt in enumerate(found):
        wanted = str(prompt.number) if prompt.prompt_id is None else prompt.prompt_id
        if prompt.prompt_id is None or owners[wanted] != position:
            while wanted in owners:
                wanted += f"#{unit}{prompt.number}"
            owners[wanted] = position
        own.append(wanted)
    return own, owners
