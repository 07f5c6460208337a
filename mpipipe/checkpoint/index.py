"""Which weight files a model folder has, whether they are whole, and where each tensor lies.

Purpose: find half-copied models before a rank reads a byte of weights, on a login node too (no
torch). `weights/sources.py` reads tensors, `weights/names.py` knows which names a model wants.

Formats, in this order of preference: `model.safetensors`, safetensors shards by their index,
`pytorch_model.bin`, `.bin` shards by their index. A safetensors header is 8 bytes of length, then
JSON (https://github.com/huggingface/safetensors, "Format"). A `.bin` file is a zip archive whose
directory stands at its end, so a file that was cut off has none; the names in it need torch.

Invariants: a returned index lists existing, complete files; every safetensors entry lies inside its
file and its length follows from dtype and shape.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipipe.checkpoint.jsonfile import read_json_object, require_content
from mpipipe.errors import CheckpointError

__all__ = [
    "SAFETENSORS",
    "SAFETENSORS_DTYPES",
    "TORCH",
    "CheckpointIndex",
    "TensorEntry",
    "holds_weights",
    "read_index",
]

SAFETENSORS, TORCH = "safetensors", "torch"
_STEMS = ((SAFETENSORS, "model.safetensors"), (TORCH, "pytorch_model.bin"))
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})\.(safetensors|bin)")
_MAX_NAME = 255  # bytes, of a file on any file system
_ZIP_MAGIC = b"PK\x03\x04"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_LENGTH_BYTES = 8
_MAX_NUMBER = 2**63 - 1  # of an offset or a size

# safetensors' name -> (torch's name, bytes per element)
SAFETENSORS_DTYPES = {
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


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: str  # torch's name, "bfloat16"; safetensors' own where torch has none
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the start of the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """The weights of one model folder."""

    folder: Path
    format: str  # "safetensors" | "torch"
    files: tuple[Path, ...]  # in the order of their names
    tensors: Mapping[str, TensorEntry]  # of a safetensors model, in file order; else empty
    shard_of: Mapping[str, Path]  # tensor name -> file, of a sharded `.bin` model; else empty

    @property
    def file_bytes(self) -> int:
        """Bytes of all weight files together."""
        return sum(path.stat().st_size for path in self.files)


def read_index(folder: Path) -> CheckpointIndex:
    """Find, check and list the weight files of `folder`.

    Reads headers only: milliseconds per file.

    Raises:
        CheckpointError: no weights, or a file is missing, empty, cut off, a git-lfs pointer or
            broken; the message names it.
    """
    for kind, name in _STEMS:
        single, listing = folder / name, folder / f"{name}.index.json"
        if single.exists():
            return _index_of(folder, kind, (single,), {})
        if listing.exists():
            shard_of = _read_listing(folder, listing)
            files = tuple(sorted(set(shard_of.values())))
            return _index_of(folder, kind, files, shard_of)
    raise CheckpointError(_no_weights(folder))


def holds_weights(folder: Path) -> bool:
    """Whether there is a weight file, or a list of such files, sound or not."""
    names = [name for _, name in _STEMS] + [f"{name}.index.json" for _, name in _STEMS]
    return any((folder / name).exists() for name in names)


def _index_of(
    folder: Path, kind: str, files: tuple[Path, ...], shard_of: Mapping[str, Path]
) -> CheckpointIndex:
    if kind == TORCH:
        for path in files:
            _require_whole_archive(path)
        return CheckpointIndex(folder, kind, files, {}, shard_of)
    tensors: dict[str, TensorEntry] = {}
    for path in files:
        entries = _read_header(path)
        if doubled := sorted(entries.keys() & tensors.keys()):
            raise CheckpointError(
                f"{path.name} and {tensors[doubled[0]].file.name} in {folder} both hold "
                f"{doubled[0]}: shards of two models are mixed; copy the model again"
            )
        tensors.update(entries)
    _require_listed(folder, tensors, shard_of)
    return CheckpointIndex(folder, kind, files, tensors, {})


def _require_listed(
    folder: Path, tensors: Mapping[str, TensorEntry], shard_of: Mapping[str, Path]
) -> None:
    """The index must not promise tensors that its shards do not hold."""
    absent = [name for name, path in shard_of.items() if _held_elsewhere(tensors.get(name), path)]
    if absent:
        raise CheckpointError(
            f"the index of {folder} places {len(absent)} tensors in files that do not hold them, "
            f"first {absent[0]} in {shard_of[absent[0]].name}: index and shards are of different "
            "models or versions; copy them again"
        )


def _held_elsewhere(entry: TensorEntry | None, path: Path) -> bool:
    return entry is None or entry.file != path


def _read_listing(folder: Path, listing: Path) -> dict[str, Path]:
    """Tensor name -> shard from an index file; every shard must be there."""
    weight_map = read_json_object(listing).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{listing} has no weight_map: the index is broken; copy it again")
    strange = [shard for shard in weight_map.values() if not _is_file_name(shard)]
    if strange:
        shown = reprlib.repr(strange[0])
        raise CheckpointError(f"{listing} names {shown} as a shard: expected a file name")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.isfile(folder / shard)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {len(shards)} weight files that {listing.name} lists are not "
            f"in {folder}: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}; the model "
            "was copied in part: copy the missing files"
        )
    return {name: folder / shard for name, shard in weight_map.items()}


def _is_file_name(shard: object) -> bool:
    return (
        isinstance(shard, str)
        and 0 < len(shard) <= _MAX_NAME
        and shard.isprintable()  # not half a surrogate pair, no NUL
        and len(shard.encode()) <= _MAX_NAME
        and Path(shard).name == shard
    )


def _require_whole_archive(path: Path) -> None:
    """Raises CheckpointError unless `path` is a complete zip, or the older format of torch < 1.6.

    The older format (a bare pickle) has no directory; whether it is whole shows at loading.
    """
    require_content(path)
    with path.open("rb") as file:
        start = file.read(len(_ZIP_MAGIC))
    if start != _ZIP_MAGIC:
        return
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            items = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"{path} is cut off: it has {size:,} bytes and the directory that stands at the end of "
            "every .bin file is missing; copy the file again"
        ) from error
    except (NotImplementedError, ValueError, struct.error) as error:  # zipfile's, for odd entries
        raise CheckpointError(
            f"{path} is broken: its directory cannot be read ({error}); copy it again"
        ) from error
    if any(item.compress_type != zipfile.ZIP_STORED for item in items):
        raise CheckpointError(
            f"{path} is compressed, as torch does not save it: the file was packed anew; unpack it "
            "with the program that packed it, or copy the original"
        )
    end = max((item.header_offset + item.compress_size for item in items), default=0)
    if end == 0 or end > size:
        raise CheckpointError(f"{path} is broken: its directory does not fit it; copy it again")


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in the order in which they lie in it."""
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
    dtype, item_bytes = SAFETENSORS_DTYPES.get(described["dtype"], (str(described["dtype"]), None))
    if item_bytes is not None and math.prod(shape) * item_bytes != end - begin:
        raise ValueError(f"{end - begin} bytes for {shape} of {dtype}")
    return TensorEntry(path, dtype, shape, base + begin, end - begin)


def _no_weights(folder: Path) -> str:
    """What is in the folder instead of weights, and what that means."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    wanted = "model.safetensors, pytorch_model.bin, or shards with their .index.json"
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    if shards:
        suffix = "safetensors" if shards[0].string.endswith("safetensors") else "bin"
        return (
            f"{folder} holds {len(shards)} of {int(shards[0]['total'])} shards but not "
            f"{shards[0]['stem']}.{suffix}.index.json, which says what is in them: copy it too"
        )
    if any(name.startswith("adapter_model.") for name in names):
        return (
            f"{folder} holds a LoRA adapter, not a model: merge it into its base model and save "
            "that first"
        )
    other = [n for n in names if n.endswith((".gguf", ".h5", ".msgpack", ".pth", ".ot", ".npz"))]
    if other:
        return (
            f"{folder} holds weights in a format that is not read ({other[0]}): {wanted} are needed"
        )
    return f"{folder} has no weights: {wanted} are needed; was the model copied in part?"
