"""The header of one safetensors file: what it holds and where, checked against the file's size."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipipe.checkpoint.jsonfile import require_content
from mpipipe.errors import CheckpointError

__all__ = ["ITEM_BYTES", "TensorEntry", "read_header"]

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_LENGTH_BYTES = 8
_MAX_NUMBER = 2**63 - 1  # of an offset or a size

# safetensors' name -> (torch's name, bytes per element)
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
ITEM_BYTES = dict(_DTYPES.values())


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: str  # torch's name, "bfloat16"; safetensors' own where torch has none
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the start of the file
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of `path`, in the order in which they lie in the file.

    Raises:
        CheckpointError: empty, a git-lfs pointer, cut off, or no safetensors file.
    """
    require_content(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if len(start) < _LENGTH_BYTES or length > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file: copy it again")
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(_cut_off(path, _LENGTH_BYTES + length, size))
    try:
        listed = json.loads(text)
        listed.pop("__metadata__", None)
        entries = {name: _entry(path, _LENGTH_BYTES + length, listed[name]) for name in listed}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a broken header ({type(error).__name__}: {error}): copy it again"
        ) from error
    end = max((e.offset + e.num_bytes for e in entries.values()), default=_LENGTH_BYTES + length)
    if end > size:
        raise CheckpointError(_cut_off(path, end, size))
    if end < size:
        raise CheckpointError(
            f"{path} is longer ({size:,} bytes) than its header says ({end:,}): the file was "
            "overwritten in part; copy it again"
        )
    return dict(sorted(entries.items(), key=lambda item: item[1].offset))


def _cut_off(path: Path, expected: int, size: int) -> str:
    missing = expected - size
    return (
        f"{path} is cut off: its header says {expected:,} bytes and it has {size:,} ({missing:,} "
        f"are missing); copy {os.path.basename(path)} again"
    )


def _entry(path: Path, base: int, described: dict[str, Any]) -> TensorEntry:
    begin, end = described["data_offsets"]
    shape = tuple(described["shape"])
    numbers = (begin, end, *shape)
    if not all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers):
        raise ValueError("a shape or offset is not a whole number")
    if end < begin:
        raise ValueError(f"a tensor ends at {end}, before it begins at {begin}")
    dtype, item_bytes = _DTYPES.get(described["dtype"], (str(described["dtype"]), None))
    if item_bytes is not None and math.prod(shape) * item_bytes != end - begin:
        raise ValueError(f"{end - begin} bytes for {shape} of {dtype}")
    return TensorEntry(path, dtype, shape, base + begin, end - begin)
