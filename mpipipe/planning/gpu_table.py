"""The table of known GPUs: what published figures and our measurements say of a card.

`gpu_table.toml` beside this file holds it; a file of the same form may add and change cards. Floors
(`roofline`), offload (`links`) and forecasts (`rate_times`) take their rates from here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mpipipe.config.files import parse_table, read_text
from mpipipe.errors import ConfigError
from mpipipe.plain_values import from_plain
from mpipipe.planning.cost import Ceilings

__all__ = ["GpuModel", "GpuTable", "known_gpus", "read_gpu_table"]

_FILE = Path(__file__).with_name("gpu_table.toml")
_MIB = 2**20
# Of a card that nothing else uses: what the driver keeps for itself.
_DRIVER_BYTES = 512 * _MIB


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A kind of card. Rates are published ones; `ceilings` is what is reached of them."""

    key: str  # what `--gpus` calls it
    names: tuple[str, ...]  # each: words that all occur in the driver's name
    capability: int  # compute capability × 10
    memory_mib: int
    memory_gb_per_s: float  # 1e9 bytes
    fp16: float  # 1e12 operations per second, dense; 0: not in hardware
    bf16: float
    int8: float
    fp8: float
    copy_share: float  # of the bandwidth, that large copies reach
    product_share: float  # of the 16-bit rate, that large matrix products sustain
    pcie: tuple[int, int]  # generation, lanes
    nvlink_gb_per_s: float  # one direction; 0: none
    watts: float
    source: str  # of the published figures
    measured: str = ""  # where the two shares come from; empty: assumed

    @property
    def name(self) -> str:
        """The longest of its names."""
        return max(self.names, key=len)

    @property
    def memory_bytes(self) -> int:
        """As the driver reports it."""
        return self.memory_mib * _MIB

    @property
    def free_bytes(self) -> int:
        """Of a card that nothing else uses."""
        return self.memory_bytes - _DRIVER_BYTES

    @property
    def ceilings(self) -> Ceilings:
        """Large copies and large 16-bit products; `source` says whether they were measured."""
        flops = self.bf16 or self.fp16
        bytes_per_s = self.memory_gb_per_s * 1e9 * self.copy_share
        flops_per_s = flops * 1e12 * self.product_share
        if self.measured:
            return Ceilings(bytes_per_s, flops_per_s, f"measured: {self.measured}")
        reached = (
            f"published, {self.copy_share:.0%} of {self.memory_gb_per_s:,.0f} GB/s and "
            f"{self.product_share:.0%} of {flops:,.4g} TFLOP/s assumed: {self.source}"
        )
        return Ceilings(bytes_per_s, flops_per_s, reached)


@dataclass(frozen=True, slots=True)
class GpuTable:
    """Cards by key."""

    gpus: Mapping[str, GpuModel]

    def of_key(self, key: str) -> GpuModel:
        """The card that `--gpus` calls `key`; case and spaces do not matter.

        Raises:
            ConfigError: there is no such card; lists those that there are.
        """
        asked = _plain(key)
        for known, gpu in self.gpus.items():
            if _plain(known) == asked:
                return gpu
        found = self.find(key)
        if found is not None:
            return found
        raise ConfigError(
            f"there is no GPU {key!r} in the table: it knows {', '.join(self.gpus)}; name one of "
            "them, or describe yours in a file of the form of mpipipe/planning/gpu_table.toml "
            "(--gpu-table FILE)"
        )

    def find(self, driver_name: str) -> GpuModel | None:
        """The card with this name; None: it is not in the table."""
        words = _words(driver_name)
        fitting = [
            (len(_words(name)), gpu)
            for gpu in self.gpus.values()
            for name in gpu.names
            if _words(name) <= words
        ]
        return max(fitting, key=lambda pair: pair[0])[1] if fitting else None

    def like(self, capability: int) -> GpuModel:
        """The slowest memory of the newest generation that is no newer: for unknown cards."""
        older = [gpu for gpu in self.gpus.values() if gpu.capability <= capability]
        newest = max((gpu.capability for gpu in older), default=0)
        alike = [gpu for gpu in older if gpu.capability == newest] or list(self.gpus.values())
        return min(alike, key=lambda gpu: gpu.memory_gb_per_s)


@functools.cache
def known_gpus() -> GpuTable:
    """The table that mpipipe comes with."""
    return _table(parse_table(_FILE.read_text(), _FILE), _FILE, {})


def read_gpu_table(path: Path) -> GpuTable:
    """The known cards, with those of a file added; its keys replace those of a known card.

    Raises:
        ConfigError: no such file, not TOML, or a key that is missing, unknown or of another kind.
    """
    text = read_text(path, "table of GPUs")
    return _table(parse_table(text, path), path, known_gpus().gpus)


def _table(parsed: Mapping[str, Any], path: Path, known: Mapping[str, GpuModel]) -> GpuTable:
    entries = parsed.get("gpus")
    if not isinstance(entries, dict) or set(parsed) != {"gpus"}:
        raise ConfigError(f"{path}: expected tables [gpus.NAME] and nothing else")
    gpus = dict(known)
    for key, entry in entries.items():
        gpus[key] = _gpu(key, entry, path, known.get(key))
    return GpuTable(gpus)


def _gpu(key: str, entry: Any, path: Path, known: GpuModel | None) -> GpuModel:
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}: gpus.{key} is no table: write [gpus.{key}] and its keys below")
    base = {} if known is None else {f.name: getattr(known, f.name) for f in fields(known)}
    try:
        gpu = from_plain(GpuModel, {"names": [key], **base, **entry, "key": key})
    except ValueError as error:
        raise ConfigError(f"{path}: gpus.{key}: {error}") from None
    rates = (gpu.memory_mib, gpu.memory_gb_per_s, gpu.bf16 or gpu.fp16, gpu.capability)
    shares = (gpu.copy_share, gpu.product_share)
    if min(rates) <= 0 or not all(0 < share <= 1 for share in shares):
        raise ConfigError(
            f"{path}: gpus.{key}: memory_mib, memory_gb_per_s, capability and fp16 or bf16 must be "
            "above 0, copy_share and product_share above 0 and at most 1"
        )
    if known is not None and gpu.measured == known.measured and _was_measured(entry):
        return replace(gpu, measured="")  # its own figures take the place of ours
    return gpu


def _was_measured(entry: Mapping[str, Any]) -> bool:
    return not {"copy_share", "product_share", "memory_gb_per_s", "fp16", "bf16"}.isdisjoint(entry)


@functools.cache
def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower()))


def _plain(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "", key.lower())
