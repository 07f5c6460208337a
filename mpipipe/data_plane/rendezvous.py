"""How ranks find the head's TCP store: where it listens, broadcast over the control plane.

The head takes a free port. A node may have several addresses, and other hosts may not reach all of
them (Debian maps a host's own name to 127.0.1.1), so the head names all it knows and every rank
takes the first that answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistStoreError, Store, TCPStore

from mpipipe.errors import EnvironmentSetupError
from mpipipe.plain_values import from_json, to_json

__all__ = ["Broadcast", "Rendezvous", "addresses_of_this_host", "open_store"]

Broadcast = Callable[[bytes | None], Awaitable[bytes]]
"""The head's bytes on every rank; the others pass None."""

_LOOPBACK = "127.0.0.1"
_ANSWER_LIMIT_S = 5.0  # for one address; a firewall that drops packets never answers
# Any address off this host: connecting a UDP socket sends nothing but chooses the interface.
_OUTSIDE = ("10.255.255.255", 9)


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
