"""The links between ranks that a plan can be made for, and what transfers reach on them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mpipipe.errors import ConfigError

__all__ = ["BETWEEN_HOSTS", "LINKS", "Link", "link_named"]


@dataclass(frozen=True, slots=True)
class Link:
    """A link in one direction."""

    name: str
    bytes_per_s: float  # that large messages reach
    latency_s: float  # of a small message
    source: str


# Large messages reach about 0.9 of the line rate of Ethernet up to 25 Gbit/s, less of a faster one
# through NCCL's sockets, 0.94 of InfiniBand's. Small ones take the latency of the stack, of a
# switch and of NCCL: 60 µs and more through TCP, under 20 through RDMA. Only NVLink was measured.
LINKS = {
    link.name.lower(): link
    for link in (
        Link("1GbE", 0.112e9, 120e-6, "1 Gbit/s over TCP, 0.9 of the line assumed"),
        Link("10GbE", 1.12e9, 80e-6, "10 Gbit/s over TCP, 0.9 of the line assumed"),
        Link("25GbE", 2.8e9, 70e-6, "25 Gbit/s over TCP, 0.9 of the line assumed"),
        Link("100GbE", 8e9, 60e-6, "100 Gbit/s through sockets, 0.64 of the line assumed"),
        Link("HDR", 23.5e9, 18e-6, "InfiniBand HDR, 200 Gbit/s, 0.94 of the line assumed"),
        Link("NDR", 47e9, 18e-6, "InfiniBand NDR, 400 Gbit/s, 0.94 of the line assumed"),
        Link("PCIe3", 10e9, 25e-6, "PCI Express 3, 16 lanes, through host memory, assumed"),
        Link("PCIe4", 20e9, 25e-6, "PCI Express 4, 16 lanes, through host memory, assumed"),
        Link("PCIe5", 40e9, 25e-6, "PCI Express 5, 16 lanes, through host memory, assumed"),
        Link("NVLink", 180e9, 15e-6, "measured: 2 x H200, NCCL, 8 MiB 182 GB/s, small 14 µs"),
        Link("memory", 4e9, 60e-6, "MPI between processes of a host, as the runs on CPUs show"),
    )
}
BETWEEN_HOSTS = LINKS["10gbe"]  # where nothing is known of the network: what most clusters have


def link_named(name: str) -> Link:
    """The link that `--link` calls `name`; case does not matter.

    Raises:
        ConfigError: there is no such link; lists those that there are.
    """
    found = LINKS.get(name.strip().lower())
    if found is None:
        names = ", ".join(link.name for link in LINKS.values() if link.name != "memory")
        raise ConfigError(f"there is no link {name!r}: --link takes one of {names}")
    return found
