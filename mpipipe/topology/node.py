"""What a node is made of, for the record of a run: processor, memory, kernel, GPUs, container.

Plain values that travel as JSON. Nothing is decided by them: `planning.resources` is what planning
reads. Readers take the root folder and the environment, for tests. Linux only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpipipe.topology.gpu import container_kind
from mpipipe.topology.host import host_name, read_text
from mpipipe.topology.nvml import opened_nvml

__all__ = ["NodeGpu", "NodeRecord", "cpu_model", "read_node"]

_ROOT = Path("/")
# What /proc/cpuinfo calls the processor, by architecture: x86, POWER, some Arm boards.
_MODEL_KEYS = ("model name", "cpu", "Model")


@dataclass(frozen=True, slots=True)
class NodeGpu:
    """One GPU of a node."""

    name: str
    memory_bytes: int
    driver: str  # version, e.g. "550.54.15"
    uuid: str


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One node, whole: not only what a job may use of it."""

    host: str
    cpu_model: str  # empty: not told
    num_cores: int  # as the kernel counts them, hyper-threads each
    memory_bytes: int
    kernel: str  # release
    gpus: tuple[NodeGpu, ...]  # as NVML tells; empty without it
    container: str  # "apptainer", "docker", or empty: none


def read_node(environ: Mapping[str, str] = os.environ, root: Path = _ROOT) -> NodeRecord:
    """This node now: some files of the kernel, and NVML; milliseconds with a driver that runs."""
    return NodeRecord(
        host=host_name(),
        cpu_model=cpu_model(root),
        num_cores=os.cpu_count() or 1,
        memory_bytes=_memory_bytes(read_text(root / "proc/meminfo")),
        kernel=os.uname().release,
        gpus=_gpus(),
        container=container_kind(environ, root),
    )


def cpu_model(root: Path = _ROOT) -> str:
    """The processor's name as the kernel tells it; empty where it does not."""
    cpuinfo = read_text(root / "proc/cpuinfo")
    found: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    model = next((found[key] for key in _MODEL_KEYS if found.get(key)), "")
    if model or "CPU part" not in found:
        return model
    return f"Arm implementer {found.get('CPU implementer', '?')} part {found['CPU part']}"


def _memory_bytes(meminfo: str) -> int:
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal" and value.split():
            return int(value.split()[0]) * 1024
    return 0


def _gpus() -> tuple[NodeGpu, ...]:
    with opened_nvml() as nvml:
        if nvml is None:
            return ()
        driver = nvml.driver_version()
        return tuple(NodeGpu(gpu.name, gpu.memory_bytes, driver, gpu.uuid) for gpu in nvml.gpus())
