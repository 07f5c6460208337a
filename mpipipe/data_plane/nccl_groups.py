"""The two NCCL groups of torch.distributed that `nccl` moves tensors in: making and leaving them.

Everything here blocks until all ranks do the same, so it runs in a thread and the control plane
goes on meanwhile; in a daemon thread, because NCCL may never return where a rank or its network is
missing. Nothing of torch.distributed is left behind after `leave`.

`nccl` moves the tensors of a run; `rendezvous` finds the head.
"""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Store

from mpipipe.data_plane.channel import EdgeKind
from mpipipe.data_plane.daemon_call import call_in_daemon
from mpipipe.data_plane.rendezvous import Broadcast, open_store
from mpipipe.errors import DeadlineError, EnvironmentSetupError

__all__ = ["LEAVE_LIMIT_S", "NcclGroups", "connect_groups", "first_line"]

# After this NCCL's watchdog ends the process. A receive may be on the stream while the sender
# compiles its kernels, so it is far above any step; a rank that died is noticed by the launcher.
_TRANSFER_LIMIT_S = 1800.0
LEAVE_LIMIT_S = 30.0  # for all ranks to leave, from the first
_CLOSED_KEY = "mpipipe/closed"
_CLOSE_POLL_S = 1e-3
_HINT = (
    "set NCCL_SOCKET_IFNAME to the interface that joins the hosts, see what NCCL_DEBUG=INFO "
    'prints, or set pipeline.transport = "mpi"'
)


@dataclass(frozen=True, slots=True)
class NcclGroups:
    """This rank's membership."""

    by_kind: dict[EdgeKind, ProcessGroup]
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
    device_index: int,
    timeout_s: float,
) -> NcclGroups:
    """Connect all ranks, each with a GPU of its own. Collective.

    Args:
        broadcast: the head's bytes to all, over the control plane.
        rank: the own number; rank 0 is the head.
        hosts: the host of every rank, in order of rank.
        stage_ranks: the rank of every stage, the head's first.
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
    try:
        async with asyncio.timeout(timeout_s):
            by_kind = await call_in_daemon(
                lambda: _connect(store, rank, stage_ranks, device), "nccl-connect"
            )
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
    return NcclGroups(by_kind, store, rank, len(hosts), device)


def _others(rank: int, hosts: Sequence[str]) -> str:
    others = [f"rank {other} on {host}" for other, host in enumerate(hosts) if other != rank]
    shown = ", ".join(others[:3])
    return shown if len(others) <= 3 else f"{shown} and {len(others) - 3} more"


def first_line(error: Exception) -> str:
    """What NCCL said, without its stack."""
    return str(error).strip().partition("\n")[0].rstrip(". ")


def _connect(
    store: Store, rank: int, stage_ranks: Sequence[int], device: torch.device
) -> dict[EdgeKind, ProcessGroup]:
    """Make both groups and send a tensor over every edge. Blocks until all ranks do the same."""
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
        world_size=len(stage_ranks),
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
    return groups


def _exercise(
    groups: dict[EdgeKind, ProcessGroup],
    rank: int,
    stage_ranks: Sequence[int],
    device: torch.device,
) -> None:
    """Once round the ring: hidden states forward, ids from the last stage's rank to the head."""
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
