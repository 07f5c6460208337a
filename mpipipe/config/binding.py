"""From plain nested values to the frozen dataclass tree, and back.

Generic over the tree in `schema.py`: sections are fields whose type is a dataclass, everything else
is a setting of type bool, int, float, str, `tuple[T, ...]` or a union of these. `checks.py` checks
ranges and choices, `load.py` reads files. Invariant: a value that comes through has exactly its
declared type (an int for a float field becomes a float), and a size in bytes is a number, whatever
unit it was given with (`byte_sizes.py`); such settings have names that end in `_bytes`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpipipe.config.byte_sizes import parse_bytes
from mpipipe.config.schema import AUTO, Config
from mpipipe.errors import ConfigError

__all__ = [
    "NEW_NAMES",
    "bind",
    "choices_by_setting",
    "fit",
    "is_text",
    "layer_overrides",
    "merge",
    "nearest",
    "sections",
    "settings",
    "short",
    "to_dict",
]

Nested = dict[str, Any]  # section -> setting -> plain TOML/JSON value
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
NEW_NAMES = {"pipeline.laps_ahead": "pipeline.lookahead"}  # by the older one, which still works
_MAX_INT = 2**63 - 1  # what MessagePack, numpy and torch all carry


@functools.cache
def sections() -> dict[str, type]:
    """Every section of the tree by name, with its dataclass."""
    hints = typing.get_type_hints(Config)
    return {
        name: kind
        for name, kind in hints.items()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }


@functools.cache
def _declared() -> dict[str, Any]:
    """Every setting of the tree by dotted name (`model.dtype`) with its type as declared."""
    found = typing.get_type_hints(Config)
    for section, cls in sections().items():
        del found[section]
        found |= {f"{section}.{key}": kind for key, kind in typing.get_type_hints(cls).items()}
    return found


@functools.cache
def settings() -> dict[str, Any]:
    """Every setting of the tree by dotted name with its type; choices of words as str."""
    return {name: str if _choices(kind) else kind for name, kind in _declared().items()}


@functools.cache
def choices_by_setting() -> dict[str, tuple[str, ...]]:
    """The words that each setting takes whose type is a choice of words, by dotted name."""
    return {name: words for name, kind in _declared().items() if (words := _choices(kind))}


def _choices(kind: Any) -> tuple[str, ...]:
    """The words that a setting declared as `kind` takes; empty: it is no choice of words."""
    options = _options(kind)
    if not all(typing.get_origin(option) is typing.Literal for option in options):
        return ()
    return tuple(word for option in options for word in typing.get_args(option))


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The closest of `known`, or an empty text when none is close."""
    import difflib  # only a mistake needs it

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else ""


def short(value: object) -> str:
    """`value` as a message shows it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python prints, and the like
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 60 else text[:57] + "…"


def _unknown(name: str, source: str) -> ConfigError:
    """The error for a dotted `name` that is no setting, with the likeliest one."""
    section, _, key = name.rpartition(".")
    tails = {known: known.rpartition(".")[2] for known in settings()}
    guess = nearest(name, [known for known, tail in tails.items() if tail == key], cutoff=0)
    if not guess and not section:
        tail = nearest(key, tails.values())
        guess = nearest(key, sections()) or next((k for k, t in tails.items() if t == tail), "")
    guess = guess or nearest(name, settings())
    have = f"the sections are {', '.join(sections())}"
    if section in sections():
        inside = [tail for known, tail in tails.items() if known.startswith(f"{section}.")]
        have = f"{section} has {', '.join(inside)}"
    hint = f', did you mean "{guess}"?' if guess else ":"
    return ConfigError(f'{source}: unknown setting "{name:.80}"{hint} {have[0].upper()}{have[1:]}')


def _not_a_setting(section: str, value: object, source: str) -> ConfigError:
    inside = [name for name in settings() if name.startswith(f"{section}.")]
    return ConfigError(
        f"{source}: {section} = {short(value)} does not fit: {section} is a section with "
        + ", ".join(inside)
    )


def bind(values: Mapping[str, Any], source: str) -> Config:
    """The configuration with `values` over the defaults.

    Raises:
        ConfigError: unknown name or wrong type; names the setting, its value and what fits.
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        if name not in sections():
            tree[name] = _checked("", name, value, source)
        elif isinstance(value, Mapping):
            inner = {key: _checked(name, key, part, source) for key, part in value.items()}
            tree[name] = sections()[name](**inner)
        else:
            raise _not_a_setting(name, value, source)
    return Config(**tree)


def _checked(section: str, key: str, value: Any, source: str) -> Any:
    name = f"{section}.{key}" if section else key
    if name not in settings() or "." in key:
        raise _unknown(name, source)
    try:
        return fit(name, value)
    except ValueError as error:
        raise ConfigError(f"{source}: {name} = {short(value)} {error}") from None


def fit(name: str, value: Any) -> Any:
    """`value` in the declared type of the setting `name`.

    Raises:
        ValueError: it does not fit; the text goes after "name = value".
    """
    kind = settings()[name]
    is_size = name.endswith("_bytes")
    if is_size and isinstance(value, str) and value != AUTO:
        value = parse_bytes(value)
    try:
        return _convert(value, kind)
    except TypeError:
        if _has_large_number(value):
            raise ValueError(f"is out of range: whole numbers go to {_MAX_INT}") from None
        expected = f'a size such as "6GiB", {_describe(kind)}' if is_size else _describe(kind)
        raise ValueError(f"does not fit: expected {expected}") from None


def _convert(value: Any, kind: Any) -> Any:
    """`value` as one of the options of `kind`; raises TypeError where it fits none."""
    for option in _options(kind):
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(_convert(item, typing.get_args(option)[0]) for item in value)
        if option is float and type(value) is int and abs(value) <= _MAX_INT:
            return float(value)
        if type(value) is option and _is_carried(value):
            return value
    raise TypeError


def _has_large_number(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else (value,)
    return any(type(item) is int and abs(item) > _MAX_INT for item in items)


def _is_carried(value: Any) -> bool:
    """Whether messages can hold it: no number of too many digits, no byte that is no UTF-8."""
    if isinstance(value, str):
        return is_text(value)
    return type(value) is not int or abs(value) <= _MAX_INT


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: no half of a surrogate pair, nor a byte that is none."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe(kind: Any) -> str:
    # The only text that a union takes is "auto" (checks.py).
    options = _options(kind)
    if len(options) > 1:
        return " or ".join('"auto"' if option is str else _describe(option) for option in options)
    if typing.get_origin(kind) is tuple:
        return "a list of texts" if typing.get_args(kind)[0] is str else "a list of whole numbers"
    return _WORDS[kind]


def _options(kind: Any) -> tuple[Any, ...]:
    """The members of a union; a plain type is its own only member."""
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Nested:
    """`over` on top of `base`, setting by setting; neither is changed."""
    result = dict(base)
    for name, value in over.items():
        below = result.get(name)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[name] = {**below, **value} if both else value  # type: ignore[dict-item]
    return result


def layer_overrides(overrides: Sequence[str]) -> Nested:
    """`section.key=value` words as nested plain values; an older name stays as it is.

    A value is read as TOML when that fits the setting, else it is the text itself; so
    `model.path=2024` and `generation.stop=END` need no quotes. A list setting takes a TOML list,
    one item, `14,16` for numbers, or the setting repeated once per item. For other settings the
    last word wins.

    Raises:
        ConfigError: no `=`, or a setting that does not exist.
    """
    result: Nested = {}
    lists_seen: set[str] = set()
    for word in overrides:
        name, equals, text = word.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(
                f"{short(word)} is no setting, and no file: write section.key=value, as in "
                "generation.seed=7"
            )
        if name in sections():
            raise _not_a_setting(name, text, "command line")
        kind = settings().get(NEW_NAMES.get(name, name))
        if kind is None:
            raise _unknown(name, "command line")
        value = _read_override(text, kind)
        section, _, key = name.rpartition(".")
        place = result.setdefault(section, {}) if section else result
        if isinstance(value, list) and name in lists_seen and isinstance(place[key], list):
            value = place[key] + value
        lists_seen.add(name)
        place[key] = value
    return result


def _read_override(text: str, kind: Any) -> Any:
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # ValueError: also a number of too many digits
        value = text
    if not isinstance(value, (bool, int, float, str, list)):  # a date or a table is just text here
        value = text
    if kind is str and not isinstance(value, str):
        return text
    list_kind = next((o for o in _options(kind) if typing.get_origin(o) is tuple), None)
    if list_kind is None or isinstance(value, list) or (value == AUTO and str in _options(kind)):
        return value
    if typing.get_args(list_kind)[0] is str:
        return [value if isinstance(value, str) else text]
    if isinstance(value, str) and "," in value:
        return [_read_override(item.strip(), int) for item in value.split(",")]
    return [value]


def to_dict(config: Config) -> Nested:
    """The tree as plain nested values that JSON and TOML can hold (tuples become lists)."""
    plain: Nested = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain
