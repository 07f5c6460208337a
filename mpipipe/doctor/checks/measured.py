"""Checks what was measured between the ranks: messages, clocks, links. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from mpipipe.control_plane.probe import ControlProbe
from mpipipe.doctor.facts import LinkFigure
from mpipipe.doctor.finding import Finding, ok, warning
from mpipipe.runtime.clock_offsets import ClockOffsets

__all__ = ["check_clocks", "check_control", "check_links"]

_SLOW_ROUND_TRIP_US = 1000.0  # 20 µs measured over shared memory on two cores; TCP adds tens
_BUSY_IDLE = 0.10  # of a core; 0.02 is the aim
_CLOCK_APART_S = 1.0
_SLOW_GB_S = 0.1  # gigabit Ethernet: a prompt of 2,000 tokens of a 3B model takes 0.13 s a hop
_SLOW_LATENCY_US = 2000.0
_OUTLIER = 3.0


def check_control(probe: ControlProbe) -> list[Finding]:
    """Awaited messages, and what waiting costs."""
    trip = probe.round_trips[0]
    raw = "" if trip.raw_p50_us is None else f" (plain MPI {trip.raw_p50_us:.0f} µs)"
    what = (
        f"round trip of a message {trip.p50_us:.0f} µs, 95 % within {trip.p95_us:.0f} µs{raw}, "
        f"{probe.one_way_per_s:,.0f} messages/s"
    )
    values = {"round_trip_p50_us": trip.p50_us, "round_trip_p95_us": trip.p95_us}
    first = ok("links.messages", what, **values)
    if trip.p50_us > _SLOW_ROUND_TRIP_US:
        cause = "the ranks wait for each other's cores: more ranks than cores, or a busy host"
        remedy = "give every rank cores of its own (srun --cpus-per-task), end other programs"
        if trip.raw_p50_us is not None and trip.raw_p50_us > _SLOW_ROUND_TRIP_US / 4:
            cause = "the network between the hosts is slow, or MPI does not use the fast one"
            remedy = "choose the interface (UCX_NET_DEVICES, OMPI_MCA_btl_tcp_if_include)"
        first = warning("links.messages", what, cause, remedy, **values)
    busiest = max(probe.idle_shares)
    text = f"an idle rank uses {busiest * 100:.1f} % of a core"
    if busiest <= _BUSY_IDLE:
        return [first, ok("links.idle", text, idle_share=busiest)]
    cause = "another thread of this process spins: often MPI's or OpenMP's own"
    remedy = "set OMP_WAIT_POLICY=passive; with Open MPI OMPI_MCA_mpi_yield_when_idle=1"
    return [first, warning("links.idle", text, cause, remedy, idle_share=busiest)]


def check_clocks(offsets: ClockOffsets, host_of: Mapping[int, str]) -> list[Finding]:
    """Wall clocks of the hosts, compared with the head's; nothing for a single host."""
    per_host: dict[str, float] = {}
    for rank, ahead_s in offsets.ahead_s.items():
        per_host.setdefault(host_of[rank], ahead_s)
    if len(per_host) < 2:
        return []
    host, ahead_s = max(per_host.items(), key=lambda item: abs(item[1]))
    way = "ahead of" if ahead_s > 0 else "behind"
    head = next(iter(per_host))
    what = (
        f"the clock of {host} is {abs(ahead_s) * 1e3:.1f} ms {way} that of {head} "
        f"(± {offsets.error_s * 1e3:.1f} ms)"
    )
    values = {"clock_offset_s": ahead_s, "clock_error_s": offsets.error_s}
    if abs(ahead_s) - offsets.error_s < _CLOCK_APART_S:
        return [ok("links.clocks", what, **values)]
    cause = "the hosts do not follow one time server"
    remedy = (
        "tell the site; until then lines of different ranks' logs cannot be put in order. "
        "mpipipe's own timelines are not affected"
    )
    return [warning("links.clocks", what, cause, remedy, **values)]


def check_links(links: Sequence[LinkFigure], *, infiniband: bool = False) -> list[Finding]:
    """Every edge between neighbouring stages; one that is far slower than its like stands out.

    `infiniband`: every host has it.
    """
    findings = []
    for link in links:
        what = (
            f"rank {link.source} on {link.source_host} → rank {link.target} on "
            f"{link.target_host}: {link.transport}{f' via {link.route}' if link.route else ''}, "
            f"{link.latency_us:.0f} µs, {link.bandwidth_gb_s:.2f} GB/s"
        )
        values = {"latency_us": link.latency_us, "bandwidth_gb_s": link.bandwidth_gb_s}
        cause = _slow_link(link, links) or _odd_route(link, infiniband)
        if not cause:
            findings.append(ok("links.edge", what, **values))
            continue
        remedy = (
            "set NCCL_SOCKET_IFNAME or NCCL_IB_HCA to the fast interface; NCCL_DEBUG=INFO tells "
            "what NCCL saw"
            if link.transport == "nccl"
            else "choose the interface: UCX_NET_DEVICES (MPICH), OMPI_MCA_btl_tcp_if_include"
        )
        findings.append(warning("links.edge", what, cause, remedy, **values))
    return findings


def _slow_link(link: LinkFigure, links: Sequence[LinkFigure]) -> str:
    """Why the figures are bad; empty: they are not."""
    like = [other.bandwidth_gb_s for other in links if _kind(other) == _kind(link)]
    typical = statistics.median(like)
    if link.bandwidth_gb_s * _OUTLIER < typical:
        return f"others of its kind reach {typical:.2f} GB/s: a bad cable or port, or a busy node"
    if link.bandwidth_gb_s < _SLOW_GB_S or link.latency_us > _SLOW_LATENCY_US:
        return "a slow network, or the fast one is not used"
    return ""


def _odd_route(link: LinkFigure, infiniband: bool) -> str:
    """Why NCCL should have taken another route; empty: it should not."""
    if not link.route.startswith("NET/"):
        return ""
    if link.source_host == link.target_host:
        return "NCCL uses the network inside one host: /dev/shm or access between GPUs is off"
    if infiniband and link.route.startswith("NET/Socket"):
        return "the hosts have InfiniBand, but NCCL did not find it (no libibverbs in the image?)"
    return ""


def _kind(link: LinkFigure) -> tuple[str, bool]:
    return link.transport, link.source_host == link.target_host
