"""Where the tensors of weight files lie: file, offset, length, type and shape of each.

One interface over safetensors and `.bin`; `loader` decides what to read, `filling` reads it.

A zip-stored `.bin` is a plain file too: torch's restricted unpickler tells types, shapes and the
offsets of the storages without reading one (`map_location="meta"`). What has no plain extent is
read by torch: files of torch < 1.6, tensors that are not contiguous, another byte order. Such a zip
file is mapped, and a mapped page counts as the process's memory for as long as the file is mapped:
the map is renewed every `REMAP_BYTES`.

Invariants: nothing of a file stays mapped or open after `close`.
"""

from __future__ import annotations

import pickle
import struct
import sys
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mpipipe.checkpoint.index import CheckpointIndex, TensorEntry
from mpipipe.errors import CheckpointError
from mpipipe.weights.readers import Extent

__all__ = ["SafetensorsSource", "StoredTensor", "TensorSource", "TorchSource", "open_source"]

_HEADER_BYTES = 30  # of a record in a zip archive; at its end:
_LENGTHS = struct.Struct("<HH")  # of the name and of what else follows the header
REMAP_BYTES = 128 << 20  # renewing costs about 10 ms; 128 MiB is read in about 100 ms


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a checkpoint says of one tensor."""

    dtype: str  # torch's name; any other string is a type that torch does not have
    shape: tuple[int, ...]
    order: tuple[int, int]  # file, then place in it: reading in this order is sequential
    extent: Extent | None  # its bytes, as they are in memory; None: `unpickled` reads it


class TensorSource(Protocol):
    """The tensors of one checkpoint."""

    def names(self) -> Collection[str]:
        """All tensor names."""

    def stored(self, name: str) -> StoredTensor:
        """Type, shape and place of `name`; reads no tensor bytes."""

    def unpickled(self, name: str) -> torch.Tensor:
        """The tensor, where it has no extent; valid until the next call."""

    def close(self) -> None:
        """Let go of the files."""


def open_source(index: CheckpointIndex) -> TensorSource:
    """The source that reads `index.format`."""
    return SafetensorsSource(index) if index.format == "safetensors" else TorchSource(index)


class SafetensorsSource:
    """The offsets of the headers."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._tensors: Mapping[str, TensorEntry] = index.tensors
        self._file_order = {path: number for number, path in enumerate(index.files)}

    def names(self) -> Collection[str]:
        """All tensor names."""
        return self._tensors.keys()

    def stored(self, name: str) -> StoredTensor:
        """From the header."""
        entry = self._tensors[name]
        extent = Extent(entry.file, entry.offset, entry.num_bytes)
        order = (self._file_order[entry.file], entry.offset)
        return StoredTensor(entry.dtype, entry.shape, order, extent)

    def unpickled(self, name: str) -> torch.Tensor:
        """Never asked for."""
        raise AssertionError(f"{name} has an extent")

    def close(self) -> None:
        """Nothing is open."""


class TorchSource:
    """`torch.load` with `weights_only=True`: of what lies in a file, and of what only it reads."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._files = index.files
        self._shard_of = index.shard_of
        self._listed: dict[Path, dict[str, StoredTensor]] = {}
        self._path: Path | None = None  # of the one that is loaded
        self._tensors: Mapping[str, torch.Tensor] = {}
        self._bytes_mapped_in = 0

    def names(self) -> Collection[str]:
        """All tensor names; of a single file, from its directory of tensors."""
        return self._shard_of.keys() if self._shard_of else self._list(self._files[0]).keys()

    def stored(self, name: str) -> StoredTensor:
        """From the file's pickle, which lists types and shapes."""
        path = self._file_of(name)
        listed = self._list(path)
        if name not in listed:
            raise CheckpointError(
                f"the index places {name} in {path.name}, which does not hold it: index and shards "
                "are of different models or versions; copy them again"
            )
        return listed[name]

    def _list(self, path: Path) -> Mapping[str, StoredTensor]:
        if path not in self._listed:
            number = self._files.index(path)
            if zipfile.is_zipfile(path):
                self._listed[path] = _list_archive(path, number)
            else:
                self._listed[path] = _list_tensors(self._load(path), number)
        return self._listed[path]

    def unpickled(self, name: str) -> torch.Tensor:
        """Out of the mapped file, or the whole one in memory."""
        if self._bytes_mapped_in >= REMAP_BYTES:
            self.close()
        tensor = self._load(self._file_of(name))[name]
        self._bytes_mapped_in += tensor.numel() * tensor.element_size()
        return tensor

    def close(self) -> None:
        """Drop what is loaded."""
        self._tensors, self._path, self._bytes_mapped_in = {}, None, 0

    def _file_of(self, name: str) -> Path:
        return self._shard_of[name] if self._shard_of else self._files[0]

    def _load(self, path: Path) -> Mapping[str, torch.Tensor]:
        if path != self._path:
            self.close()
            self._tensors = _load_torch_file(path, "cpu")
            self._path = path
        return self._tensors


def _list_tensors(tensors: Mapping[str, torch.Tensor], file: int) -> dict[str, StoredTensor]:
    """Without extents, in the order of the pickle."""
    return {
        name: StoredTensor(_dtype_name(tensor), tuple(tensor.shape), (file, place), None)
        for place, (name, tensor) in enumerate(tensors.items())
    }


def _list_archive(path: Path, file: int) -> dict[str, StoredTensor]:
    """With extents, in the order in which the tensors lie in the file."""
    tensors = _load_torch_file(path, "meta")
    offsets = _storage_offsets(path)
    listed = {}
    for place, (name, tensor) in enumerate(tensors.items()):
        extent = _extent(path, tensor, offsets)
        order = (file, place if extent is None else extent.offset)
        listed[name] = StoredTensor(_dtype_name(tensor), tuple(tensor.shape), order, extent)
    return listed


def _extent(path: Path, tensor: torch.Tensor, offsets: Collection[int]) -> Extent | None:
    """The bytes of a tensor whose storage was not read; None where they are not plain."""
    begin: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None or begin not in offsets or not tensor.is_contiguous():
        return None
    item_bytes = tensor.element_size()
    first = begin + int(tensor.storage_offset()) * item_bytes
    return Extent(path, first, tensor.numel() * item_bytes)


def _storage_offsets(path: Path) -> frozenset[int]:
    """Where the records of an archive begin, by the headers in front of them.

    torch computes these places where it can, which fails for an archive that was packed anew. None
    of another byte order.
    """
    offsets = set()
    with zipfile.ZipFile(path) as archive, path.open("rb", buffering=0) as file:
        for item in archive.infolist():
            if (
                item.filename.endswith("/byteorder")
                and archive.read(item).decode() != sys.byteorder
            ):
                return frozenset()
            file.seek(item.header_offset + _HEADER_BYTES - _LENGTHS.size)
            lengths = _LENGTHS.unpack(file.read(_LENGTHS.size))
            offsets.add(item.header_offset + _HEADER_BYTES + sum(lengths))
    return frozenset(offsets)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _load_torch_file(path: Path, device: str) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file: on "meta" without their bytes, on "cpu" mapped.

    Files of torch < 1.6 cannot be mapped: they are read as a whole.
    """
    mapped = device == "cpu" and zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not read: it is damaged, or holds Python objects beside tensors, which "
            "could run code; save it again as safetensors where it comes from"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read ({first_line}): the file is damaged; copy it again"
        ) from error
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds no named tensors: it is not a model's weights as transformers writes "
            "them"
        )
    return tensors
