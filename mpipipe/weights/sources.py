"""Reading single tensors out of weight files into memory that the caller owns.

One interface over safetensors and `.bin`; `loader` decides what to read.

Invariants: the peak is the destination plus one tensor in its stored type; nothing of a file stays
mapped or open after `close`. safetensors are read with plain reads at known offsets, not mapped:
a mapped page counts as the process's memory for as long as the file is mapped, which would double
a stage's peak. `.bin` files can only be mapped, so the map is renewed every `REMAP_BYTES`.
"""

from __future__ import annotations

import pickle
import time
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch

from mpipipe.checkpoint.index import CheckpointIndex, TensorEntry
from mpipipe.errors import CheckpointError

__all__ = ["SafetensorsSource", "StoredTensor", "TensorSource", "TorchSource", "open_source"]

REMAP_BYTES = 128 << 20  # renewing costs about 10 ms; 128 MiB is read in about 100 ms


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a checkpoint says of one tensor."""

    dtype: str  # torch's name; any other string is a type that torch does not have
    shape: tuple[int, ...]
    order: tuple[int, int]  # file, then place in it: reading in this order is sequential


class TensorSource(Protocol):
    """The tensors of one checkpoint."""

    convert_s: float  # seconds that conversions, apart from reading, have taken so far

    def names(self) -> Collection[str]:
        """All tensor names."""

    def stored(self, name: str) -> StoredTensor:
        """Type, shape and place of `name`; reads no tensor bytes."""

    def read_into(self, name: str, out: torch.Tensor) -> int:
        """Fill `out` (same shape; any floating type, any device); returns the bytes read."""

    def close(self) -> None:
        """Let go of the files."""


def open_source(index: CheckpointIndex) -> TensorSource:
    """The source that reads `index.format`."""
    return SafetensorsSource(index) if index.format == "safetensors" else TorchSource(index)


class SafetensorsSource:
    """Plain reads at the offsets of the headers."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._tensors: Mapping[str, TensorEntry] = index.tensors
        self._file_order = {path: number for number, path in enumerate(index.files)}
        self._path: Path | None = None
        self._file: FileIO | None = None
        self.convert_s = 0.0

    def names(self) -> Collection[str]:
        """All tensor names."""
        return self._tensors.keys()

    def stored(self, name: str) -> StoredTensor:
        """From the header."""
        entry = self._tensors[name]
        return StoredTensor(entry.dtype, entry.shape, (self._file_order[entry.file], entry.offset))

    def read_into(self, name: str, out: torch.Tensor) -> int:
        """Straight into `out` where type and device allow, else through one temporary."""
        entry = self._tensors[name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        direct = out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
        target = out if direct else torch.empty(entry.shape, dtype=dtype)
        if entry.num_bytes:
            self._read(name, entry, target)
        if not direct:
            began_s = time.perf_counter()
            out.copy_(target)
            self.convert_s += time.perf_counter() - began_s
        return entry.num_bytes

    def _read(self, name: str, entry: TensorEntry, target: torch.Tensor) -> None:
        view = target.view(-1).view(torch.uint8).numpy().data
        try:
            file = self._open(entry.file)
            file.seek(entry.offset)
            read = 0
            while read < len(view) and (count := file.readinto(view[read:])):
                read += count
        except OSError as error:
            raise CheckpointError(
                f"{entry.file} cannot be read ({error}): is the disk well?"
            ) from (error)
        if read < len(view):
            raise CheckpointError(
                f"{entry.file} ended inside {name}: the file was shortened while it was read"
            )

    def _open(self, path: Path) -> FileIO:
        if self._file is None or path != self._path:
            self.close()
            self._file = FileIO(path)
            self._path = path
        return self._file

    def close(self) -> None:
        """Close the open file."""
        if self._file is not None:
            self._file.close()
        self._file = self._path = None


class TorchSource:
    """`torch.load` with `weights_only=True`, memory-mapped, one file at a time."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._files = index.files
        self._shard_of = index.shard_of
        self._path: Path | None = None
        self._tensors: Mapping[str, torch.Tensor] = {}
        self._listed: dict[Path, dict[str, StoredTensor]] = {}  # kept when a file is let go of
        self._bytes_mapped_in = 0
        self.convert_s = 0.0

    def names(self) -> Collection[str]:
        """All tensor names; of a single file, from its directory of tensors."""
        return self._shard_of.keys() if self._shard_of else self._open(self._files[0]).keys()

    def stored(self, name: str) -> StoredTensor:
        """From the file's pickle, which lists types and shapes."""
        path = self._file_of(name)
        if path not in self._listed:
            self._listed[path] = _list_tensors(self._open(path), self._files.index(path))
        if name not in self._listed[path]:
            raise CheckpointError(
                f"the index places {name} in {path.name}, which does not hold it: index and shards "
                "are of different models or versions; copy them again"
            )
        return self._listed[path][name]

    def read_into(self, name: str, out: torch.Tensor) -> int:
        """Copy out of the mapped file."""
        tensor = self._open(self._file_of(name))[name]
        out.copy_(tensor)
        num_bytes = tensor.numel() * tensor.element_size()
        self._bytes_mapped_in += num_bytes
        if self._bytes_mapped_in >= REMAP_BYTES:
            del tensor
            self.close()
        return num_bytes

    def close(self) -> None:
        """Drop the map."""
        self._tensors, self._path, self._bytes_mapped_in = {}, None, 0

    def _file_of(self, name: str) -> Path:
        return self._shard_of[name] if self._shard_of else self._files[0]

    def _open(self, path: Path) -> Mapping[str, torch.Tensor]:
        if path != self._path:
            self.close()
            self._tensors = _load_torch_file(path)
            self._path = path
        return self._tensors


def _list_tensors(tensors: Mapping[str, torch.Tensor], file: int) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(
            str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), (file, place)
        )
        for place, (name, tensor) in enumerate(tensors.items())
    }


def _load_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, mapped; files of torch < 1.6 are read as a whole."""
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
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
