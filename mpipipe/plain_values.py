"""Dataclasses as plain values, the ones of JSON and msgpack, and back: the only place that does it.

As objects (`to_json`, `from_json`, `from_plain`) a dataclass is a mapping by field name; reading
checks names and types. As rows (`row_writer`, `row_reader`) it is an array of its fields, without
checks of types, for messages between ranks of one version: these are compiled once per class.

Fields may be int, float, str, bytes, bool, None, a Flag (by name; in objects), an enum of texts (in
rows), a Literal, an Optional of these, dataclasses, and tuples, lists and mappings of all of these.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal, TypeVar, Union

__all__ = ["from_json", "from_plain", "json_object", "row_reader", "row_writer", "to_json"]

T = TypeVar("T")
_Convert = Callable[[Any], Any]


# ---- objects -------------------------------------------------------------------------------------


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON of a dataclass, or of a sequence of them, with sorted keys; equal values, equal text."""
    return json.dumps(value, default=_plain, sort_keys=True, indent=indent)


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, enum.Flag) else dataclasses.asdict(value)


def _flag(kind: type[enum.Flag], names: Any) -> enum.Flag:
    """The inverse of `Flag.name`: names of members with `|` between them."""
    flag = kind(0)
    for name in str(names).split("|"):
        if name not in kind.__members__:
            raise ValueError(f"{name!r} is not one of {list(kind.__members__)}")
        flag |= kind[name]
    return flag


def from_json(kind: type[T], text: str | bytes) -> T:
    """The inverse of `to_json`.

    Args:
        kind: a dataclass, or a type like `list[Kind]`.
        text: JSON.

    Raises:
        ValueError: not JSON, or not of this kind; says where and why.
    """
    return from_plain(kind, json.loads(text))


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """The object that a line or a file holds; None: it is torn, or no object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def from_plain(kind: type[T], value: object) -> T:
    """A `kind` out of plain values; lists become tuples where the fields say so.

    Raises:
        ValueError: a field lacks, is unknown, or has another type; says which one.
    """
    read = _converter(kind, _object_reader, _leaf_check)
    assert read is not None, f"no rule for {kind}"
    built: T = read(value)
    return built


@functools.cache
def _object_reader(kind: type) -> _Convert:
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    readers = {name: _converter(hints[name], _object_reader, _leaf_check) for name in fields}
    required = {name for name, field in fields.items() if _is_required(field)}

    def read(value: Any) -> Any:
        if not isinstance(value, dict) or not required <= value.keys() <= fields.keys():
            raise ValueError(f"{kind.__name__} cannot be made of {_short(value)}")
        built = {}
        for name, part in value.items():
            reader = readers[name]
            try:
                built[name] = part if reader is None else reader(part)
            except ValueError as error:
                raise ValueError(f"{kind.__name__}.{name}: {error}") from error
        return kind(**built)

    return read


def _leaf_check(hint: Any) -> _Convert | None:
    """Returns the value if it is of the type `hint`, else raises ValueError."""
    if hint in {Any, object}:
        return None
    if isinstance(hint, type) and issubclass(hint, enum.Flag):
        return functools.partial(_flag, hint)
    if typing.get_origin(hint) is Literal:
        allowed: tuple[Any, ...] = typing.get_args(hint)
        kinds: tuple[type, ...] = tuple({type(value) for value in allowed})
    else:
        allowed, kinds = (), (int, float) if hint is float else (hint,)

    def check(value: Any) -> Any:
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not fits or (allowed and value not in allowed):
            wanted = f"one of {allowed}" if allowed else f"of type {hint.__name__}"
            raise ValueError(f"{_short(value)} is not {wanted}")
        return value

    return check


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- rows ----------------------------------------------------------------------------------------


def row_writer(kind: type) -> Callable[[Any], Sequence[Any]]:
    """A fast function from an instance of `kind` to its fields, nested dataclasses as rows too."""
    names = [field.name for field in dataclasses.fields(kind)]
    nested = _nested_rows(kind, row_writer)
    if len(names) <= 1:
        assert not nested, f"{kind.__name__}: no rule for a single field that is nested"
        return lambda value: [getattr(value, name) for name in names]
    take = attrgetter(*names)
    if not nested:
        return take

    def write(value: Any) -> Sequence[Any]:
        row = list(take(value))
        for place, convert in nested:
            if row[place]:  # most are empty: a message is written with every step
                row[place] = convert(row[place])
        return row

    return write


def row_reader(kind: type[T]) -> Callable[[Sequence[Any]], T]:
    """The inverse of `row_writer`; sequences must come as tuples.

    The function raises TypeError or ValueError for a row with another number of fields: no default
    takes the place of a field that lacks.
    """
    num_fields = len(dataclasses.fields(kind))  # type: ignore[arg-type]
    nested = _nested_rows(kind, row_reader)
    if not nested and all(map(_is_required, dataclasses.fields(kind))):  # type: ignore[arg-type]
        return lambda row: kind(*row)

    def read(row: Sequence[Any]) -> T:
        if len(row) != num_fields:
            raise TypeError(f"{kind.__name__} has {num_fields} fields, not {len(row)}")
        if not nested:
            return kind(*row)
        fields = list(row)
        for place, convert in nested:
            fields[place] = convert(fields[place])
        return kind(*fields)

    return read


def _nested_rows(kind: type, convert_row: Callable[[type], _Convert]) -> list[tuple[int, _Convert]]:
    """Place and converter of each field of `kind` that holds dataclasses."""
    hints = typing.get_type_hints(kind)
    of_leaf = _word_reader if convert_row is row_reader else lambda _: None
    converters = [
        _converter(hints[field.name], convert_row, of_leaf) for field in dataclasses.fields(kind)
    ]
    return [(place, convert) for place, convert in enumerate(converters) if convert is not None]


def _word_reader(hint: Any) -> _Convert | None:
    """Of an enum whose members are texts, which are written as these; None: of another type."""
    is_word = isinstance(hint, type) and issubclass(hint, str) and issubclass(hint, enum.Enum)
    return hint if is_word else None


# ---- types ---------------------------------------------------------------------------------------


def _converter(
    hint: Any, of_dataclass: Callable[[type], _Convert], of_leaf: Callable[[Any], _Convert | None]
) -> _Convert | None:
    """What to apply to a value of the type `hint`; None: nothing."""

    def inner(kind: Any) -> _Convert | None:
        return _converter(kind, of_dataclass, of_leaf)

    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return of_dataclass(hint)  # type: ignore[arg-type]
    if origin in {Union, types.UnionType}:
        (kind,) = (kind for kind in arguments if kind is not types.NoneType)
        return _or_none(inner(kind))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return _each_by_place([inner(kind) for kind in arguments])
    if origin in {tuple, list, Sequence}:
        return _each(list if origin is list else tuple, inner(arguments[0]))
    if origin in {dict, Mapping}:
        return _each_value(inner(arguments[1]))
    return of_leaf(hint)


def _or_none(convert: _Convert | None) -> _Convert | None:
    return convert and (lambda value: None if value is None else convert(value))


def _each(build: type, convert: _Convert | None) -> _Convert | None:
    if convert is None:
        return None

    def convert_each(values: Any) -> Any:
        if not isinstance(values, list | tuple):
            raise ValueError(f"{_short(values)} is not a list")  # noqa: TRY004 - as all here
        return build(map(convert, values))

    return convert_each


def _each_by_place(converters: Sequence[_Convert | None]) -> _Convert | None:
    if not any(converters):
        return None

    def convert_each(values: Any) -> Any:
        pairs = zip(converters, values, strict=True)
        return tuple(value if convert is None else convert(value) for convert, value in pairs)

    return convert_each


def _each_value(convert: _Convert | None) -> _Convert | None:
    if convert is None:
        return None

    def convert_each(values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError(f"{_short(values)} is not a mapping")  # noqa: TRY004 - as all here
        return {name: convert(value) for name, value in values.items()}

    return convert_each


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING
