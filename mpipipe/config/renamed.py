"""Settings that have a new name: the old one is read as the new one, with a warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpipipe.errors import ConfigError

__all__ = ["rename_keys", "rename_words"]

_NEW_NAMES = {"pipeline.laps_ahead": "pipeline.lookahead"}


def _warning(old: str, new: str, source: str) -> str:
    return f"{source}: {old} is now called {new}; the old name still works, write the new one"


def rename_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """`section.key=value` words under today's names, and warnings about those that were older."""
    renamed = list(words)
    warnings = []
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        new = _NEW_NAMES.get(name.strip())
        if new is not None and equals:
            warnings.append(_warning(name.strip(), new, "command line"))
            renamed[place] = f"{new}={value}"
    return renamed, warnings


def rename_keys(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """A file's nested values under today's names, and warnings about those that were older.

    Raises:
        ConfigError: a setting is given under both of its names.
    """
    renamed, warnings = dict(values), []
    for old, new in _NEW_NAMES.items():
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
        warnings.append(_warning(old, new, source))
    return renamed, warnings
