"""How fast bytes come to a rank's device from where they are offloaded, and how fast it computes.

Estimates for the plan, each with its source; the summary of a run shows what was measured. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpipipe.planning.cost import Ceilings
from mpipipe.planning.gpu_table import GpuTable, known_gpus
from mpipipe.planning.roofline import ceilings_of
from mpipipe.topology.gpu import GpuFacts

__all__ = ["DISK_BYTES_PER_S", "LinkRates", "compute_ceilings", "link_rates"]

# A solid-state disk of a node at the least, where none was measured.
DISK_BYTES_PER_S = 1e9
# Reads of one row from a file, e.g. of an embedding, one after the other.
_DISK_READS_PER_S = 10_000.0
# What copies from pinned memory reach of the raw rate of a link. Measured: H100, generation 5 of
# 16 lanes, 55 GB/s; a T4, generation 3 of 16 lanes, 11 to 12 GB/s.
_LINK_SHARE = 0.87
_LINK_SHARE_GEN3 = 0.75
# Bytes per second of one lane, by generation.
_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.56e9}
_UNKNOWN_LINK_BYTES_PER_S = 11e9  # generation 3, 16 lanes: the least that GPUs for this work have
_COPY_BYTES_PER_S = 8e9  # from RAM to RAM by one core; a disk's page cache is read so


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Bytes per second at which weights come to one rank's device."""

    host_bytes_per_s: float  # from pinned host memory; on a CPU, whose RAM is the device: a copy
    disk_bytes_per_s: float
    disk_reads_per_s: float = _DISK_READS_PER_S
    link_source: str = ""  # where the first comes from; empty: there is no link
    disk_source: str = f"disk {DISK_BYTES_PER_S / 1e9:.0f} GB/s (assumed)"

    def shared_by(self, num_links: int, num_disks: int) -> LinkRates:
        """Of one of `num_links` ranks on the same GPU, `num_disks` on the same disk."""
        return LinkRates(
            self.host_bytes_per_s / num_links,
            self.disk_bytes_per_s / num_disks,
            self.disk_reads_per_s / num_disks,
            self.link_source,
            self.disk_source,
        )


def link_rates(gpu: GpuFacts | None, disk_bytes_per_s: int = 0) -> LinkRates:
    """The rates of a rank.

    Args:
        gpu: its own; None: on a CPU.
        disk_bytes_per_s: of its disk, as measured; 0: not known.
    """
    rates = _link_rates(gpu)
    if not disk_bytes_per_s:
        return rates
    source = f"disk {disk_bytes_per_s / 1e9:.2g} GB/s (measured)"
    return replace(rates, disk_bytes_per_s=float(disk_bytes_per_s), disk_source=source)


def _link_rates(gpu: GpuFacts | None) -> LinkRates:
    if gpu is None:
        return LinkRates(_COPY_BYTES_PER_S, DISK_BYTES_PER_S)
    lane = _LANE_BYTES_PER_S.get(gpu.link_generation)
    if lane is None or not gpu.link_width:
        rate = _UNKNOWN_LINK_BYTES_PER_S
        link = f"link {rate / 1e9:.0f} GB/s (assumed: the driver does not tell it)"
    else:
        share = _LINK_SHARE_GEN3 if gpu.link_generation <= 3 else _LINK_SHARE
        rate = lane * gpu.link_width * share
        link = (
            f"link {rate / 1e9:.1f} GB/s (PCIe generation {gpu.link_generation}, "
            f"{gpu.link_width} lanes)"
        )
    return LinkRates(rate, DISK_BYTES_PER_S, link_source=link)


def compute_ceilings(
    gpu: GpuFacts | None, num_threads: int, table: GpuTable | None = None
) -> Ceilings:
    """What a rank's device computes at best; of an unknown GPU as a card of the next older kind.

    Args:
        gpu: of the rank; None: it computes on a CPU.
        num_threads: of a CPU.
        table: of GPUs; None: the known ones.
    """
    if gpu is None:
        found = ceilings_of("cpu", num_threads=num_threads)
        assert found is not None, "a CPU has ceilings"
        return found
    table = table or known_gpus()
    known = table.find(gpu.name)
    if known is not None:
        return known.ceilings
    alike = table.like(gpu.capability)
    source = f"assumed as a {alike.name}, since the table of GPUs has no {gpu.name or 'such card'}"
    return replace(alike.ceilings, source=source)
