"""Mutations: a valid input → one that a careless or unlucky world might send. Seeded, pure.

Bytes are flipped, cut, repeated and spliced; JSON, msgpack and TOML are also changed as what they
mean (types swapped, keys doubled, nested deeply, numbers too large), since changed bytes alone
seldom get past a parser.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import msgpack

__all__ = [
    "Mutator",
    "mutate_bytes",
    "mutate_framed_json",
    "mutate_json",
    "mutate_json_lines",
    "mutate_msgpack",
    "mutate_toml",
]

Mutator = Callable[[Random, bytes, Sequence[bytes]], bytes]

_MAX_BYTES = 1 << 16  # longer inputs make a run slow and find nothing new
_MAX_DEPTH = 3_000


@dataclass(frozen=True, slots=True)
class _Literal:
    """Text that stands in a JSON document as it is, valid or not."""

    text: str


_TEXTS = (
    "",
    " ",
    "\n",
    "a",
    "auto",
    "null",
    "0",
    "-1",
    "../..",
    "/",
    "~",
    "~nobody-here",
    "$HOME",
    "$MPIPIPE_UNSET_VARIABLE",
    "\0",
    "a\0b",
    "\x7f",
    "\x1b[31m",
    "é",
    "e\u0301",
    "\u2028",
    "\ufeff",
    "\ufffd",
    "\uffff",
    "😀",
    "👩\u200d👩\u200d👧",
    "𝔘",
    "\u202egnp",
    "{{ x }}",
    "{% raw %}",
    "<s>",
    "</s>",
    "<|im_end|>",
    "[INST]",
    "%s%n",
    "1e999",
    "2020-13-45T99:99:99",
    "2020-11-22T12:00:00",
    "9999-12-31T23:59:59+00:00",
    "a" * 300,
    "a" * 5_000,
    "\u0661\u0662",
)
_NUMBERS: tuple[int | float, ...] = (
    0,
    1,
    -1,
    2,
    255,
    256,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
    -(2**63) - 1,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e300,
    1.5,
    3.0,
)
_LITERALS = (
    _Literal("NaN"),
    _Literal("Infinity"),
    _Literal("-Infinity"),
    _Literal("1e999"),
    _Literal("9" * 5_000),
    _Literal('"\\ud800"'),
    _Literal('"\\udfff\\ud800"'),
    _Literal('"\\u0000"'),
    _Literal('"\\x"'),
    _Literal("[" * _MAX_DEPTH + "]" * _MAX_DEPTH),
    _Literal('{"a":' * _MAX_DEPTH + "1" + "}" * _MAX_DEPTH),
    _Literal("["),
    _Literal("01"),
    _Literal("'a'"),
    _Literal("/**/1"),
)
_CHUNKS = (
    b"\0",
    b"\n",
    b"\r\n",
    b"\r",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xc3",
    b"\x80",
    b"\xf0\x9f\x98",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"=",
    b"#",
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"version https://git-lfs",
    b"\x00" * 64,
    b"[" * 2_000,
)


# ---- bytes ---------------------------------------------------------------------------------------


def mutate_bytes(rng: Random, content: bytes, corpus: Sequence[bytes]) -> bytes:
    """`content` after one to four changes of its bytes; `corpus` is where splices come from."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        rng.choice(_BYTE_CHANGES)(rng, changed, corpus)
    return bytes(changed[:_MAX_BYTES])


def _span(rng: Random, content: bytearray) -> tuple[int, int]:
    begin = rng.randint(0, len(content))
    return begin, min(len(content), begin + rng.choice((1, 2, 4, 8, 16, 64, 256)))


def _flip(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _set_byte(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    if content:
        content[rng.randrange(len(content))] = rng.choice(
            (0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))
        )


def _delete(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    begin, end = _span(rng, content)
    del content[begin:end]


def _cut(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    del content[rng.randint(0, len(content)) :]


def _repeat(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    begin, end = _span(rng, content)
    content[begin:begin] = content[begin:end] * rng.choice((1, 1, 2, 30))


def _insert(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    begin, end = _span(rng, content)
    content[begin : end if rng.random() < 0.5 else begin] = rng.choice(_CHUNKS)


def _splice(rng: Random, content: bytearray, corpus: Sequence[bytes]) -> None:
    begin, end = _span(rng, content)
    other = bytearray(rng.choice(corpus))
    start, stop = _span(rng, other)
    content[begin:end] = other[start:stop]


def _join(rng: Random, content: bytearray, corpus: Sequence[bytes]) -> None:
    other = rng.choice(corpus)
    del content[rng.randint(0, len(content)) :]
    content += other[rng.randint(0, len(other)) :]


_BYTE_CHANGES = (_flip, _set_byte, _delete, _cut, _repeat, _insert, _splice, _join)


# ---- values --------------------------------------------------------------------------------------


def _leaf(rng: Random) -> Any:
    choice = rng.randrange(6)
    if choice == 0:
        return rng.choice((None, True, False, [], {}))
    if choice == 1:
        return rng.choice(_NUMBERS)
    if choice == 2:
        return rng.choice((b"", b"\xff\x00", "a", 1.0))
    return rng.choice(_TEXTS)


def _mutate_value(rng: Random, value: Any, corpus_values: Sequence[Any]) -> Any:
    """`value` with one change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        return _mutate_object(rng, value, corpus_values)
    if isinstance(value, list) and value and rng.random() < 0.85:
        return _mutate_list(rng, value, corpus_values)
    return rng.choice(_VALUE_CHANGES)(rng, value, corpus_values)


def _wrapped(rng: Random, value: Any, _: Sequence[Any]) -> Any:
    return [value] if rng.random() < 0.5 else {rng.choice(_TEXTS): value}


def _of_another(rng: Random, value: Any, corpus_values: Sequence[Any]) -> Any:
    return rng.choice(corpus_values) if corpus_values else value


def _edited(rng: Random, value: Any, _: Sequence[Any]) -> Any:
    if isinstance(value, str):
        place = rng.randint(0, len(value))
        return value[:place] + rng.choice(_TEXTS) + value[place:]
    if isinstance(value, int):
        return value + rng.choice((-1, 1, 2**31, 2**63))
    return _leaf(rng)


def _other_leaf(rng: Random, _: Any, __: Sequence[Any]) -> Any:
    return _leaf(rng)


def _in_other_form(_: Random, value: Any, __: Sequence[Any]) -> Any:
    return _other_form(value)


_VALUE_CHANGES = (
    _wrapped,
    _of_another,
    _edited,
    _in_other_form,
    _other_leaf,
    _other_leaf,
    _other_leaf,
)


def _mutate_object(rng: Random, value: dict[Any, Any], corpus_values: Sequence[Any]) -> Any:
    changed = dict(value)
    key = rng.choice(list(changed))
    choice = rng.randrange(6)
    if choice == 0:
        del changed[key]
    elif choice == 1:
        changed[rng.choice(_TEXTS)] = changed.pop(key)
    elif choice == 2:
        changed[rng.choice(_TEXTS)] = _leaf(rng)
    else:
        changed[key] = _mutate_value(rng, changed[key], corpus_values)
    return changed


def _mutate_list(rng: Random, value: list[Any], corpus_values: Sequence[Any]) -> Any:
    changed = list(value)
    place = rng.randrange(len(changed))
    choice = rng.randrange(6)
    if choice == 0:
        del changed[place]
    elif choice == 1:
        changed.insert(place, _leaf(rng))
    elif choice == 2:
        changed *= rng.choice((0, 2, 50))
    else:
        changed[place] = _mutate_value(rng, changed[place], corpus_values)
    return changed


def _other_form(value: Any) -> Any:
    """The same in another type: what a careless writer of JSON makes of it."""
    match value:
        case bool():
            return str(value).lower()
        case int():
            return float(value) if abs(value) < 2**53 else str(value)
        case float() | None:
            return str(value)
        case str():
            return value.encode("utf-8", "surrogatepass")
        case _:
            return repr(value)


# ---- formats -------------------------------------------------------------------------------------


def mutate_json(rng: Random, content: bytes, corpus: Sequence[bytes]) -> bytes:
    """One JSON document, changed in what it means; now and then in its bytes."""
    value = _parsed(content)
    if value is _UNREADABLE or rng.random() < 0.2:
        return mutate_bytes(rng, content, corpus)
    others = [v for v in (_parsed(rng.choice(corpus)),) if v is not _UNREADABLE]
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _mutate_value(rng, value, others)
    return _write_json(rng, value)[:_MAX_BYTES]


def mutate_json_lines(rng: Random, content: bytes, corpus: Sequence[bytes]) -> bytes:
    """A file of JSON lines: one of them changed, or lines removed, doubled and put elsewhere."""
    lines = content.split(b"\n")
    if rng.random() < 0.15:
        return mutate_bytes(rng, content, corpus)
    choice = rng.randrange(10)
    place = rng.randrange(len(lines))
    if choice == 0:
        del lines[place]
    elif choice == 1:
        lines.insert(rng.randint(0, len(lines)), lines[place])
    elif choice == 2:
        lines.insert(rng.randint(0, len(lines)), rng.choice(rng.choice(corpus).split(b"\n")))
    else:
        lines[place] = mutate_json(rng, lines[place], rng.choice(corpus).split(b"\n"))
    return b"\n".join(lines)[:_MAX_BYTES]


def mutate_msgpack(rng: Random, content: bytes, corpus: Sequence[bytes]) -> bytes:
    """One msgpack value, changed in what it means; now and then in its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content, corpus)
    try:
        value = msgpack.unpackb(content, strict_map_key=False, unicode_errors="surrogatepass")
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = _mutate_value(rng, value, ())
        packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError):
        return mutate_bytes(rng, content, corpus)
    return packed


def mutate_framed_json(rng: Random, content: bytes, corpus: Sequence[bytes]) -> bytes:
    """A safetensors file: its JSON changed, and the length before it made to fit most times."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.25 or length > len(content) - 8:
        return mutate_bytes(rng, content, corpus)
    headers = [other[8 : 8 + int.from_bytes(other[:8], "little")] for other in corpus]
    header = mutate_json(rng, content[8 : 8 + length], headers)
    told = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) + 1, 2**40, 2**63))
    return told.to_bytes(8, "little") + header + content[8 + length :]


def mutate_toml(rng: Random, content: bytes, corpus: Sequence[bytes]) -> bytes:
    """Lines of `key = value`: a value exchanged, a line doubled, moved or taken from another."""
    lines = content.split(b"\n")
    if rng.random() < 0.2:
        return mutate_bytes(rng, content, corpus)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(lines))
        key, equals, value = lines[place].partition(b"=")
        choice = rng.randrange(6)
        if choice == 0:
            lines.insert(rng.randint(0, len(lines)), lines[place])
        elif choice == 1:
            lines.insert(place, rng.choice(rng.choice(corpus).split(b"\n")))
        elif choice == 2 or not equals:
            lines[place] = mutate_bytes(rng, lines[place], corpus)
        elif choice == 3:
            lines[place] = key + equals + mutate_bytes(rng, value, corpus)
        else:
            lines[place] = key + b"= " + _toml_value(rng)
    return b"\n".join(lines)[:_MAX_BYTES]


_TOML_VALUES = (
    b"inf",
    b"-inf",
    b"nan",
    b"0x" + b"f" * 5_000,
    b"9" * 5_000,
    b"-9223372036854775809",
    b"0o17",
    b"0b1",
    b"1_000",
    b"1e400",
    b"1979-05-27",
    b"1979-05-27T07:32:00Z",
    b"07:32:00",
    b"{a = 1}",
    b"{}",
    b"[]",
    b"[1, 'a']",
    b"[[1]]",
    b"[" * _MAX_DEPTH + b"]" * _MAX_DEPTH,
    b"{a=" * _MAX_DEPTH,
    b"true",
    b"false",
    b'"""a\nb"""',
    b"'a\\b'",
    b'"\\u0000"',
    b'"\\ud800"',
    b"''",
    b"",
    b"abc",
    b'"auto"',
    b"14,16",
)


def _toml_value(rng: Random) -> bytes:
    choice = rng.randrange(3)
    if choice == 0:
        return rng.choice(_TOML_VALUES)
    if choice == 1:
        return str(rng.choice(_NUMBERS)).encode()
    return json.dumps(rng.choice(_TEXTS), ensure_ascii=rng.random() < 0.5).encode()


_UNREADABLE = object()


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return _UNREADABLE


def _write_json(rng: Random, value: Any) -> bytes:
    """JSON of `value`; now and then with a key twice or a leaf that is no valid JSON."""
    literals = [rng.choice(_LITERALS)] if rng.random() < 0.15 else []
    doubles = rng.random() < 0.05
    escaped = rng.random() < 0.5

    def write(part: Any) -> str:
        if literals and rng.random() < 0.2:
            return literals.pop().text
        match part:
            case dict():
                members = [f"{text(str(key))}: {write(item)}" for key, item in part.items()]
                return "{" + ", ".join(members + (members[:1] if doubles else [])) + "}"
            case list() | tuple():
                return "[" + ", ".join(write(item) for item in part) + "]"
            case bytes():
                return text(part.decode("latin-1"))
            case str():
                return text(part)
            case _:
                return json.dumps(part)

    def text(part: str) -> str:
        return json.dumps(part, ensure_ascii=escaped)

    try:
        return write(value).encode("utf-8", "surrogatepass")
    except RecursionError:  # nested by earlier changes
        return b"[" * _MAX_DEPTH
