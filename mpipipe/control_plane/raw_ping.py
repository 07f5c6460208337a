"""Blocking round trips of plain MPI: what awaited messages are compared with. No mpi4py import."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["BlockingCommunicator", "raw_one_way_per_s", "raw_round_trips_s"]

_TAG = 4


class BlockingCommunicator(Protocol):
    """The two calls of an MPI communicator that a ping-pong needs."""

    def Send(self, buf: bytearray, dest: int, tag: int) -> None:  # noqa: N802 - MPI's name
        """Send and return when the buffer is free."""
        ...

    def Recv(self, buf: bytearray, source: int, tag: int) -> None:  # noqa: N802 - MPI's name
        """Receive into the buffer."""
        ...


def raw_round_trips_s(
    world: BlockingCommunicator, rank: int, num_bytes: int, num_repetitions: int
) -> list[float]:
    """Seconds of each round trip between ranks 0 and 1; empty on rank 1. Blocks the event loop.

    Both ranks call it at about the same time.
    """
    peer, buffer = 1 - rank, bytearray(num_bytes)
    times_s = []
    for _ in range(num_repetitions):
        start_s = time.perf_counter()
        if rank == 0:
            world.Send(buffer, peer, _TAG)
            world.Recv(buffer, peer, _TAG)
            times_s.append(time.perf_counter() - start_s)
        else:
            world.Recv(buffer, peer, _TAG)
            world.Send(buffer, peer, _TAG)
    return times_s


def raw_one_way_per_s(
    world: BlockingCommunicator, rank: int, num_bytes: int, num_messages: int
) -> float:
    """Messages per second from rank 0 to rank 1 until the last one is read; 0 on rank 1."""
    buffer, answer = bytearray(num_bytes), bytearray(1)
    start_s = time.perf_counter()
    if rank == 0:
        for _ in range(num_messages):
            world.Send(buffer, 1, _TAG)
        world.Recv(answer, 1, _TAG)
        return num_messages / (time.perf_counter() - start_s)
    for _ in range(num_messages):
        world.Recv(buffer, 0, _TAG)
    world.Send(answer, 0, _TAG)
    return 0.0
