"""What a file is when it is no JSON lines: one sentence about the file, not an error per line.

Pure functions of the file's bytes; `prompts.py` asks them, and only a file without a single
readable prompt is ever judged as a whole by its text. Invariant: a file with a readable prompt, and
one with a line that begins as a JSON object does, is no foreign file (unless an array holds them):
its bad lines are error records. Exceptions are the formats that are told by their first bytes, and
one whole JSON value.
"""

from __future__ import annotations

import json
import re

__all__ = ["problem_of_first_bytes", "problem_of_json_document", "problem_of_text"]

_JSON_LINES = "write one JSON object per line, as UTF-8 text"
_SAVE_UTF8 = "save it as UTF-8"
_FIRST_BYTES = (
    (b"\xff\xfe\x00\x00", "is UTF-32 text", _SAVE_UTF8),
    (b"\x00\x00\xfe\xff", "is UTF-32 text", _SAVE_UTF8),
    (b"\xff\xfe", "is UTF-16 text", _SAVE_UTF8),
    (b"\xfe\xff", "is UTF-16 text", _SAVE_UTF8),
    (b"PAR1", "is a Parquet file", "export it as JSON lines"),
    (b"ARROW1", "is an Arrow file", "export it as JSON lines"),
    (b"Obj\x01", "is an Avro file", "export it as JSON lines"),
    (b"SQLite format 3\x00", "is an SQLite database", "export it as JSON lines"),
    (b"PK\x03\x04", "is a zip archive or a spreadsheet", "unpack or export it as JSON lines"),
    (b"BZh", "is compressed with bzip2", "unpack it with bunzip2 first"),
    (b"\xfd7zXZ\x00", "is compressed with xz", "unpack it with unxz first"),
    (b"\x1f\x8b", "is compressed twice", "unpack it with gunzip first"),
    (b"\x28\xb5\x2f\xfd", "is compressed twice", "unpack it with unzstd first"),
)
_SAMPLE_BYTES = 4096
_BEGUN_OBJECT = re.compile(rb'[ \t]*\{[ \t]*"')
_OPENS_ARRAY = re.compile(rb"\[\s*\n")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\ufffd]")  # not tab, newlines, form feed
_SEPARATORS = b",;\t|"


def problem_of_first_bytes(raw: bytes) -> str:
    """The format that the first bytes tell, with the remedy; empty: none that is known."""
    for magic, what, remedy in _FIRST_BYTES:
        if raw.startswith(magic):
            return f"{what}: {remedy}"
    return ""


def problem_of_json_document(raw: bytes) -> str:
    """The problem of a file that is one JSON array, or one object over several lines.

    Parses all of it: for files whose first line is no object.
    """
    content = raw.strip()
    array = f"is one JSON array: {_JSON_LINES} (jq -c '.[]' does it)"
    if _OPENS_ARRAY.match(content) and content.endswith(b"]"):  # also with an item that is broken
        return array
    if not content.startswith(b"[") and not (content.startswith(b"{") and b"\n" in content):
        return ""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # ValueError: also text that is not UTF-8
        return ""
    if isinstance(value, list):
        return array
    return f"is one JSON object over several lines: {_JSON_LINES} (jq -c . does it)"


def problem_of_text(raw: bytes) -> str:
    """The problem of a file of which no line is a readable prompt; empty: of each line its own."""
    content = raw.strip()
    if wide := _wide_encoding(raw):
        return f"is {wide} text: {_SAVE_UTF8}"
    if b"\n" not in content and b"\r" in content and _is_object(content.partition(b"\r")[0]):
        return "has its lines ended by CR alone: end them by newlines (tr '\\r' '\\n' does it)"
    sample = content[:_SAMPLE_BYTES].decode("utf-8", "replace")
    if len(_CONTROL.findall(sample)) * 10 > len(sample):
        return f"is a binary file: {_JSON_LINES}"
    lines = content.split(b"\n")
    if not content.startswith(b"[") and any(_BEGUN_OBJECT.match(line) for line in lines):
        return ""
    begins = f"begins with {lines[0][:40].decode('utf-8', 'replace')!r}"
    if _looks_like_table(lines):
        return f"is a table such as CSV, not JSON lines (it {begins}): {_JSON_LINES}"
    return f"holds no line that is a JSON object (it {begins}): {_JSON_LINES}"


def _wide_encoding(raw: bytes) -> str:
    """UTF-16 or UTF-32 without a mark: every second or fourth byte of the first letters says."""
    zeros = tuple(byte == 0 for byte in raw[:4])
    if zeros in ((False, True, True, True), (True, True, True, False)):
        return "UTF-32"
    if zeros[:2] in ((False, True), (True, False)) and len(raw) % 2 == 0:
        return "UTF-16"
    return ""


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict | str)
    except (ValueError, RecursionError):
        return False


def _looks_like_table(lines: list[bytes]) -> bool:
    """Whether a character that separates columns is on the first lines, equally often."""
    first = lines[:5]
    return len(first) > 1 and any(
        len({line.count(separator) for line in first}) == 1 and separator in first[0]
        for separator in _SEPARATORS
    )
