"""Which tensor goes into which safetensors file, and the header of such a file. Pure.

The header is written here and not by the safetensors library, which wants a whole file's tensors in
memory: a shard of 5 GB need not fit a login node. Format: 8 bytes of length, JSON, the tensors one
after the other (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpipipe.checkpoint.index import SAFETENSORS_DTYPES
from mpipipe.errors import UnsupportedModelError

__all__ = ["Shard", "TensorPlan", "index_of", "lay_out", "stored_dtype"]

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_ALIGNMENT = 8  # of the first tensor, as the library aligns it
_STEM, _SUFFIX = "model", ".safetensors"
INDEX_NAME = f"{_STEM}{_SUFFIX}.index.json"

_OF_TORCH = {torch: (name, item_bytes) for name, (torch, item_bytes) in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor as it will be stored."""

    name: str
    dtype: str  # torch's name
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _OF_TORCH[self.dtype][1]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights."""

    name: str
    tensors: tuple[TensorPlan, ...]

    @property
    def header(self) -> bytes:
        """All that stands in the file before the first tensor's bytes."""
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.num_bytes
            described[tensor.name] = {
                "dtype": _OF_TORCH[tensor.dtype][0],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


def stored_dtype(name: str, dtype: str, wanted: str | None) -> str:
    """The type in which tensor `name` of type `dtype` is stored; `wanted` None: its own.

    Integers stay what they are.

    Raises:
        UnsupportedModelError: safetensors files do not have the type.
    """
    if dtype not in _OF_TORCH:
        raise UnsupportedModelError(
            f"{name} is stored as {dtype}, which safetensors files do not hold: save the model in "
            f"one of {', '.join(sorted(_FLOATS))}"
        )
    return wanted if wanted is not None and dtype in _FLOATS else dtype


def lay_out(tensors: Sequence[TensorPlan], shard_bytes: int) -> tuple[Shard, ...]:
    """Fill files in the given order up to `shard_bytes` of tensors each.

    A tensor that is larger than that gets a file of its own.
    """
    groups: list[list[TensorPlan]] = []
    filled = 0
    for tensor in tensors:
        if not groups or filled + tensor.num_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.num_bytes
    if len(groups) == 1:
        return (Shard(f"{_STEM}{_SUFFIX}", _aligned(groups[0])),)
    return tuple(
        Shard(f"{_STEM}-{number:05d}-of-{len(groups):05d}{_SUFFIX}", _aligned(group))
        for number, group in enumerate(groups, start=1)
    )


def _aligned(tensors: Sequence[TensorPlan]) -> tuple[TensorPlan, ...]:
    """Wide types first, so that every tensor begins at a multiple of its own item size."""
    return tuple(sorted(tensors, key=lambda tensor: -_OF_TORCH[tensor.dtype][1]))


def index_of(shards: Sequence[Shard]) -> dict[str, bytes]:
    """The file that says which shard holds what, by its name; none for one file."""
    if len(shards) == 1:
        return {}
    placed = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    return {INDEX_NAME: (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()}
