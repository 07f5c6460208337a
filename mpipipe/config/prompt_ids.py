"""The ids of a file's prompts: each line's own, or one that no other line has.

Who gets an id, in this order: the first line that is valid JSON and says it; a broken line whose id
can still be read; and, when all of these have theirs, the others, which get their line number, and
`#line<number>` behind what is taken. Invariant: ids depend on the content of the whole file only,
so that a resumed run finds them again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpipipe.config.binding import is_text, short
from mpipipe.errors import PromptError

__all__ = ["ID_KEYS", "FoundPrompt", "id_of_broken_line", "own_ids", "read_id"]

ID_KEYS = ("id", "custom_id")
# The first field of an object that may be cut off anywhere after it.
_FIRST_FIELD = re.compile(
    r'\s*\{\s*"(?:id|custom_id)"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)*"|-?\d{1,19})\s*,'
)


@dataclass(frozen=True, slots=True)
class FoundPrompt:
    """What is in the place of one prompt: an object, or the error that hides it."""

    number: int  # of the line, or of the prompt of a library call
    prompt_id: str | None  # that it says; None: nothing that can be read
    fields: Mapping[str, Any] | None = None
    error: PromptError | None = None


def read_id(line: Mapping[str, Any]) -> tuple[str | None, PromptError | None]:
    """The object's id as text, None without a readable one; and what is wrong with it."""
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


def id_of_broken_line(line: bytes) -> str | None:
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
            if (found := _FIRST_FIELD.match(text)) is not None:
                value = (("id", _parsed(found[1])),)
    pairs = value if isinstance(value, tuple) else ()
    ids = {_as_text(field) for key, field in pairs if key in ID_KEYS and field is not None}
    prompt_id = ids.pop() if len(ids) == 1 else None
    return prompt_id if prompt_id is not None and is_text(prompt_id) else None


def _parsed(scalar: str) -> object:
    try:
        return json.loads(scalar)
    except ValueError:  # an escape that is none
        return None


def own_ids(found: Sequence[FoundPrompt], unit: str = "line") -> list[str]:
    """An id for each of `found`, that no other has; `unit` names what their numbers count."""
    owners: dict[str, int] = {}  # id -> position in `found`
    for is_whole in (True, False):
        for position, prompt in enumerate(found):
            if prompt.prompt_id is not None and (prompt.fields is not None) is is_whole:
                owners.setdefault(prompt.prompt_id, position)
    own: list[str] = []
    for position, prompt in enumerate(found):
        wanted = str(prompt.number) if prompt.prompt_id is None else prompt.prompt_id
        if prompt.prompt_id is None or owners[wanted] != position:
            wanted = _unused(wanted, f"#{unit}{prompt.number}", owners)
            owners[wanted] = position
        own.append(wanted)
    return own


def _unused(wanted: str, suffix: str, taken: Iterable[str]) -> str:
    while wanted in taken:
        wanted += suffix
    return wanted
