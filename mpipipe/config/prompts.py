"""A prompt file, or the prompts of a library call → `PromptLine`s in input order.

Each has its text or its own error. Accepted lines are documented in prompts/README.md.
`runtime.requests` tokenises them and applies chat templates. Invariants: one `PromptLine` per
non-blank line, also for a bad one; `index` counts them from 0; `prompt_id` is unique among them; a
bad line never stops the others.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import gc
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpipipe.config.checks import default_sampling
from mpipipe.config.files import parse_json
from mpipipe.config.foreign_file import (
    problem_of_first_bytes,
    problem_of_json_document,
    problem_of_text,
)
from mpipipe.config.legacy import InlinePrompt
from mpipipe.config.load import LoadedConfig
from mpipipe.config.prompt_fields import PromptLine, read_fields
from mpipipe.config.prompt_file import file_label, read_prompt_file
from mpipipe.config.prompt_ids import ID_KEYS, FoundPrompt, id_of_broken_line, own_ids, read_id
from mpipipe.config.schema import GenerationConfig
from mpipipe.errors import ConfigError, PromptError
from mpipipe.types import SamplingParams

__all__ = [
    "PromptLine",
    "configured_prompts",
    "library_prompts",
    "prompt_seed",
    "read_prompts",
]


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
    file. Each prompt's seed derives from `generation.seed` and its id, unless the line gives one.

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
    with _without_collections():
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


def prompt_seed(run_seed: int, prompt_id: str) -> int:
    """The seed of one prompt, in [0, 2^63): BLAKE2b of run seed and id, the same everywhere."""
    digest = hashlib.blake2b(f"{run_seed}:{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No search for garbage: of a large file all is kept, and looking at it again takes a third."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _file_prompts(path: Path) -> list[FoundPrompt]:
    """Every non-blank line of the file.

    Raises:
        ConfigError: the file as a whole is no file of JSON lines.
    """
    raw = read_prompt_file(path)
    if problem := problem_of_first_bytes(raw):
        raise ConfigError(f"{file_label(path)} {problem}")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    found = [_line_prompt(line, number) for number, line in _lines(raw)]
    if found and found[0].fields is None:
        problem = problem_of_json_document(raw)
        if not problem and all(prompt.fields is None for prompt in found):
            problem = problem_of_text(raw)
        if problem:
            raise ConfigError(f"{file_label(path)} {problem}")
    return found


def _lines(raw: bytes) -> Iterator[tuple[int, bytes]]:
    # Bytes are split at newlines only: U+2028 and its like are ordinary characters in JSON.
    for number, line in enumerate(io.BytesIO(raw), start=1):
        if stripped := line.strip():
            yield number, stripped


def _line_prompt(line: bytes, number: int) -> FoundPrompt:
    try:
        return _object_prompt(parse_json(line.decode("utf-8")), number, "line")
    except UnicodeDecodeError:
        error = PromptError("invalid_utf8", f"line {number} is not UTF-8 text: save it as UTF-8")
    except ValueError as invalid:
        error = PromptError("invalid_json", f"line {number} is not valid JSON: {invalid}")
    return FoundPrompt(number, id_of_broken_line(line), error=error)


def _library_prompt(prompt: object, number: int) -> FoundPrompt:
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
    return FoundPrompt(number, _id_beside_other_faults(prompt), error=error)


def _id_beside_other_faults(prompt: object) -> str | None:
    """The id of a prompt that no line can say, read as that of a broken line."""
    if not isinstance(prompt, dict):
        return None
    given = {key: prompt[key] for key in ID_KEYS if key in prompt}
    try:
        return id_of_broken_line(json.dumps(given).encode())
    except (TypeError, ValueError, RecursionError):
        return None


def _object_prompt(value: Any, number: int, unit: str) -> FoundPrompt:
    if isinstance(value, str):  # an inline prompt, or a line that is just a quoted text
        value = {"prompt": value}
    if not isinstance(value, Mapping):
        error = PromptError(
            "invalid_json", f"{unit} {number} is a {type(value).__name__}, not a JSON object"
        )
        return FoundPrompt(number, None, error=error)
    prompt_id, problem = read_id(value)
    if problem is not None:
        problem = PromptError(problem.kind, f"{unit} {number}: {problem}")
    return FoundPrompt(number, prompt_id, value, problem)


def _prompt_lines(
    found: Sequence[FoundPrompt], defaults: SamplingParams, unit: str, limit: int = 0
) -> list[PromptLine]:
    own = own_ids(found, unit)
    number_of = {prompt_id: prompt.number for prompt_id, prompt in zip(own, found, strict=True)}
    lines = []
    for index in range(min(limit or len(found), len(found))):
        prompt, line = found[index], PromptLine(index, found[index].number, own[index])
        try:
            line = _prompt_line(line, prompt, defaults, unit, number_of)
        except PromptError as error:
            line = dataclasses.replace(line, error=error)
        lines.append(line)
    return lines


def _prompt_line(
    line: PromptLine,
    found: FoundPrompt,
    defaults: SamplingParams,
    unit: str,
    number_of: Mapping[str, int],
) -> PromptLine:
    """`line` with what it asks for; raises PromptError where it cannot be completed."""
    if found.error is not None or found.fields is None:
        return dataclasses.replace(line, error=found.error)
    where = f"{unit} {found.number}"
    try:
        line = read_fields(line, found.fields, defaults, prompt_seed(defaults.seed, line.prompt_id))
    except PromptError as error:
        raise PromptError(error.kind, f"{where}: {error}") from None
    if found.prompt_id not in {None, line.prompt_id}:
        raise PromptError(
            "duplicate_id",
            f"{where}: the id {found.prompt_id!r} belongs to {unit} "
            f"{number_of[found.prompt_id]} already: give each its own",
        )
    return line
