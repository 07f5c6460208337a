"""The bytes of a prompt file: plain, `.gz`, `.zst`, or standard input (`-`).

`prompts.py` reads the lines. Where none can be read, one sentence tells what the file is, instead
of an error per line: a file with a readable prompt, and one with a line that begins as a JSON
object does, is no foreign file (unless an array holds them); exceptions are the formats that are
told by their first bytes, and one whole JSON value. Invariants: every failure is a `ConfigError`
about the file; a stream, which can be read once, is read once, and its hash is remembered.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpipipe.config.files import read_bytes
from mpipipe.errors import ConfigError

__all__ = [
    "STANDARD_INPUT",
    "file_label",
    "problem_of_lines",
    "prompts_hash",
    "read_prompt_file",
]

STANDARD_INPUT = "-"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SUFFIX_OF = {_GZIP: ".gz", _ZSTD: ".zst"}
_COMMAND_OF = {_GZIP: "gunzip", _ZSTD: "unzstd"}
_CHUNK_BYTES = 1 << 20
_ZSTD_CHUNK_BYTES = 4096  # packed; one can unpack to 175 MB
# Prompts with a long common beginning shrink to a hundredth. What unpacks to more than both is no
# text that was written as prompts, and would fill the memory.
_LARGE_BYTES = 1 << 30
_LARGE_RATIO = 200

_hashes_of_streams: dict[Path, str] = {}  # which cannot be read again to be hashed


def file_label(path: Path) -> str:
    """How a message names the prompt file `path`."""
    return "standard input" if str(path) == STANDARD_INPUT else f"the prompt file {str(path)!r}"


def read_prompt_file(path: Path) -> bytes:
    """The unpacked content of the prompt file `path`; `-` is standard input.

    Raises:
        ConfigError: missing, a folder, unreadable, truncated, packed in another way than its name
            says, or of another kind by its first bytes.
    """
    is_stream = str(path) == STANDARD_INPUT
    raw = _standard_input() if is_stream else read_bytes(path, "prompt file")
    if is_stream or not path.is_file():
        _hashes_of_streams[path] = hashlib.sha256(raw).hexdigest()
    content = _unpacked(raw, path)
    if problem := _problem_of_first_bytes(content):
        raise ConfigError(f"{file_label(path)} {problem}")
    return content


def prompts_hash(path: Path) -> str:
    """The SHA-256 of the file as it is stored; of a stream, as `read_prompt_file` has read it."""
    if path in _hashes_of_streams:
        return _hashes_of_streams[path]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _standard_input() -> bytes:
    """All of it. Read once: later calls get the same bytes, as they would from a file."""
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError(
            'prompts.path = "-", but standard input is closed here: give a file, or pipe the '
            "prompts into mpirun (rank 0 reads them)"
        )
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise ConfigError(
            f"the prompts cannot be read from standard input ({error.strerror}): give a file"
        ) from error


def _unpacked(raw: bytes, path: Path) -> bytes:
    label, magic = file_label(path), _packing(raw, path)
    if magic is None:
        return raw
    chunks = _gzip_chunks(raw) if magic == _GZIP else _zstd_chunks(raw, label)
    unpacked = io.BytesIO()
    try:
        for chunk in chunks:
            unpacked.write(chunk)
            if unpacked.tell() > max(_LARGE_BYTES, _LARGE_RATIO * len(raw)):
                raise ConfigError(
                    f"{label} has {len(raw):,} bytes and unpacks to more than "
                    f"{unpacked.tell():,}: these are no prompts; if they are, unpack it with "
                    f"{_COMMAND_OF[magic]} first"
                )
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigError(
            f"{label} cannot be unpacked ({error}): it is truncated or damaged; try "
            f"{_COMMAND_OF[magic]} -t on it, and copy it again"
        ) from error
    return unpacked.getvalue()


def _packing(raw: bytes, path: Path) -> bytes | None:
    """The first bytes of a compressed file, which its name must agree with; None: it is plain."""
    label = file_label(path)
    magic = next((magic for magic in _SUFFIX_OF if raw.startswith(magic)), None)
    if str(path) == STANDARD_INPUT:
        return magic
    wanted = next((m for m, suffix in _SUFFIX_OF.items() if path.name.endswith(suffix)), None)
    if magic is not None and wanted is None:
        raise ConfigError(
            f"{label} is compressed, though its name does not say so: give it a name that ends in "
            f"{_SUFFIX_OF[magic]}, or unpack it with {_COMMAND_OF[magic]}"
        )
    if magic != wanted and raw:
        raise ConfigError(
            f"{label} is not compressed as its name says: copy it again, or give it its right name"
        )
    return magic


def _gzip_chunks(raw: bytes) -> Iterator[bytes]:
    """Raises EOFError, OSError or zlib.error where it is damaged."""
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _zstd_chunks(raw: bytes, label: str) -> Iterator[bytes]:
    """Raises EOFError or OSError where it is damaged."""
    new_frame, error_kind = _zstd(label)
    position = 0
    while position < len(raw):
        frame = new_frame()
        while not frame.eof:
            part = raw[position : position + _ZSTD_CHUNK_BYTES]
            if not part:
                raise EOFError("it ends in the middle of a frame")
            try:
                yield frame.decompress(part)
            except error_kind as error:
                raise OSError(str(error)) from error
            position += len(part)
        position -= len(frame.unused_data)


def _zstd(label: str) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes the reader of one frame, and the error that it raises."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]

        return zstd.ZstdDecompressor, zstd.ZstdError
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise ConfigError(
            f"{label} is compressed with zstd, which this Python cannot read: unpack it with "
            "unzstd, or install the package zstandard"
        ) from None
    return (lambda: zstandard.ZstdDecompressor().decompressobj()), zstandard.ZstdError


# ---- files of another kind -----------------------------------------------------------------------


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


def _problem_of_first_bytes(raw: bytes) -> str:
    """The format that the first bytes tell, with the remedy; empty: none that is known."""
    told = (f"{what}: {how}" for magic, what, how in _FIRST_BYTES if raw.startswith(magic))
    return next(told, "")


def problem_of_lines(raw: bytes, *, none_readable: bool) -> str:
    """Why a file whose first line is no prompt is no file of prompts; empty: of each line its own.

    `none_readable`: no line of it is a readable prompt.
    """
    problem = _problem_of_json_document(raw)
    return problem or (_problem_of_text(raw) if none_readable else "")


def _problem_of_json_document(raw: bytes) -> str:
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


def _problem_of_text(raw: bytes) -> str:
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
