"""The words of a command: first a configuration file or a model, then a prompt file and settings.

`mpipipe run exp.toml`, `mpipipe run MODEL_FOLDER prompts.jsonl generation.seed=7`. Told apart by
their names where that is possible, as not every rank may see the files. `binding.py` reads the
settings. Invariant: a word has one meaning, or is an error that shows the right order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpipipe.config.binding import settings, short
from mpipipe.config.prompt_file import STANDARD_INPUT
from mpipipe.errors import ConfigError

__all__ = ["DEMO_SCHEME", "CommandWords", "read_words"]

DEMO_SCHEME = "demo:"  # a model that comes from a package, not a folder
_CONFIG_SUFFIXES = (".toml", ".json")
_PROMPT_SUFFIXES = (".jsonl", ".ndjson", ".gz", ".zst", ".csv", ".tsv", ".txt", ".parquet")
_USAGE = (
    "write `mpipipe run CONFIG.toml [section.key=value …]` or "
    "`mpipipe run MODEL_FOLDER prompts.jsonl [section.key=value …]`"
)


@dataclass(frozen=True, slots=True)
class CommandWords:
    """What was named, by kind. `settings` win over the rest."""

    config: Path | None = None
    model: str | None = None  # a folder, or demo:…
    prompts: str | None = None
    settings: tuple[str, ...] = ()  # section.key=value


def read_words(source: Path | None, words: Sequence[str]) -> CommandWords:
    """The meaning of the first word, `source` (None: there is none), and of those after it.

    Raises:
        ConfigError: a word that has no meaning in its place.
    """
    first = None if source is None else str(source)
    for word in (first or "", *words):
        if "\0" in word:
            raise ConfigError(f"{short(word)} holds a NUL character: no path does; remove it")
    if first is not None:
        _check_first(first, words)
    prompts = _prompt_file(words)
    others = tuple(word for word in words if word != prompts)
    if source is None or first is None:
        return CommandWords(prompts=prompts, settings=others)
    is_folder = os.path.isdir(first)
    is_config = source.suffix in _CONFIG_SUFFIXES or os.path.isfile(first)
    if is_config and not is_folder and not first.startswith(DEMO_SCHEME):
        return CommandWords(source, None, prompts, others)
    if is_folder and not os.path.exists(os.path.join(first, "config.json")):
        raise ConfigError(
            f"{short(first)} is a folder without a config.json, so it holds no model: give a model "
            "folder, or a configuration file"
        )
    return CommandWords(None, first, prompts, others)


def _check_first(first: str, words: Sequence[str]) -> None:
    if first.partition("=")[0] in settings():
        raise ConfigError(f"{short(first)} is a setting in the first place: {_USAGE}")
    if first == STANDARD_INPUT or first.endswith(_PROMPT_SUFFIXES):
        model = next((word for word in words if "=" not in word), None)
        right = f"write `mpipipe run {model} {first}`" if model is not None else _USAGE
        raise ConfigError(f"{short(first)} is a prompt file in the place of the model: {right}")


def _prompt_file(words: Sequence[str]) -> str | None:
    files = [word for word in words if _is_file_word(word)]
    if len(files) > 1:
        raise ConfigError(
            f"{short(files[0])} and {short(files[1])} are two prompt files, and a run takes one: "
            "concatenate them"
        )
    if files and (files[0].endswith(".toml") or files[0].startswith(DEMO_SCHEME)):
        raise ConfigError(
            f"{short(files[0])} is in the place of the prompt file: {_USAGE}; in a configuration "
            "the model is model.path"
        )
    return files[0] if files else None


def _is_file_word(word: str) -> bool:
    """Whether it names a file, and is no setting; one that is wrong in any case is a setting."""
    name, equals, _ = word.partition("=")
    if equals or name in settings():
        return False
    return (
        word == STANDARD_INPUT
        or word.startswith(DEMO_SCHEME)
        or word.endswith((*_PROMPT_SUFFIXES, *_CONFIG_SUFFIXES))
        or "/" in word
        or os.path.exists(word)
    )
