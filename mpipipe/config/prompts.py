"""A prompt file → `PromptLine`s in input order, each with its text or its own error.

Accepted lines are documented in prompts/README.md. Not here: tokenising and chat templates.
Invariants: one `PromptLine` per non-blank line, also for a bad one; `index` counts them from 0;
`prompt_id` is unique among them; a bad line never stops the others.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mpipipe.config.checks import default_sampling
from mpipipe.config.files import parse_json, read_bytes
from mpipipe.config.legacy import InlinePrompt
from mpipipe.config.prompt_fields import PLAIN_CHAT, ChatMessage, ChatOptions, find_id, parse_fields
from mpipipe.config.schema import GenerationConfig
from mpipipe.errors import ConfigError, PromptError
from mpipipe.types import SamplingParams

__all__ = ["ChatMessage", "ChatOptions", "PromptLine", "prompt_seed", "read_prompts"]


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One prompt as asked for: with `error`, or with `sampling` and one of `text`, `messages`."""

    index: int  # position among the prompts, from 0: the order of completions.jsonl
    line_number: int  # in the file, from 1; blank lines count
    prompt_id: str  # unique in the run
    text: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    chat_options: ChatOptions = PLAIN_CHAT  # used with `messages`
    sampling: SamplingParams | None = None
    error: PromptError | None = None


def read_prompts(
    path: Path | None,
    generation: GenerationConfig,
    limit: int = 0,
    inline: Sequence[InlinePrompt] = (),
) -> list[PromptLine]:
    """The prompts of the JSONL file `path`, or `inline` when there is no path.

    `limit` takes only the first prompts (0: all). Each prompt's seed derives from
    `generation.seed` and its id, unless the line gives one.

    Raises:
        ConfigError: no such file, no text file, or no prompt in it.
    """
    if path is not None:
        objects = _file_objects(path)
    else:
        objects = ((number, prompt) for number, prompt in enumerate(inline, start=1))
    defaults = default_sampling(generation)
    owners: dict[str, int] = {}  # id -> line that has it
    lines = [
        _own_id(_prompt_line(index, number, found, defaults), owners)
        for index, (number, found) in enumerate(islice(objects, limit or None))
    ]
    if not lines:
        raise ConfigError(
            "there are no prompts: set prompts.path to a JSONL file"
            if path is None
            else f"the prompt file {str(path)!r} holds no prompts: write one JSON object per line"
        )
    return lines


def prompt_seed(run_seed: int, prompt_id: str) -> int:
    """The seed of one prompt, in [0, 2^63): BLAKE2b of run seed and id, the same everywhere."""
    digest = hashlib.blake2b(f"{run_seed}:{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _file_objects(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and parsed object, or the `PromptError` in its place, of each non-blank line."""
    raw = read_bytes(path, "prompt file").removeprefix(codecs.BOM_UTF8)
    # Bytes are split at newlines only: U+2028 and its like are ordinary characters in JSON.
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            yield number, _parse_line(line, number)


def _parse_line(line: bytes, number: int) -> Any:
    try:
        return parse_json(line.decode("utf-8").strip())
    except UnicodeDecodeError:
        return PromptError("invalid_utf8", f"line {number} is not UTF-8 text: save it as UTF-8")
    except ValueError as error:
        return PromptError("invalid_json", f"line {number} is not valid JSON: {error}")


def _prompt_line(index: int, number: int, found: Any, defaults: SamplingParams) -> PromptLine:
    line = PromptLine(index=index, line_number=number, prompt_id=str(number))
    if isinstance(found, PromptError):
        return replace(line, error=found)
    if isinstance(found, str):  # an inline prompt, or a line that is just a quoted text
        found = {"prompt": found}
    if not isinstance(found, dict):
        return replace(
            line,
            error=PromptError(
                "invalid_json", f"line {number} is a {type(found).__name__}, not a JSON object"
            ),
        )
    try:
        line = replace(line, prompt_id=find_id(found) or line.prompt_id)
        seeded = defaults.replace(seed=prompt_seed(defaults.seed, line.prompt_id))
        fields = parse_fields(found, seeded)
    except PromptError as error:
        return replace(line, error=PromptError(error.kind, f"line {number}: {error}"))
    return replace(
        line,
        text=fields.text,
        messages=fields.messages,
        chat_options=fields.chat_options,
        sampling=fields.sampling,
    )


def _own_id(line: PromptLine, owners: dict[str, int]) -> PromptLine:
    """`line`, as a duplicate_id error under a new id if an earlier line has its id."""
    first = owners.setdefault(line.prompt_id, line.line_number)
    if first == line.line_number:
        return line
    unique = line.prompt_id
    while unique in owners:
        unique = f"{unique}#line{line.line_number}"
    owners[unique] = line.line_number
    error = PromptError(
        "duplicate_id",
        f"line {line.line_number}: the id {line.prompt_id!r} belongs to line {first} already "
        "(a line without an id has its line number): give each line its own",
    )
    if line.error is not None:  # what is wrong with the line itself matters more
        error = line.error
    return PromptLine(line.index, line.line_number, unique, error=error)
