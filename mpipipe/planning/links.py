"""How fast bytes come to a rank's device from where they are offloaded, and how fast it computes.

Estimates for the plan, each with its source; the summary of a run shows what was measured. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpipipe.planning.cost import Ceilings
from mpipipe.planning.roofline import ceilings_of
from mpipipe.topology.gpu import GpuFacts

__all__ = ["DISK_BYTES_PER_S", "LinkRates", "compute_ceilings", "link_rates"]

# A solid-state disk of a node at the least; nothing measures it before a run.
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

# Of GPUs that we have not measured, from data sheets at what kernels reach: by compute capability.
_ASSUMED_GPUS = {
    70: Ceilings(0.75e12, 8e13, "assumed from the data sheet (Volta)"),
    75: Ceilings(0.25e12, 3e13, "assumed from the data sheet (Turing)"),
    80: Ceilings(1.4e12, 2.2e14, "assumed from the data sheet (A100)"),
    86: Ceilings(0.6e12, 7e13, "assumed from the data sheet (Ampere)"),
    89: Ceilings(0.6e12, 1e14, "assumed from the data sheet (Ada)"),
    90: Ceilings(3.0e12, 6e14, "assumed from the data sheet (Hopper)"),
}


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


def link_rates(gpu: GpuFacts | None) -> LinkRates:
    """The rates of a rank with this GPU; None: on a CPU."""
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


def compute_ceilings(gpu: GpuFacts | None, num_threads: int) -> Ceilings:
    """What a rank's device computes at best; of an unknown GPU as the next older kind."""
    if gpu is None:
        found = ceilings_of("cpu", num_threads=num_threads)
        assert found is not None, "a CPU has ceilings"
        return found
    measured = ceilings_of("cuda", gpu.name)
    if measured is not None:
        return measured
    known = [capability for capability in _ASSUMED_GPUS if capability <= gpu.capability]
    return _ASSUMED_GPUS[max(known, default=min(_ASSUMED_GPUS))]
