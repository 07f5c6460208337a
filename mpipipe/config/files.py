"""Reading what users write: text files and strict JSON, with sentences instead of tracebacks.

Not here: what the text means. Invariant: every failure is a `ConfigError` (files) or a
`ValueError` with a short reason (JSON), never a decoding or recursion error.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mpipipe.errors import ConfigError

__all__ = ["expand_path", "parse_json", "read_bytes", "read_text"]

_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|(\w+))")
_BOMS_OF_OTHERS = (b"\xff\xfe", b"\xfe\xff")  # UTF-16, both byte orders
_GZIP_MAGIC = b"\x1f\x8b"


def read_bytes(path: Path, what: str) -> bytes:
    """The content of `path`, for a file that should be UTF-8 text; `what` names it in errors.

    Raises:
        ConfigError: missing, a folder, unreadable, UTF-16 or compressed.
    """
    try:
        raw = path.read_bytes()
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
    if raw.startswith(_BOMS_OF_OTHERS):
        raise ConfigError(f"the {what} {str(path)!r} is UTF-16 text: save it as UTF-8")
    if raw.startswith(_GZIP_MAGIC):
        raise ConfigError(f"the {what} {str(path)!r} is compressed: unpack it with gunzip first")
    return raw


def read_text(path: Path, what: str) -> str:
    """The UTF-8 text of `path`, without a byte order mark.

    Raises:
        ConfigError: as `read_bytes`, or not UTF-8 (the message names the line).
    """
    raw = read_bytes(path, what)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"the {what} {str(path)!r} is not UTF-8 text (line {line}): save it as UTF-8"
        ) from None


def parse_json(text: str) -> Any:
    """Parsed JSON; stricter than `json.loads`: no repeated keys, no NaN, no lone surrogates.

    Raises:
        ValueError: with a short reason that fits after a colon.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if "\n" not in text else f"line {error.lineno}"
        raise ValueError(f"{error.msg} at {where}") from None
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if r"\ud" in text.lower():  # only an escape can make a surrogate, so this is rarely paid
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no text") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} is there twice")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def expand_path(value: str, setting: str) -> str:
    """`value` with `~` and `$VAR` / `${VAR}` replaced; `setting` names it in the error.

    Raises:
        ConfigError: a variable that is not set.
    """
    for match in _VARIABLE.finditer(value):
        name = match.group(1) or match.group(2) or ""
        if name not in os.environ:
            raise ConfigError(
                f"{setting} = {value!r}: the environment variable {name!r} is not set; "
                "export it or write the path out"
            )
    return os.path.expanduser(os.path.expandvars(value))
