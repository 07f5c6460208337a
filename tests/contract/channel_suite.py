"""What every control channel must do; run over memory here and over MPI in tests/mpi.

Written for all ranks at once: `spmd(body)` runs `body(channel)` on every rank that this process
has, with the engine running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from mpipipe.control_plane.channel import Channel
from mpipipe.errors import ChannelClosedError

Body = Callable[[Channel], Awaitable[None]]
Spmd = Callable[[Body], None]

# Around the 32 KiB of a receive slot of the MPI channel, and far above it.
SIZES = (0, 1, 32 * 1024 - 1, 32 * 1024, 32 * 1024 + 1, 64 * 1024, 1_000_003)


def frame_of(source: int, number: int, num_bytes: int) -> bytes:
    """Bytes that tell where they come from and differ along their length."""
    unit = bytes((source * 7 + number * 13 + index) % 251 for index in range(251))
    return (unit * (num_bytes // 251 + 1))[:num_bytes]


async def next_frame(channel: Channel) -> tuple[int, bytes]:
    """The next (source, frame); what the mesh does at every poll of the engine."""
    while (received := channel.receive_nowait()) is None:  # noqa: ASYNC110 - the subject
        await asyncio.sleep(0)
    return received


class ChannelSuite:
    def test_ranks_are_numbered_from_zero_below_the_world_size(self, spmd: Spmd) -> None:
        async def body(channel: Channel) -> None:
            assert 0 <= channel.rank < channel.world_size

        spmd(body)

    def test_frames_of_all_sizes_arrive_intact_and_in_order_of_each_source(
        self, spmd: Spmd
    ) -> None:
        async def body(channel: Channel) -> None:
            ranks = range(channel.world_size)
            for number, num_bytes in enumerate(SIZES):
                for to in ranks:
                    channel.send_nowait(to, frame_of(channel.rank, number, num_bytes))
            found: dict[int, list[bytes]] = {rank: [] for rank in ranks}
            for _ in range(len(SIZES) * channel.world_size):
                source, frame = await next_frame(channel)
                found[source].append(frame)
            for source in ranks:
                expected = [frame_of(source, number, size) for number, size in enumerate(SIZES)]
                assert found[source] == expected

        spmd(body)

    def test_a_short_frame_never_overtakes_a_long_one(self, spmd: Spmd) -> None:
        async def body(channel: Channel) -> None:
            to = (channel.rank + 1) % channel.world_size
            for number in range(10):
                channel.send_nowait(to, frame_of(0, number, 300_000))
                channel.send_nowait(to, b"%d" % number)
            for number in range(10):
                _, long = await next_frame(channel)
                _, short = await next_frame(channel)
                assert long == frame_of(0, number, 300_000)
                assert short == b"%d" % number

        spmd(body)

    def test_a_flood_that_is_not_read_yet_is_kept_in_order(self, spmd: Spmd) -> None:
        async def body(channel: Channel) -> None:
            to = (channel.rank + 1) % channel.world_size
            for number in range(1000):
                channel.send_nowait(to, b"%d" % number)
            for number in range(1000):
                _, frame = await next_frame(channel)
                assert frame == b"%d" % number

        spmd(body)

    def test_the_sender_may_forget_the_frame_at_once(self, spmd: Spmd) -> None:
        async def body(channel: Channel) -> None:
            to = (channel.rank + 1) % channel.world_size
            for number in range(20):
                channel.send_nowait(to, bytes([number]) * 100_000)
            for number in range(20):
                _, frame = await next_frame(channel)
                assert frame == bytes([number]) * 100_000

        spmd(body)

    def test_nothing_to_receive_is_none(self, spmd: Spmd) -> None:
        async def body(channel: Channel) -> None:
            assert channel.receive_nowait() is None

        spmd(body)

    def test_there_is_no_rank_beyond_the_world(self, spmd: Spmd) -> None:
        async def body(channel: Channel) -> None:
            for rank in (-1, channel.world_size):
                with pytest.raises(ValueError, match=f"no rank {rank}"):
                    channel.send_nowait(rank, b"hello")

        spmd(body)

    def test_a_frame_sent_just_before_closing_still_arrives(self, spmd: Spmd) -> None:
        async def body(channel: Channel) -> None:
            if channel.rank % 2 == 1:
                assert await next_frame(channel) == (channel.rank - 1, bytes(1_000_000))
            elif channel.rank + 1 < channel.world_size:
                channel.send_nowait(channel.rank + 1, bytes(1_000_000))
            await channel.aclose()

        spmd(body)

    def test_a_closed_channel_refuses_and_closing_again_is_allowed(self, spmd: Spmd) -> None:
        async def body(channel: Channel) -> None:
            await channel.aclose()
            await channel.aclose()
            with pytest.raises(ChannelClosedError):
                channel.send_nowait(channel.rank, b"late")
            with pytest.raises(ChannelClosedError):
                channel.receive_nowait()

        spmd(body)
