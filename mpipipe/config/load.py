"""A configuration file, or a model, plus command-line words → one checked, frozen `LoadedConfig`.

Order: defaults ← `extends` chain, base first ← the file ← model and prompt file ← overrides. Files
are TOML or JSON; a JSON file in the style of `exp_config.json` goes through `legacy.py`. `planning`
resolves `auto`, `prompts.py` reads prompts. Invariant: ranks that load the same words from the same
files get equal configurations with equal hashes.

Paths: `~` and `$VAR` are expanded everywhere. A relative `model.path`, `model.tokenizer_path` or
`prompts.path` is looked up from the current directory, as on a command line; if it is not there but
is there from the folder of the file that sets it, that one is taken. `output.dir` is always
relative to the current directory. `extends` is relative to the file that says it.

The words of a command are told apart by their names where that is possible, as not every rank may
see the files: `mpipipe run exp.toml`, `mpipipe run MODEL_FOLDER prompts.jsonl generation.seed=7`. A
word has one meaning, or is an error that shows the right order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from mpipipe.config import legacy
from mpipipe.config.binding import NEW_NAMES, bind, layer_overrides, merge, settings, short, to_dict
from mpipipe.config.checks import check
from mpipipe.config.files import expand_path, parse_table, read_text
from mpipipe.config.prompt_file import STANDARD_INPUT
from mpipipe.config.schema import Config
from mpipipe.errors import ConfigError

__all__ = [
    "DEMO_SCHEME",
    "CommandWords",
    "LoadedConfig",
    "config_hash",
    "load_config",
    "read_words",
    "require_set",
    "to_dict",
]

_INPUT_PATHS = (("model", "path"), ("model", "tokenizer_path"), ("prompts", "path"))
_ALL_PATHS = (*_INPUT_PATHS, ("output", "dir"), ("memory", "offload_dir"))
DEMO_SCHEME = "demo:"  # a model that comes from a package, not a folder
_CONFIG_SUFFIXES = (".toml", ".json")
_PROMPT_SUFFIXES = (".jsonl", ".ndjson", ".gz", ".zst", ".csv", ".tsv", ".txt", ".parquet")
_USAGE = (
    "write `mpipipe run CONFIG.toml [section.key=value …]` or "
    "`mpipipe run MODEL_FOLDER prompts.jsonl [section.key=value …]`"
)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration with what came beside it."""

    config: Config
    inline_prompts: tuple[legacy.InlinePrompt, ...] = ()  # used when `prompts.path` is empty
    warnings: tuple[str, ...] = ()  # sentences to show once, on the head
    deepspeed: legacy.DeepSpeedExpectations | None = None  # checked once the plan exists
    sources: tuple[Path, ...] = ()  # the files read, the one given first
    generation_set: frozenset[str] = frozenset()  # the settings of `generation` that were given


def load_config(source: Path | None, words: Sequence[str] = ()) -> LoadedConfig:
    """The checked configuration of `source` under `words`, as on the command line.

    Args:
        source: a configuration file, a model folder, or `demo:smollm2`; None: the defaults.
        words: `section.key=value`, and at most one prompt file, which becomes `prompts.path`.

    Raises:
        ConfigError: unreadable file, unknown setting, wrong type or value out of range.
    """
    named = read_words(source, words)
    layers = _file_layers(named.config) if named.config is not None else []
    values: dict[str, Any] = {}
    inline: tuple[legacy.InlinePrompt, ...] = ()
    warnings: list[str] = []
    deepspeed = None
    for layer in reversed(layers):  # the base of the chain first
        bind(layer.values, str(layer.path))  # errors name the file that is wrong
        values = merge(values, layer.values)
        if layer.inline_prompts or layer.values.get("prompts", {}).get("path"):
            inline = layer.inline_prompts
        warnings += layer.warnings
        deepspeed = layer.deepspeed or deepspeed
    asked, renamed = _rename_keys(layer_overrides(named.settings), "command line")
    warnings += renamed
    bind(asked, "command line")
    paths = {"model": named.model, "prompts": named.prompts}
    asked = merge({name: {"path": path} for name, path in paths.items() if path}, asked)
    if asked.get("prompts", {}).get("path"):
        inline = ()
    values = {"name": _default_name(named), **values}
    merged = _expand(merge(values, asked))
    config = bind(merged, str(named.config or "command line"))
    check(config)
    sources = tuple(layer.path for layer in layers)
    given = frozenset(merged.get("generation", {}))
    return LoadedConfig(config, inline, tuple(warnings), deepspeed, sources, given)


def _default_name(named: CommandWords) -> str:
    """The file's stem, or the model's name."""
    if named.config is not None:
        return named.config.stem
    model = (named.model or "").removeprefix(DEMO_SCHEME)
    return Path(os.path.normpath(model)).name.strip("\\\n ") or Config().name


def _file_layers(path: Path) -> list[legacy.ConfigLayer]:
    """The files of the `extends` chain, from `path` to its root."""
    layers: list[legacy.ConfigLayer] = []
    seen: list[Path] = []
    next_path: Path | None = path
    while next_path is not None:
        real = Path(os.path.realpath(next_path))  # resolve() raises for links in a circle
        if real in seen:
            chain = " → ".join(p.name for p in [*seen, real])
            raise ConfigError(
                f"{next_path}: extends goes in a circle ({chain}): remove one of them"
            )
        seen.append(real)
        layers.append(_read_layer(next_path))
        next_path = layers[-1].base
    return layers


def _read_layer(path: Path) -> legacy.ConfigLayer:
    raw = _read_table(path)
    # First, as a model's file has keys of old experiment files, too: torch_dtype, use_cache.
    if "model_type" in raw or "architectures" in raw:
        raise ConfigError(
            f"{path} is the config.json of a model: give the model's folder, {path.parent}, or a "
            "configuration file that names it as model.path"
        )
    if path.suffix == ".json" and legacy.is_legacy(raw):
        old = legacy.convert(raw, path)
        return dataclasses.replace(old, values=_from_folder(old.values, path.parent))
    raw, renamed = _rename_keys(raw, str(path))
    extends = raw.pop("extends", None)
    if extends is not None and (not isinstance(extends, str) or not extends):
        raise ConfigError(f"{path}: extends = {short(extends)} must be the path of one file")
    base = path.parent / expand_path(extends, "extends") if extends else None
    values = _from_folder(raw, path.parent)
    return legacy.ConfigLayer(path, values, warnings=tuple(renamed), base=base)


def _read_table(path: Path) -> dict[str, Any]:
    text = read_text(path, "configuration file")
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"{path}: a configuration file ends in .toml or .json: rename it")
    return parse_table(text, path)


def _paths(
    values: dict[str, Any], names: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str, str]]:
    """Section, key and expanded path of each of the settings `names` that `values` give."""
    for section, key in names:
        table = values.get(section)
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(value, str) and not value.startswith(DEMO_SCHEME):
            yield section, key, expand_path(value, f"{section}.{key}")


def _from_folder(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`values` with its input paths taken from `folder` where only that exists."""
    for section, key, path in _paths(values, _INPUT_PATHS):
        # Not Path.exists, which raises for a name that is too long.
        if path and not os.path.exists(path) and os.path.exists(folder / path):
            values = merge(values, {section: {key: str(folder / path)}})
    return values


def _expand(values: dict[str, Any]) -> dict[str, Any]:
    for section, key, path in _paths(values, _ALL_PATHS):
        values = merge(values, {section: {key: path}})
    return values


def config_hash(config: Config) -> str:
    """Twelve hex digits of the SHA-256 of the configuration's sorted JSON."""
    text = json.dumps(to_dict(config), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def require_set(config: Config, *names: str) -> None:
    """Check that text settings such as `model.path` are not empty.

    Raises:
        ConfigError: names the empty setting and how to give it.
    """
    for name in names:
        if not attrgetter(name)(config):
            raise ConfigError(
                f"{name} is not set: give it in the configuration file or as {name}=… "
                "on the command line"
            )


# ---- the words of a command ----------------------------------------------------------------------


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


# ---- older names of settings ---------------------------------------------------------------------


def _rename_keys(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """dict[str, Any] values under today's names, and warnings about those that were older.

    Raises:
        ConfigError: a setting is given under both of its names.
    """
    renamed, warnings = dict(values), []
    for old, new in NEW_NAMES.items():
        section, _, old_key = old.rpartition(".")
        new_key = new.rpartition(".")[2]
        table = renamed.get(section)
        if not isinstance(table, Mapping) or old_key not in table:
            continue
        if new_key in table:
            raise ConfigError(f"{source} sets {new} and its older name {old}: keep {new} only")
        renamed[section] = {
            new_key if key == old_key else key: value for key, value in table.items()
        }
        warnings.append(
            f"{source}: {old} is now called {new}; the old name still works, write the new one"
        )
    return renamed, warnings
