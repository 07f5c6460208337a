"""Weights that a checkpoint holds in 8 bits already: found under the names of plain ones.

`QuantizedSource` shows a quantised weight as "….weight", whatever its parts are called, and keeps
their companions to itself. `Unpacking` says how it lies in its file, and brings it to int8 or
float8_e4m3fn [O, I] with a float32 scale [O].
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch

from mpipipe.checkpoint.quantization import Packing, StoredQuantization
from mpipipe.weights.sources import StoredTensor, TensorSource

__all__ = ["QuantizedSource", "Unpacking"]

_IN_A_NUMBER = 4  # weights in an int32


@dataclass(frozen=True, slots=True)
class Unpacking:
    """From a tensor of the file to one of the module."""

    packing: Packing | None  # None: it is a scale

    def shape(self, shape: tuple[int, ...], stored: tuple[int, ...]) -> tuple[int, ...]:
        """What a tensor that becomes one of `shape` must be in the file, where it is `stored`."""
        if self.packing is None:
            (num_out,) = shape
            allowed = [(num_out, 1), (1, num_out), (num_out,), (1,), (1, 1), ()]
            return stored if stored in allowed else allowed[0]
        num_out, num_in = shape
        if self.packing == "rows":
            return num_out, -(-num_in // _IN_A_NUMBER)
        return (-(-num_in // _IN_A_NUMBER), num_out) if self.packing == "columns" else shape

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What it is read as."""
        return torch.int32 if self.packing in ("rows", "columns") else dtype

    def unpack(self, stored: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The tensor of `shape`."""
        if self.packing is None:
            return stored.reshape(-1).expand(shape).contiguous()
        if self.packing == "none":
            return stored
        if self.packing == "columns":
            stored = stored.t().contiguous()
        # Each byte is a weight + 128: that is the weight with its highest bit turned.
        assert sys.byteorder == "little", "the first of four weights is in the lowest byte"
        bytes_OI = stored.view(torch.uint8)[:, : shape[1]]
        return bytes_OI.bitwise_xor(128).contiguous().view(torch.int8)


class QuantizedSource:
    """A `TensorSource` over another one."""

    def __init__(self, source: TensorSource, quantization: StoredQuantization) -> None:
        self._source = source
        self.quantization = quantization

    @cached_property
    def _weights(self) -> dict[str, str]:
        """By the name "….weight": that of the quantised weight in the file."""
        names, found = set(self._source.names()), {}
        end = f".{self.quantization.weight}"
        for name in names:
            stem = name.removesuffix(end)
            if stem != name and f"{stem}.{self.quantization.scale}" in names:
                found[f"{stem}.weight"] = name
        return found

    def names(self) -> Collection[str]:
        """All tensors, the companions of quantised weights apart."""
        kept = self.quantization
        hidden = {
            f"{weight.removesuffix('.weight')}.{leaf}"
            for weight in self._weights
            for leaf in (kept.weight, kept.scale, *kept.companions)
        }
        return (set(self._source.names()) - hidden) | self._weights.keys()

    def scale_of(self, name: str) -> str | None:
        """The scale of the weight called `name`; None: it is not quantised."""
        if name not in self._weights:
            return None
        return f"{name.removesuffix('.weight')}.{self.quantization.scale}"

    def stored(self, name: str) -> StoredTensor:
        """Of a quantised weight as it lies in its file."""
        return self._source.stored(self._weights.get(name, name))

    def unpickled(self, name: str) -> torch.Tensor:
        """See `TensorSource`."""
        return self._source.unpickled(self._weights.get(name, name))

    def close(self) -> None:
        """See `TensorSource`."""
        self._source.close()
