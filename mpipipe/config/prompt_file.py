"""The bytes of a prompt file: plain, `.gz`, `.zst`, or standard input (`-`).

`prompts.py` reads the lines; `foreign_file.py` tells what kind of file it is when no line can be
read. Invariants: every failure is a `ConfigError` about the file; a stream, which can be read once,
is read once, and its hash is remembered.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpipipe.config.files import read_bytes
from mpipipe.errors import ConfigError

__all__ = ["STANDARD_INPUT", "file_label", "prompts_hash", "read_prompt_file"]

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
        ConfigError: missing, a folder, unreadable, truncated, or packed in another way than its
            name says.
    """
    is_stream = str(path) == STANDARD_INPUT
    raw = _standard_input() if is_stream else read_bytes(path, "prompt file")
    if is_stream or not path.is_file():
        _hashes_of_streams[path] = hashlib.sha256(raw).hexdigest()
    return _unpacked(raw, path)


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
