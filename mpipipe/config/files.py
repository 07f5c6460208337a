"""Reading what users write: text files and strict JSON, with sentences instead of tracebacks.

Invariant: every failure is a `ConfigError` (files) or a `ValueError` with a short reason (JSON),
never a decoding or recursion error.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from mpipipe.errors import ConfigError

__all__ = ["SURROGATE", "expand_path", "parse_json", "parse_table", "read_bytes", "read_text"]

SURROGATE = "half of a surrogate pair (\\ud800 to \\udfff) is no text"

_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|(\w+))")
_MAX_NAME_BYTES = 255  # of Linux's file systems
_MAX_PATH_BYTES = 4096
_SHOWN = 80  # characters of a path in an error
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")  # both byte orders


def read_bytes(path: Path, what: str) -> bytes:
    """The content of `path`; `what` names it in errors.

    Raises:
        ConfigError: missing, a folder, or unreadable.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"the {what} {str(path)!r} does not exist (looked from {os.getcwd()}): check the path"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"the {what} {str(path)!r} is a folder: give a file") from None
    except OSError as error:
        raise ConfigError(
            f"the {what} {str(path)!r} cannot be read ({error.strerror}): check its permissions"
        ) from error
    except ValueError:  # a NUL in the path
        raise ConfigError(f"the {what} {str(path)!r} cannot exist: check the path") from None


def read_text(path: Path, what: str) -> str:
    """The UTF-8 text of `path`, without a byte order mark.

    Raises:
        ConfigError: as `read_bytes`, or not UTF-8 (the message names the line).
    """
    raw = read_bytes(path, what)
    if raw.startswith(_UTF16_BOMS):
        raise ConfigError(f"the {what} {str(path)!r} is UTF-16 text: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"the {what} {str(path)!r} is not UTF-8 text (line {line}): save it as UTF-8"
        ) from None


def parse_json(text: str) -> Any:
    """Parsed JSON; stricter than `json.loads`: no repeated keys, NaN, infinity, lone surrogates.

    Raises:
        ValueError: with a short reason that fits after a colon.
    """
    try:
        value = _DECODER.decode(text)
        if r"\ud" in text or r"\uD" in text:  # only an escape can make a surrogate: rarely paid
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if "\n" not in text else f"line {error.lineno}"
        raise ValueError(f"{error.msg.removesuffix(' at')} at {where}") from None
    except UnicodeEncodeError:
        raise ValueError(SURROGATE) from None
    except RecursionError:
        raise ValueError("too deeply nested") from None
    except ValueError as error:
        if "int_max_str_digits" in str(error):
            raise ValueError("a number has more digits than can be read") from None
        raise
    return value


def parse_table(text: str, path: Path) -> dict[str, Any]:
    """The object that a configuration file holds: TOML where its name says so, else JSON.

    Raises:
        ConfigError: not valid, or no object; names the file, `path`.
    """
    is_toml = path.suffix == ".toml"
    try:
        table = tomllib.loads(text) if is_toml else parse_json(text)
    except (ValueError, RecursionError) as error:
        language = "TOML" if is_toml else "JSON"
        raise ConfigError(f"{path} is not valid {language}: {error}") from None
    if not isinstance(table, dict):
        raise ConfigError(
            f"{path}: expected an object with sections, found a {type(table).__name__}"
        )
    return table


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} is there twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite
)


def expand_path(value: str, setting: str) -> str:
    """`value` with `~` and `$VAR` / `${VAR}` replaced; `setting` names it in the error.

    Raises:
        ConfigError: a variable that is not set, or what no path can be: one with a NUL, or too
            long for a file system.
    """
    if "\0" in value:  # the names of users are looked up, too
        raise ConfigError(
            f"{setting} = {value[:_SHOWN]!r} holds a NUL character: no path does; remove it"
        )
    for match in _VARIABLE.finditer(value):
        name = match.group(1) or match.group(2) or ""
        if name not in os.environ:
            raise ConfigError(
                f"{setting} = {value[:_SHOWN]!r}: the environment variable {name[:_SHOWN]!r} is "
                "not set; export it or write the path out"
            )
    path = os.path.expanduser(os.path.expandvars(value))
    names = path.encode(errors="replace").split(b"/")
    if max(map(len, names)) > _MAX_NAME_BYTES or len(path) >= _MAX_PATH_BYTES:
        raise ConfigError(f"{setting} = {value[:_SHOWN]!r}… is too long for a path: check it")
    return path
