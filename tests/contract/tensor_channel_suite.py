"""What every tensor channel must do; run over the loopback here and over MPI in tests/mpi.

Written for all ranks at once: `spmd(body)` runs `body(end)` on every rank that this process has.
Each rank sends to the next and receives from the one before; with one rank that is itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
import torch

from mpipipe.data_plane.channel import EdgeKind, TensorChannel
from mpipipe.errors import ChannelClosedError, ProtocolMismatchError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
SHAPES = ((3, 8), (1,), (), (0,), (0, 16), (700, 576))


@dataclass(frozen=True)
class End:
    """One rank's end of the channel, and its neighbours in the ring."""

    channel: TensorChannel
    rank: int
    world_size: int

    @property
    def next(self) -> int:
        return (self.rank + 1) % self.world_size

    @property
    def previous(self) -> int:
        return (self.rank - 1) % self.world_size


Body = Callable[[End], Awaitable[None]]
Spmd = Callable[[Body], None]


def tensor_of(rank: int, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return torch.randint(-1000, 1000, shape, generator=generator).to(dtype)


class TensorChannelSuite:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_tensors_arrive_bit_for_bit(
        self, spmd: Spmd, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        async def body(end: End) -> None:
            sent = tensor_of(end.rank, 0, shape, dtype)
            buffer = torch.zeros(shape, dtype=dtype)
            send = end.channel.send(sent, destination=end.next, kind=EdgeKind.HIDDEN)
            receive = end.channel.receive(buffer, source=end.previous, kind=EdgeKind.HIDDEN)
            await receive.wait()
            await send.wait()
            assert torch.equal(buffer, tensor_of(end.previous, 0, shape, dtype))

        spmd(body)

    def test_nan_and_negative_zero_keep_their_bits(self, spmd: Spmd) -> None:
        async def body(end: End) -> None:
            sent = torch.tensor([float("nan"), -0.0, float("-inf"), 1e-45])
            buffer = torch.zeros(4)
            receive = end.channel.receive(buffer, source=end.previous, kind=EdgeKind.HIDDEN)
            await end.channel.send(sent, destination=end.next, kind=EdgeKind.HIDDEN).wait()
            await receive.wait()
            assert torch.equal(buffer.view(torch.int32), sent.view(torch.int32))

        spmd(body)

    @pytest.mark.parametrize("receives_first", [True, False])
    def test_transfers_match_in_the_order_they_were_started(
        self, spmd: Spmd, receives_first: bool
    ) -> None:
        async def body(end: End) -> None:
            shapes = [(number % 5 * 100 + 1, 64) for number in range(12)]
            sent = [
                tensor_of(end.rank, number, shape, torch.float32)
                for number, shape in enumerate(shapes)
            ]
            buffers = [torch.zeros(shape) for shape in shapes]

            def post_receives() -> list[Awaitable[None]]:
                return [
                    end.channel.receive(buffer, source=end.previous, kind=EdgeKind.HIDDEN).wait()
                    for buffer in buffers
                ]

            def post_sends() -> list[Awaitable[None]]:
                return [
                    end.channel.send(tensor, destination=end.next, kind=EdgeKind.HIDDEN).wait()
                    for tensor in sent
                ]

            first, second = (
                (post_receives, post_sends) if receives_first else (post_sends, post_receives)
            )
            waiting = [*first(), *second()]
            await asyncio.gather(*reversed(waiting))
            for number, (shape, buffer) in enumerate(zip(shapes, buffers, strict=True)):
                assert torch.equal(buffer, tensor_of(end.previous, number, shape, torch.float32))

        spmd(body)

    def test_kinds_never_mix(self, spmd: Spmd) -> None:
        async def body(end: End) -> None:
            hidden, ids = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
            sends = [
                end.channel.send(torch.ones(4, 8), destination=end.next, kind=EdgeKind.HIDDEN),
                end.channel.send(torch.arange(4), destination=end.next, kind=EdgeKind.IDS),
            ]
            # Received in the other order.
            await end.channel.receive(ids, source=end.previous, kind=EdgeKind.IDS).wait()
            await end.channel.receive(hidden, source=end.previous, kind=EdgeKind.HIDDEN).wait()
            for send in sends:
                await send.wait()
            assert torch.equal(ids, torch.arange(4))
            assert torch.equal(hidden, torch.ones(4, 8))

        spmd(body)

    def test_every_rank_can_send_to_every_rank_itself_included(self, spmd: Spmd) -> None:
        async def body(end: End) -> None:
            ranks = range(end.world_size)
            buffers = [torch.zeros(3) for _ in ranks]
            receives = [
                end.channel.receive(buffers[source], source=source, kind=EdgeKind.HIDDEN)
                for source in ranks
            ]
            sends = [
                end.channel.send(
                    tensor_of(end.rank, to, (3,), torch.float32),
                    destination=to,
                    kind=EdgeKind.HIDDEN,
                )
                for to in ranks
            ]
            for transfer in [*receives, *sends]:
                await transfer.wait()
            for source in ranks:
                expected = tensor_of(source, end.rank, (3,), torch.float32)
                assert torch.equal(buffers[source], expected)

        spmd(body)

    def test_waiting_twice_gives_the_same_and_a_cancelled_wait_leaves_it_under_way(
        self, spmd: Spmd
    ) -> None:
        async def body(end: End) -> None:
            buffer = torch.zeros(3)
            receive = end.channel.receive(buffer, source=end.previous, kind=EdgeKind.HIDDEN)
            with contextlib.suppress(TimeoutError):  # none if the other rank has sent already
                async with asyncio.timeout(0):
                    await receive.wait()
            send = end.channel.send(torch.ones(3), destination=end.next, kind=EdgeKind.HIDDEN)
            for transfer in (send, receive, receive, send):
                await transfer.wait()
            assert torch.equal(buffer, torch.ones(3))

        spmd(body)

    @pytest.mark.parametrize("num_elements", [2, 4])
    def test_another_size_than_expected_is_an_error_of_the_receiver(
        self, spmd: Spmd, num_elements: int
    ) -> None:
        async def body(end: End) -> None:
            send = end.channel.send(
                torch.ones(num_elements), destination=end.next, kind=EdgeKind.HIDDEN
            )
            receive = end.channel.receive(torch.zeros(3), source=end.previous, kind=EdgeKind.HIDDEN)
            with pytest.raises(ProtocolMismatchError, match=r"HIDDEN.* expected .* but got"):
                await receive.wait()
            await send.wait()

        spmd(body)

    def test_a_tensor_that_is_not_contiguous_is_refused(self, spmd: Spmd) -> None:
        async def body(end: End) -> None:
            crossed = torch.zeros(4, 6).t()
            with pytest.raises(ValueError, match="not contiguous"):
                end.channel.send(crossed, destination=end.next, kind=EdgeKind.HIDDEN)
            with pytest.raises(ValueError, match="not contiguous"):
                end.channel.receive(crossed, source=end.previous, kind=EdgeKind.HIDDEN)

        spmd(body)

    def test_there_is_no_rank_beyond_the_world(self, spmd: Spmd) -> None:
        async def body(end: End) -> None:
            for rank in (-1, end.world_size):
                with pytest.raises(ValueError, match=f"no rank {rank}"):
                    end.channel.send(torch.zeros(1), destination=rank, kind=EdgeKind.HIDDEN)
                with pytest.raises(ValueError, match=f"no rank {rank}"):
                    end.channel.receive(torch.zeros(1), source=rank, kind=EdgeKind.HIDDEN)

        spmd(body)

    def test_closing_ends_receives_that_nothing_came_for(self, spmd: Spmd) -> None:
        async def body(end: End) -> None:
            receive = end.channel.receive(torch.zeros(3), source=end.previous, kind=EdgeKind.HIDDEN)
            await end.channel.aclose()
            await end.channel.aclose()
            with pytest.raises(ChannelClosedError):
                await receive.wait()
            with pytest.raises(ChannelClosedError):
                end.channel.send(torch.zeros(3), destination=end.next, kind=EdgeKind.HIDDEN)

        spmd(body)
