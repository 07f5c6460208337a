"""A machine that is not here: GPUs, nodes and a link in words, and the ranks that it would have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpipipe.errors import ConfigError
from mpipipe.planning.gpu_table import GpuModel, GpuTable
from mpipipe.planning.link_table import BETWEEN_HOSTS, Link
from mpipipe.planning.resources import RankResources
from mpipipe.topology.gpu import GpuFacts

__all__ = ["DescribedMachine", "described_ranks", "parse_gpus", "rank_like"]

_GIB = 2**30
_PART = re.compile(r"(?:(\d+)\s*[x×*]\s*)?(.+?)(?:\s+[x×*]\s*(\d+))?", re.IGNORECASE)
_MOST_GPUS = 4096
# Of a node that nothing is known of: less than any that GPUs for this work are sold in.
_CORES_PER_RANK = 4
HOST_MEMORY_BYTES = 64 * _GIB
# Backends that installations have at these compute capabilities.
_TRITON = 75
_FLASH = 80


@dataclass(frozen=True, slots=True)
class DescribedMachine:
    """GPUs in the order of the ranks that use them, spread over the nodes in blocks."""

    gpus: tuple[GpuModel, ...]
    num_nodes: int = 1
    link: Link = BETWEEN_HOSTS  # between nodes; with one node, between its GPUs
    host_memory_bytes: int = HOST_MEMORY_BYTES  # of a node, free for the job

    @property
    def words(self) -> str:
        """E.g. "h100, 3 x t4 on 2 nodes"."""
        counted: list[tuple[str, int]] = []
        for gpu in self.gpus:
            if counted and counted[-1][0] == gpu.key:
                counted[-1] = (gpu.key, counted[-1][1] + 1)
            else:
                counted.append((gpu.key, 1))
        cards = ", ".join(f"{number} x {key}" if number > 1 else key for key, number in counted)
        nodes = f"{self.num_nodes} node{'s' * (self.num_nodes > 1)}"
        over = f" over {self.link.name}" if self.num_nodes > 1 else ""
        return f"{cards} on {nodes}{over}"


def parse_gpus(text: str, table: GpuTable) -> tuple[GpuModel, ...]:
    """From `2 x t4` or `h100, 3 x t4`.

    Raises:
        ConfigError: it has another form, or names a GPU that the table does not know.
    """
    gpus: list[GpuModel] = []
    for part in text.split(","):
        found = _PART.fullmatch(part.strip())
        number = int((found[1] or found[3] or 1) if found else 0)
        if found is None or not 1 <= number <= _MOST_GPUS - len(gpus):
            raise ConfigError(
                f'the GPUs {text!r} are not of the form "2 x t4" or "h100, 3 x t4", with counts '
                f"of 1 to {_MOST_GPUS}: {part.strip()!r} is the part that cannot be read"
            )
        gpus += [table.of_key(found[2])] * number
    return tuple(gpus)


def described_ranks(machine: DescribedMachine) -> list[RankResources]:
    """A rank per GPU.

    Raises:
        ConfigError: more nodes than GPUs.
    """
    number = len(machine.gpus)
    if machine.num_nodes > number:
        raise ConfigError(
            f"--nodes {machine.num_nodes}, but --gpus has {number}: every node needs a GPU"
        )
    nodes = [rank * machine.num_nodes // number for rank in range(number)]
    return [
        RankResources(
            rank=rank,
            host=f"node{node}",
            pid=rank,
            launcher="none",
            num_cores=_CORES_PER_RANK * nodes.count(node),
            memory_available_bytes=machine.host_memory_bytes,
            gpu=_facts(gpu, nodes[:rank].count(node), rank),
            attention_backends=_backends(gpu.capability),
        )
        for rank, (gpu, node) in enumerate(zip(machine.gpus, nodes, strict=True))
    ]


def rank_like(ranks: Sequence[RankResources]) -> RankResources:
    """One rank more, with a device like the last one's.

    A GPU on its host, unless every rank has a host of its own; else on a host like it.
    """
    last = ranks[-1]
    is_alone = len(ranks) > 1 and len({rank.host for rank in ranks}) == len(ranks)
    host = last.host if last.has_gpu and not is_alone else f"{last.host}+1"
    gpu = last.gpu
    if last.has_gpu:
        index = 0 if host != last.host else gpu.index + 1
        gpu = replace(gpu, index=index, uuid=f"{gpu.uuid}+1", pci="")
    return replace(last, rank=len(ranks), host=host, gpu=gpu)


def _facts(gpu: GpuModel, index: int, rank: int) -> GpuFacts:
    return GpuFacts(
        index=index,
        name=gpu.name,
        uuid=f"{gpu.key} of rank {rank}",
        capability=gpu.capability,
        memory_bytes=gpu.memory_bytes,
        free_bytes=gpu.free_bytes,
        nccl_version="(assumed)",
        link_generation=gpu.pcie[0],
        link_width=gpu.pcie[1],
    )


def _backends(capability: int) -> tuple[str, ...]:
    return ("triton",) * (capability >= _TRITON) + ("varlen", "flashinfer") * (capability >= _FLASH)
