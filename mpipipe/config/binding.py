"""From plain nested values to the frozen dataclass tree, and back.

Generic over the tree in `schema.py`: sections are fields whose type is a dataclass, everything else
is a setting of type bool, int, float, str, `tuple[T, ...]` or a union of these. `checks.py` checks
ranges and choices, `load.py` reads files. Invariant: a value that comes through has exactly its
declared type (an int for a float field becomes a float).
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpipipe.config.schema import AUTO, Config
from mpipipe.errors import ConfigError

__all__ = [
    "bind",
    "choices_by_setting",
    "fit",
    "layer_overrides",
    "merge",
    "nearest",
    "settings",
    "short",
    "to_dict",
]

Nested = dict[str, Any]  # section -> setting -> plain TOML/JSON value
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_MAX_INT = 2**63 - 1  # what MessagePack, numpy and torch all carry


class _MismatchError(Exception):
    """A plain value does not fit a declared type."""


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    """Field name -> resolved type of a dataclass, in declaration order; choices of words as str."""
    hints = typing.get_type_hints(cls)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return {name: str if _choices(kind) else kind for name, kind in kinds.items()}


def _choices(kind: Any) -> tuple[str, ...]:
    """The words that a setting declared as `kind` takes; empty: it is no choice of words."""
    options = _options(kind)
    if not all(typing.get_origin(option) is typing.Literal for option in options):
        return ()
    return tuple(word for option in options for word in typing.get_args(option))


@functools.cache
def choices_by_setting() -> dict[str, tuple[str, ...]]:
    """The words that each setting takes whose type is a choice of words, by dotted name."""
    return {
        f"{section}.{name}": _choices(kind)
        for section in _sections()
        for name, kind in typing.get_type_hints(_fields(Config)[section]).items()
        if _choices(kind)
    }


@functools.cache
def settings() -> dict[str, Any]:
    """Every setting of the tree by dotted name (`model.dtype`) with its type."""
    found: dict[str, Any] = {}
    for name, kind in _fields(Config).items():
        if dataclasses.is_dataclass(kind):
            found |= {
                f"{name}.{key}": inner for key, inner in _fields(typing.cast(type, kind)).items()
            }
        else:
            found[name] = kind
    return found


def _sections() -> list[str]:
    return [name for name, kind in _fields(Config).items() if dataclasses.is_dataclass(kind)]


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
        guess = nearest(key, _sections()) or next((k for k, t in tails.items() if t == tail), "")
    guess = guess or nearest(name, settings())
    have = f"the sections are {', '.join(_sections())}"
    if section in _sections():
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
        kind = _fields(Config).get(name)
        if kind is None:
            raise _unknown(name, source)
        if not dataclasses.is_dataclass(kind):
            tree[name] = _convert_setting(name, value, source)
            continue
        if not isinstance(value, Mapping):
            raise _not_a_setting(name, value, source)
        tree[name] = _bind_section(name, typing.cast(type, kind), value, source)
    return Config(**tree)


def _bind_section(section: str, cls: type, values: Mapping[str, Any], source: str) -> object:
    kinds = _fields(cls)
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{section}.{key}"
        if key not in kinds:
            raise _unknown(name, source)
        found[key] = _convert_setting(name, value, source)
    return cls(**found)


def _convert_setting(name: str, value: Any, source: str) -> Any:
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
    try:
        return _convert(value, kind)
    except _MismatchError:
        raise ValueError(f"does not fit: expected {_describe(kind)}") from None


def _convert(value: Any, kind: Any) -> Any:
    if kind in _WORDS:
        return _convert_scalar(value, kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise _MismatchError
        return tuple(_convert(item, typing.get_args(kind)[0]) for item in value)
    for option in _options(kind):
        try:
            return _convert(value, option)
        except _MismatchError:
            continue
    raise _MismatchError


def _convert_scalar(value: Any, kind: Any) -> Any:
    if kind is float and type(value) is int and abs(value) <= _MAX_INT:
        return float(value)
    if type(value) is not kind or (kind is int and abs(value) > _MAX_INT):
        raise _MismatchError
    if kind is str and not _is_text(value):
        raise _MismatchError
    return value


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: a byte on the command line that is none cannot."""
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
    """`section.key=value` words as nested plain values.

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
        if name in _sections():
            raise _not_a_setting(name, text, "command line")
        if name not in settings():
            raise _unknown(name, "command line")
        value = _read_override(text, settings()[name])
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
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value
