"""The NCCL groups of torch.distributed that `nccl` moves tensors in: making and leaving them.

Two of all ranks, one for each kind of edge, and one of the lanes of each stage that has several.

Everything here blocks until all ranks do the same, so it runs in a thread and the control plane
goes on meanwhile; in a daemon thread, because NCCL may never return where a rank or its network is
missing. Nothing of torch.distributed is left behind after `leave`.

The ranks find each other at the head's TCP store: the head takes a free port and broadcasts where
it listens over the control plane. A node may have several addresses, and other hosts may not reach
all of them (Debian maps a host's own name to 127.0.1.1), so the head names all it knows and every
rank takes the first that answers. `nccl` moves the tensors of a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import warnings
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import DistStoreError, ProcessGroup, Store, TCPStore

from mpipipe.data_plane.channel import EdgeKind
from mpipipe.data_plane.daemon_call import call_in_daemon
from mpipipe.data_plane.shared_buffer import SharedBuffer, open_shared_buffer
from mpipipe.errors import DeadlineError, EnvironmentSetupError
from mpipipe.plain_values import from_json, to_json

__all__ = [
    "LEAVE_LIMIT_S",
    "Broadcast",
    "NcclGroups",
    "Rendezvous",
    "addresses_of_this_host",
    "connect_groups",
    "first_line",
    "open_store",
]

_Made = tuple[dict[EdgeKind, ProcessGroup], ProcessGroup | None, SharedBuffer | None]

# The head's bytes on every rank; the others pass None.
Broadcast = Callable[[bytes | None], Awaitable[bytes]]

# After this NCCL's watchdog ends the process. A receive may be on the stream while the sender
# compiles its kernels, so it is far above any step; a rank that died is noticed by the launcher.
_TRANSFER_LIMIT_S = 1800.0
LEAVE_LIMIT_S = 30.0  # for all ranks to leave, from the first
_CLOSED_KEY = "mpipipe/closed"
_CLOSE_POLL_S = 1e-3
_LOOPBACK = "127.0.0.1"
_ANSWER_LIMIT_S = 5.0  # for one address; a firewall that drops packets never answers
# Any address off this host: connecting a UDP socket sends nothing but chooses the interface.
_OUTSIDE = ("10.255.255.255", 9)
_HINT = (
    "set NCCL_SOCKET_IFNAME to the interface that joins the hosts, see what NCCL_DEBUG=INFO "
    'prints, or set pipeline.transport = "mpi"'
)


@dataclass(frozen=True, slots=True)
class NcclGroups:
    """This rank's membership."""

    by_kind: dict[EdgeKind, ProcessGroup]
    lanes: ProcessGroup | None  # of this rank's stage; None: it has one
    shared: SharedBuffer | None  # of these lanes
    store: Store  # the head serves it until all have left
    rank: int
    world_size: int
    device: torch.device

    def leave(self) -> None:
        """Give the groups up, together with all other ranks.

        Raises:
            TimeoutError: (head) another rank did not leave within `LEAVE_LIMIT_S`.
        """
        torch.cuda.set_device(self.device)  # per thread
        self.by_kind.clear()
        dist.destroy_process_group()
        # The head's store serves the others' watchdogs: it goes last.
        num_left = self.store.add(_CLOSED_KEY, 1)
        limit_s = time.monotonic() + LEAVE_LIMIT_S
        while self.rank == 0 and num_left < self.world_size:
            if time.monotonic() >= limit_s:
                missing = self.world_size - num_left
                raise TimeoutError(f"{missing} of {self.world_size} ranks did not leave NCCL")
            time.sleep(_CLOSE_POLL_S)
            num_left = self.store.add(_CLOSED_KEY, 0)


async def connect_groups(
    broadcast: Broadcast,
    *,
    rank: int,
    hosts: Sequence[str],
    stage_ranks: Sequence[int],
    lane_groups: Sequence[Sequence[int]] = (),
    device_index: int,
    timeout_s: float,
) -> NcclGroups:
    """Connect all ranks, each with a GPU of its own. Collective.

    Args:
        broadcast: the head's bytes to all, over the control plane.
        rank: the own number; rank 0 is the head.
        hosts: the host of every rank, in order of rank.
        stage_ranks: the rank of every stage of this rank's pipeline, its head's first; of several
            that share a stage, those of this one's lane.
        lane_groups: the ranks of every stage that several share, of all pipelines.
        device_index: this rank's GPU.
        timeout_s: for all of it.

    Raises:
        EnvironmentSetupError: no NCCL, or it could not connect.
        DeadlineError: it took longer than `timeout_s`.
    """
    if not dist.is_nccl_available():
        raise EnvironmentSetupError(
            f"torch {torch.__version__} on {hosts[rank]} was built without NCCL: install one with "
            'NCCL, or set pipeline.transport = "mpi"'
        )
    device = torch.device("cuda", device_index)
    store = await open_store(broadcast, rank=rank, hosts=hosts, timeout_s=timeout_s)
    connecting = partial(_connect, store, rank, len(hosts), device, stage_ranks, lane_groups)
    try:
        async with asyncio.timeout(timeout_s):
            made = await call_in_daemon(connecting, "nccl-connect")
    except TimeoutError:
        raise DeadlineError(
            f"NCCL did not connect rank {rank} on {hosts[rank]} with {_others(rank, hosts)} within "
            f"{timeout_s:g} s: {_HINT}"
        ) from None
    except (dist.DistError, RuntimeError) as error:
        raise EnvironmentSetupError(
            f"NCCL could not connect rank {rank} on {hosts[rank]} with {_others(rank, hosts)} "
            f"({first_line(error)}): {_HINT}"
        ) from error
    return NcclGroups(*made, store, rank, len(hosts), device)


def _others(rank: int, hosts: Sequence[str]) -> str:
    others = [f"rank {other} on {host}" for other, host in enumerate(hosts) if other != rank]
    shown = ", ".join(others[:3])
    return shown if len(others) <= 3 else f"{shown} and {len(others) - 3} more"


def first_line(error: Exception) -> str:
    """What NCCL said, without its stack."""
    return str(error).strip().partition("\n")[0].rstrip(". ")


def _connect(  # noqa: PLR0917 - called in a thread, by position
    store: Store,
    rank: int,
    world_size: int,
    device: torch.device,
    stage_ranks: Sequence[int],
    lane_groups: Sequence[Sequence[int]],
) -> _Made:
    """Make all groups, and send a tensor over every edge of this rank's pipeline and lane.

    Blocks until all ranks do the same.
    """
    torch.cuda.set_device(device)  # per thread
    limit = timedelta(seconds=_TRANSFER_LIMIT_S)
    # Each group carries one kind in one order: serialising it is what is wanted, not a warning.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    # Non-blocking communicators, torch's default beside `device_id`, hand every transfer to a
    # thread and ask until it is through: 230 to 340 µs of the host's time each.
    os.environ.setdefault("TORCH_NCCL_USE_COMM_NONBLOCKING", "0")
    # With `device_id` communicators are made here and now, not by the first transfer.
    dist.init_process_group(
        "nccl",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device,
        timeout=limit,
    )
    world = dist.group.WORLD
    assert world is not None, "just made"
    ids = dist.new_group(backend="nccl", timeout=limit)
    groups = {EdgeKind.HIDDEN: world, EdgeKind.IDS: ids}
    with warnings.catch_warnings():
        # It says that transfers of a group queue behind each other: that is the stream order.
        warnings.filterwarnings("ignore", message=".*unbatched P2P")
        _exercise(groups, rank, stage_ranks, device)
    lanes = _connect_lanes(rank, lane_groups, limit)
    shared = None
    if lanes is not None:
        dist.all_reduce(torch.zeros(1, device=device), group=lanes)
        shared = open_shared_buffer(lanes, device)
        torch.cuda.synchronize(device)
    return groups, lanes, shared


def _connect_lanes(
    rank: int, lane_groups: Sequence[Sequence[int]], limit: timedelta
) -> ProcessGroup | None:
    """This rank's group; every rank makes all of them, in one order."""
    own: ProcessGroup | None = None
    for ranks in lane_groups:
        group = dist.new_group(list(ranks), backend="nccl", timeout=limit)
        own = group if rank in ranks else own
    return own


def _exercise(
    groups: dict[EdgeKind, ProcessGroup],
    rank: int,
    stage_ranks: Sequence[int],
    device: torch.device,
) -> None:
    """Once round the ring of one lane: hidden states forward, ids from the last to the first."""
    stage, head, last = stage_ranks.index(rank), stage_ranks[0], stage_ranks[-1]
    tensor = torch.zeros(1, device=device)
    if rank != head:
        groups[EdgeKind.HIDDEN].recv([tensor], stage_ranks[stage - 1], 0).wait()
    if rank != last:
        groups[EdgeKind.HIDDEN].send([tensor], stage_ranks[stage + 1], 0).wait()
    elif rank != head:
        groups[EdgeKind.IDS].send([tensor], head, 0).wait()
    if rank == head != last:
        groups[EdgeKind.IDS].recv([tensor], last, 0).wait()
    torch.cuda.synchronize(device)


# ---- the head's store ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the head listens."""

    addresses: tuple[str, ...]  # the likeliest first
    port: int


async def open_store(
    broadcast: Broadcast, *, rank: int, hosts: Sequence[str], timeout_s: float
) -> Store:
    """The store that all ranks share; rank 0 serves it. Every rank calls this at the same point.

    Args:
        broadcast: over the control plane.
        rank: the own number.
        hosts: the host of every rank.
        timeout_s: of connecting, and later of waiting for a key.

    Raises:
        EnvironmentSetupError: the head cannot listen, or this rank cannot reach it.
    """
    timeout = timedelta(seconds=timeout_s)
    on_one_host = len(set(hosts)) == 1
    if rank == 0:
        try:
            store = TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        except (DistStoreError, RuntimeError) as error:
            raise EnvironmentSetupError(
                f"rank 0 on {hosts[0]} could not listen for the other ranks of NCCL ({error}): set "
                'pipeline.transport = "mpi" if no TCP port may be opened there'
            ) from error
        addresses = (_LOOPBACK,) if on_one_host else addresses_of_this_host(hosts[0])
        await broadcast(to_json(Rendezvous(addresses, store.port)).encode())
        return store
    found = from_json(Rendezvous, await broadcast(None))
    address = await _first_that_answers(found)
    if address is None:
        raise EnvironmentSetupError(
            f"rank {rank} on {hosts[rank]} cannot reach rank 0 on {hosts[0]} over TCP (tried "
            f"{', '.join(found.addresses)}, port {found.port}): let the hosts talk to each other, "
            'or set pipeline.transport = "mpi"'
        )
    try:
        return await asyncio.to_thread(
            TCPStore, address, found.port, None, False, timeout, wait_for_workers=False
        )
    except (DistStoreError, RuntimeError) as error:
        raise EnvironmentSetupError(
            f"rank {rank} on {hosts[rank]} lost rank 0 on {hosts[0]} ({address}, port "
            f"{found.port}) while NCCL started ({error}): see the log of rank 0"
        ) from error


def addresses_of_this_host(name: str) -> tuple[str, ...]:
    """Addresses at which other hosts may reach this one: never a loopback; last, its name."""
    found: list[str] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(_OUTSIDE)
        found.append(probe.getsockname()[0])
    for known_as in (socket.gethostname(), name):
        with contextlib.suppress(OSError):
            infos = socket.getaddrinfo(known_as, None, socket.AF_INET, socket.SOCK_STREAM)
            found.extend(str(info[4][0]) for info in infos)
    reachable = [address for address in found if not address.startswith(("127.", "0."))]
    return tuple(dict.fromkeys([*reachable, name]))


async def _first_that_answers(rendezvous: Rendezvous) -> str | None:
    for address in rendezvous.addresses:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_ANSWER_LIMIT_S):
                _, writer = await asyncio.open_connection(address, rendezvous.port)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return address
    return None
