"""How fast tensors travel between neighbouring stages: latency and bandwidth of every pair.

Measured over the tensor channel that a run would use, one pair after the other, so that no pair
disturbs another. Importing this loads torch. `checks.measured` says whether a figure is good,
`control_plane.probe` measures messages.

Invariants: all ranks take part and leave together, also when one fails. All pairs share about two
seconds: a slow or a numerous neighbourhood is measured with smaller tensors.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from mpipipe.config.schema import AUTO, PipelineConfig
from mpipipe.data_plane.channel import TensorChannel
from mpipipe.data_plane.probe import NUM_WARM_UP, LinkEnd, round_trip_s
from mpipipe.doctor.facts import LinkFigure
from mpipipe.doctor.probes.process import nccl_routes, recorded_nccl
from mpipipe.errors import DeadlineError, EnvironmentSetupError, MpipipeError
from mpipipe.plain_values import from_json, to_json
from mpipipe.planning.devices import choose_device, choose_transport
from mpipipe.planning.layout import stage_order as order_of_stages
from mpipipe.planning.resources import RankResources
from mpipipe.runtime.handshake import exchange_resources
from mpipipe.runtime.ranks import Ranks
from mpipipe.runtime.tensor_channel import Transport, open_transport
from mpipipe.topology.host import host_name
from mpipipe.types import DeviceName

__all__ = ["measure_links", "neighbours"]

T = TypeVar("T")

_BUDGET_S = 2.0  # for all pairs together, connecting apart
_MEET_S = 60.0
# Connecting NCCL takes 1 to 5 s; where a firewall is in the way it takes for ever.
_CONNECT_LIMIT_S = 30.0
_MEASURE_LIMIT_S = 30.0
_GRACE_S = 5.0  # between a limit and the one around it
_NUM_ROUND_TRIPS = 20
_PING_BYTES = 1024
# A round's hidden states of one sequence; of a few hundred; of a long prompt.
_SIZES_BYTES = (1 << 20, 8 << 20, 64 << 20)
_GROWTH = 8
_STOP = 0


def neighbours(order: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs that exchange tensors: along the stages; ids also go from the last to the first."""
    pairs = list(itertools.pairwise(order))
    if len(order) > 2:
        pairs.append((order[-1], order[0]))
    return pairs


async def measure_links(
    ranks: Ranks, *, device: DeviceName, stage_order: Sequence[int] | None = None
) -> list[LinkFigure] | None:
    """Measure every pair of neighbours; the figures on the head, None elsewhere. Collective.

    Args:
        ranks: joined, with nothing else going on.
        device: where the tensors are. `cuda` falls back to the CPU as a run with "auto" would.
        stage_order: ranks in the order of their stages; None: as a plan would lay them out.

    Raises:
        MpipipeError: on every rank: some rank could not connect, or hung.
    """
    wanted = AUTO if device == "cuda" else device
    resources = await exchange_resources(ranks, wanted, deadline_s=_MEET_S)
    pairs = neighbours(stage_order if stage_order is not None else order_of_stages(resources))
    transport = _transport(device, resources)
    own_device = torch.device("cpu")
    if transport.device == "cuda":
        own_device = torch.device("cuda", resources[ranks.mesh.rank].gpu.index)
    with recorded_nccl() as log:
        figures = await _connect_and_measure(ranks, own_device, transport, pairs)
        routes = nccl_routes(log)
    told = [
        replace(figure, route=routes.get((figure.source, figure.target), "")) for figure in figures
    ]
    own = to_json(told).encode()
    parts = await ranks.mesh.gather("link figures", own, _MEET_S)
    if parts is None:
        return None
    found = [figure for part in parts for figure in from_json(list[LinkFigure], part)]
    return sorted(found, key=lambda figure: pairs.index((figure.source, figure.target)))


async def _connect_and_measure(
    ranks: Ranks, device: torch.device, transport: Transport, pairs: Sequence[tuple[int, int]]
) -> list[LinkFigure]:
    """The figures of the pairs that this rank is the source of."""
    if not pairs:
        return []
    # First, and agreed on: a rank without memory would leave its neighbours waiting.
    await _agreed(ranks, "links memory", _reserve(device), _CONNECT_LIMIT_S)
    limit_s = _CONNECT_LIMIT_S - _GRACE_S
    connecting = open_transport(transport, ranks, device, timeout_s=limit_s)
    channel = await _agreed(ranks, "links connected", connecting, _CONNECT_LIMIT_S)
    measuring = _measure(ranks, channel, device, transport, pairs)
    return await _agreed(ranks, "links", measuring, _MEASURE_LIMIT_S)


async def _agreed(ranks: Ranks, phase: str, work: Coroutine[None, None, T], limit_s: float) -> T:
    """Do `work` on this rank; all ranks go on together, or all fail."""
    result: list[T] = []
    error: MpipipeError | None = None
    try:
        async with asyncio.timeout(limit_s):
            result.append(await work)
    except MpipipeError as caught:
        error = caught
    except RuntimeError as caught:  # torch's, NCCL's and CUDA's
        error = EnvironmentSetupError(_device_problem(str(caught)))
    except TimeoutError:
        error = DeadlineError(
            f"tensors between rank {ranks.mesh.rank} on {host_name()} and its neighbours did not "
            f"pass within {limit_s:g} s; most likely the hosts cannot reach each other on the "
            "interface that NCCL or MPI has chosen: name it (NCCL_SOCKET_IFNAME; UCX_NET_DEVICES "
            "for MPICH, OMPI_MCA_btl_tcp_if_include for Open MPI)"
        )
    await ranks.mesh.agree(phase, error, limit_s + _GRACE_S)
    return result[0]


async def _reserve(device: torch.device) -> None:
    """Have the memory of the largest tensors once; torch keeps it for the measuring."""
    torch.zeros(_SIZES_BYTES[-1], dtype=torch.uint8, device=device)


def _device_problem(message: str) -> str:
    first_line = " ".join(message.strip().partition("\n")[0].split()) or "no reason given"
    what = f"tensors could not be sent from {host_name()} ({first_line})"
    if "out of memory" in message or "not enough memory" in message:
        return (
            f"{what}: end what else uses the memory of this GPU or host, or ask Slurm for GPUs of "
            "your own (--gpus-per-node=N, --exclusive)"
        )
    return f"{what}: see whether nvidia-smi shows errors there, and what NCCL_DEBUG=INFO tells"


async def _measure(
    ranks: Ranks,
    channel: TensorChannel,
    device: torch.device,
    transport: Transport,
    pairs: Sequence[tuple[int, int]],
) -> list[LinkFigure]:
    """The figures of the pairs that this rank is the source of."""
    own = ranks.mesh.rank
    figures = []
    for number, (source, target) in enumerate(pairs):
        await ranks.mesh.barrier(f"link {number}", _MEASURE_LIMIT_S)
        if own == source:
            latency_s, bytes_per_s = await _ask(
                LinkEnd(channel, device, target), _BUDGET_S / len(pairs)
            )
            figures.append(
                LinkFigure(
                    source,
                    target,
                    transport.hosts[source],
                    transport.hosts[target],
                    transport=_label(transport),
                    latency_us=round(latency_s * 1e6, 2),
                    bandwidth_gb_s=round(bytes_per_s / 1e9, 4),
                )
            )
        elif own == target:
            await _answer(LinkEnd(channel, device, source))
    await ranks.mesh.barrier("links", _MEASURE_LIMIT_S)
    await channel.aclose()
    return figures


def _transport(device: DeviceName, resources: Sequence[RankResources]) -> Transport:
    """That of a run with these ranks and the settings left at `auto`."""
    asked = PipelineConfig(device=AUTO if device == "cuda" else "cpu", share_gpus=True)
    where = choose_device(asked, resources)[0]
    name = choose_transport(AUTO, where, resources)[0]
    hosts = tuple(rank_resources.host for rank_resources in resources)
    return Transport(name, where, hosts, tuple(range(len(hosts))))


def _label(transport: Transport) -> str:
    """For people: GPU tensors over MPI take a detour."""
    through_host = (transport.name, transport.device) == ("mpi", "cuda")
    return "mpi through host memory" if through_host else transport.name


# ---- one pair ------------------------------------------------------------------------------------


async def _ask(end: LinkEnd, budget_s: float) -> tuple[float, float]:
    """Median one-way seconds of 1 KiB, and the best bytes per second. The source's part."""
    limit_s = time.perf_counter() + budget_s
    ping = end.tensor(_PING_BYTES)
    times_s = [await round_trip_s(end, ping, ping) for _ in range(NUM_WARM_UP + _NUM_ROUND_TRIPS)]
    latency_s = statistics.median(times_s[NUM_WARM_UP:]) / 2
    best_per_s = 0.0
    for num_bytes in _SIZES_BYTES:
        await end.send(torch.tensor([num_bytes], device=end.device))
        load, receipt = end.tensor(num_bytes), end.tensor(1)
        await round_trip_s(end, load, receipt)  # memory is pinned or touched for the first time
        taken_s = max(await round_trip_s(end, load, receipt) - latency_s, 1e-9)
        best_per_s = max(best_per_s, num_bytes / taken_s)
        if 2 * _GROWTH * taken_s > limit_s - time.perf_counter():
            break
    await end.send(torch.tensor([_STOP], device=end.device))
    await end.settle()
    return latency_s, best_per_s


async def _answer(end: LinkEnd) -> None:
    """The target's part of `_ask`."""
    ping = end.tensor(_PING_BYTES)
    for _ in range(NUM_WARM_UP + _NUM_ROUND_TRIPS):
        await end.receive(ping)
        await end.send(ping)
    receipt, size = end.tensor(1), torch.zeros(1, dtype=torch.int64, device=end.device)
    while True:
        await end.receive(size)
        await end.settle()
        if not (num_bytes := int(size.item())):
            return
        load = end.tensor(num_bytes)
        for _ in range(2):
            await end.receive(load)
            await end.send(receipt)
