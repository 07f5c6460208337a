"""One rank's end of a pair of ranks whose link is measured, over the tensor channel of a run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpipipe.data_plane.channel import EdgeKind, TensorChannel

__all__ = ["NUM_WARM_UP", "LinkEnd", "answer_hops", "ask_hops", "round_trip_s"]

NUM_WARM_UP = 5  # NCCL connects a direction when it is first used
_NUM_HOPS = 15
_RECEIPT_BYTES = 8


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """This rank's end of one pair. HIDDEN both ways, as it is the kind with the heavy tensors."""

    channel: TensorChannel
    device: torch.device
    peer: int

    def tensor(self, num_bytes: int) -> torch.Tensor:
        """Bytes to send, or to receive into."""
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)

    async def send(self, tensor: torch.Tensor) -> None:
        """As the channel's; ended in stream order."""
        await self.channel.send(tensor, destination=self.peer, kind=EdgeKind.HIDDEN).wait()

    async def receive(self, buffer: torch.Tensor) -> None:
        """As the channel's; ended in stream order."""
        await self.channel.receive(buffer, source=self.peer, kind=EdgeKind.HIDDEN).wait()

    async def settle(self) -> None:
        """Return when the device has done what was added to its stream."""
        if self.device.type != "cuda":
            return
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        while not mark.query():  # noqa: ASYNC110 - a GPU sets no asyncio.Event
            await asyncio.sleep(0)


async def round_trip_s(end: LinkEnd, load: torch.Tensor, receipt: torch.Tensor) -> float:
    """Seconds from sending `load` until `receipt` is here."""
    start_s = time.perf_counter()
    await end.send(load)
    await end.receive(receipt)
    await end.settle()
    return time.perf_counter() - start_s


async def ask_hops(end: LinkEnd, sizes_bytes: Sequence[int]) -> list[float]:
    """Seconds one way of each size; the other end answers with `answer_hops`."""
    receipt = end.tensor(_RECEIPT_BYTES)
    back_s = await _trip_s(end, end.tensor(_RECEIPT_BYTES), receipt) / 2
    found = []
    for num_bytes in sizes_bytes:
        trip_s = await _trip_s(end, end.tensor(num_bytes), receipt)
        found.append(max(trip_s - back_s, back_s))
    return found


async def answer_hops(end: LinkEnd, sizes_bytes: Sequence[int]) -> None:
    """The other end's part of `ask_hops`."""
    receipt = end.tensor(_RECEIPT_BYTES)
    for num_bytes in (_RECEIPT_BYTES, *sizes_bytes):
        load = end.tensor(num_bytes)
        for _ in range(NUM_WARM_UP + _NUM_HOPS):
            await end.receive(load)
            await end.send(receipt)


async def _trip_s(end: LinkEnd, load: torch.Tensor, receipt: torch.Tensor) -> float:
    """Of a round trip: on GPUs of many in stream order, as in a run; on CPUs the fastest."""
    for _ in range(NUM_WARM_UP):
        await round_trip_s(end, load, receipt)
    if end.device.type != "cuda":
        return min([await round_trip_s(end, load, receipt) for _ in range(_NUM_HOPS)])
    start_s = time.perf_counter()
    for _ in range(_NUM_HOPS):
        await end.send(load)
        await end.receive(receipt)
    await end.settle()
    return (time.perf_counter() - start_s) / _NUM_HOPS
