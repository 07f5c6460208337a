"""GPU tensors between ranks, over NCCL and staged through pinned memory, in stream order.

    mpirun -n 2 python -m mpi4py -m pytest tests/gpu/test_tensor_channel_gpu.py --with-mpi

NCCL needs a GPU per rank; the staged channel runs with all ranks on one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 - nothing of it may be left behind
from mpi4py import MPI

from mpipipe.data_plane.channel import EdgeKind, RepeatingChannel, TensorChannel
from mpipipe.data_plane.nccl import NcclTensorChannel
from mpipipe.data_plane.nccl_groups import connect_groups
from mpipipe.data_plane.staged import open_staged_channel
from mpipipe.errors import ChannelClosedError
from mpipipe.progress import ProgressEngine, new_event_loop

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.Get_rank(), WORLD.Get_size()
LIMIT_S = 60
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
SHAPES = ((1, 3200), (256, 3200), (4096, 3200), (0, 3200), (7,), (1,))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("default"),  # torch.distributed has its own opinions
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@dataclass(frozen=True)
class Ring:
    """Hidden states go up the ranks, ids from the last to the first."""

    channel: TensorChannel
    device: torch.device

    @property
    def is_first(self) -> bool:
        return RANK == 0

    @property
    def is_last(self) -> bool:
        return RANK == SIZE - 1


Body = Callable[[Ring], Awaitable[None]]


async def nccl_broadcast(payload: bytes | None) -> bytes:
    received = WORLD.bcast(payload, root=0)
    assert isinstance(received, bytes)
    return received


async def open_channel(transport: str, engine: ProgressEngine, index: int) -> TensorChannel:
    if transport == "staged":
        return open_staged_channel(engine)
    groups = await connect_groups(
        nccl_broadcast,
        rank=RANK,
        hosts=["here"] * SIZE,
        stage_ranks=range(SIZE),
        device_index=index,
        timeout_s=30,
    )
    return NcclTensorChannel(groups)


class Session:
    """One channel for many tests, as opening NCCL takes 5 s: all of them run on its event loop.

    Args:
        transport: "nccl" or "staged".
    """

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self._runner = asyncio.Runner(loop_factory=new_event_loop)
        self._engine = ProgressEngine()
        self._channel: TensorChannel | None = None
        self._index = RANK if transport == "nccl" else 0

    def run(self, body: Body) -> None:
        """`body` on the open channel, which is opened by the first."""
        self._runner.run(self._guarded(body))

    async def _guarded(self, body: Body) -> None:
        torch.cuda.set_device(self._index)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(self._engine.run())
            if self._channel is None:
                self._channel = await open_channel(self.transport, self._engine, self._index)
            await body(Ring(self._channel, torch.device("cuda", self._index)))
            together = WORLD.Ibarrier()  # polled: what a test has sent leaves before the next one
            while not together.Test():  # noqa: ASYNC110 - MPI has no event
                await asyncio.sleep(1e-3)
            running.cancel()

    def close(self) -> None:
        """Leave together with the other ranks; the next `run` opens another channel."""
        if self._channel is not None:

            async def body(ring: Ring) -> None:
                await ring.channel.aclose()

            self.run(body)
            self._channel = None

    def end(self) -> None:
        """Close for good."""
        self.close()
        self._runner.close()


@pytest.fixture(scope="module", params=["nccl", "staged"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    """All tests of one transport run one after the other: pytest groups them by this fixture."""
    if SIZE < 2:
        pytest.skip("needs two ranks: see the top of this file")
    if request.param == "nccl" and torch.cuda.device_count() < SIZE:
        pytest.skip(f"NCCL needs {SIZE} GPUs")
    opened = Session(request.param)
    yield opened
    opened.end()


@pytest.fixture
def spmd(session: Session) -> Callable[[Body], None]:
    return session.run


@pytest.fixture
def nccl(session: Session) -> Callable[[Body], None]:
    if session.transport != "nccl":
        pytest.skip("a matter of NCCL alone")
    return session.run


def tensor_of(rank: int, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return torch.randint(-1000, 1000, shape, generator=generator).to(dtype)


async def pass_on(ring: Ring, tensor: torch.Tensor, buffer: torch.Tensor, kind: EdgeKind) -> None:
    """`tensor` to the next rank of `kind`, `buffer` from the one before, where there is one."""
    sends = not ring.is_last if kind is EdgeKind.HIDDEN else ring.is_last
    receives = not ring.is_first if kind is EdgeKind.HIDDEN else ring.is_first
    if sends:
        to = (RANK + 1) % SIZE
        await ring.channel.send(tensor, destination=to, kind=kind).wait()
    if receives:
        await ring.channel.receive(buffer, source=(RANK - 1) % SIZE, kind=kind).wait()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_arrive_bit_for_bit(spmd: Callable[[Body], None], dtype: torch.dtype) -> None:
    async def body(ring: Ring) -> None:
        for number, shape in enumerate(SHAPES):
            sent = tensor_of(RANK, number, shape, dtype).to(ring.device)
            for kind in EdgeKind:
                buffer = torch.zeros_like(sent)
                await pass_on(ring, sent, buffer, kind)
                receives = not ring.is_first if kind is EdgeKind.HIDDEN else ring.is_first
                if receives:
                    expected = tensor_of((RANK - 1) % SIZE, number, shape, dtype)
                    assert torch.equal(buffer.cpu(), expected)

    spmd(body)


@pytest.mark.parametrize("kind", EdgeKind, ids=str)
def test_a_buffer_is_the_streams_again_after_wait(
    spmd: Callable[[Body], None], kind: EdgeKind
) -> None:
    """A tensor is computed, sent, overwritten; a buffer is filled, read, overwritten; no sync."""

    async def body(ring: Ring) -> None:
        num_steps, shape = 40, (512, 1024)
        tensor = torch.zeros(shape, device=ring.device)
        buffer = torch.zeros(shape, device=ring.device)
        slow = torch.ones(2048, 2048, device=ring.device)
        sums = torch.zeros(num_steps, device=ring.device, dtype=torch.float64)
        for step in range(num_steps):
            slow = slow @ slow.clamp(max=1e-3)  # keeps the stream behind the host
            tensor.fill_(step)
            await pass_on(ring, tensor, buffer, kind)
            tensor.fill_(-1)
            sums[step] = buffer.double().sum()
            buffer.fill_(-2)
        receives = not ring.is_first if kind is EdgeKind.HIDDEN else ring.is_first
        if receives:
            expected = torch.arange(num_steps, dtype=torch.float64) * tensor.numel()
            assert torch.equal(sums.cpu(), expected)

    spmd(body)


def test_steps_never_wait_for_the_gpu_on_the_host(spmd: Callable[[Body], None]) -> None:
    async def body(ring: Ring) -> None:
        hidden_TH = torch.ones(64, 3200, dtype=torch.float16, device=ring.device)
        ids_S = torch.ones(64, dtype=torch.int64, device=ring.device)
        for step in range(6):
            if step == 1:
                torch.cuda.set_sync_debug_mode("error")
            try:
                await pass_on(ring, hidden_TH, hidden_TH, EdgeKind.HIDDEN)
                await pass_on(ring, ids_S, ids_S, EdgeKind.IDS)
            finally:
                if step == 5:
                    torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()

    spmd(body)


def test_refusals(spmd: Callable[[Body], None]) -> None:
    async def body(ring: Ring) -> None:
        hidden_TH = torch.ones(5, 10, device=ring.device)
        peer = (RANK + 1) % SIZE
        with pytest.raises(ValueError, match="not contiguous"):
            ring.channel.send(hidden_TH.t(), destination=peer, kind=EdgeKind.HIDDEN)
        with pytest.raises(ValueError, match=f"no rank {SIZE}"):
            ring.channel.receive(hidden_TH, source=SIZE, kind=EdgeKind.HIDDEN)

    spmd(body)


def test_a_head_that_is_late_holds_up_only_the_stream_of_the_ids(
    nccl: Callable[[Body], None],
) -> None:
    async def body(ring: Ring) -> None:
        ids_S = torch.ones(16_000_000, dtype=torch.int64, device=ring.device)  # beyond any buffer
        if ring.is_last:
            ring.channel.send(ids_S, destination=0, kind=EdgeKind.IDS)
            mark = torch.cuda.current_stream().record_event()
            limit_s = time.monotonic() + 20
            while not mark.query():
                assert time.monotonic() < limit_s, "the stream waits for the head"
                await asyncio.sleep(1e-3)
        WORLD.Barrier()
        if ring.is_first:
            ids_S.zero_()
            await ring.channel.receive(ids_S, source=SIZE - 1, kind=EdgeKind.IDS).wait()
            assert bool((ids_S == 1).all())

    nccl(body)


def test_repeated_transfers_carry_what_is_there_each_time(nccl: Callable[[Body], None]) -> None:
    """As in a decode loop: hidden states forward, ids back, in graphs, now and then without."""

    async def body(ring: Ring) -> None:
        channel, num_rounds = ring.channel, 60
        assert isinstance(channel, RepeatingChannel)
        made, arrived = torch.zeros(2, 32, 3200, dtype=torch.bfloat16, device=ring.device)
        ids, ids_in = torch.zeros(2, 32, dtype=torch.int64, device=ring.device)
        seen = torch.zeros(2, num_rounds, device=ring.device)
        hidden, back = EdgeKind.HIDDEN, EdgeKind.IDS
        starts: list[Callable[[], None]] = []
        if not ring.is_last:
            starts.append(channel.repeated_send(made, destination=RANK + 1, kind=hidden))
        if not ring.is_first:
            starts.append(channel.repeated_receive(arrived, source=RANK - 1, kind=hidden))
        if ring.is_last:
            starts.append(channel.repeated_send(ids, destination=0, kind=back))
        if ring.is_first:
            starts.append(channel.repeated_receive(ids_in, source=SIZE - 1, kind=back))
        send_or_receive = dict(zip(("hidden", "ids"), (starts[0], starts[-1]), strict=True))
        torch.cuda.set_sync_debug_mode("error")
        for number in range(num_rounds):
            plain = number % 7 == RANK  # the other end of the transfer is a graph
            made.fill_(number)
            if not plain:
                send_or_receive["hidden"]()
            else:
                await pass_on(ring, made, arrived, hidden)
            seen[0, number] = arrived.float().mean()
            ids.fill_(100 + number)
            if not plain:
                send_or_receive["ids"]()
            else:
                await pass_on(ring, ids, ids_in, back)
            seen[1, number] = ids_in.float().mean()
        torch.cuda.set_sync_debug_mode("default")
        if ring.is_last:
            assert seen[0].tolist() == list(range(num_rounds))
        if ring.is_first:
            assert seen[1].tolist() == list(range(100, 100 + num_rounds))

    if SIZE != 2:
        pytest.skip("two ranks: one edge forward, one back")
    nccl(body)


def test_nccl_takes_only_tensors_of_its_gpu_for_other_ranks(nccl: Callable[[Body], None]) -> None:
    async def body(ring: Ring) -> None:
        peer = (RANK + 1) % SIZE
        with pytest.raises(ValueError, match="the tensor is on cpu"):
            ring.channel.send(torch.zeros(1), destination=peer, kind=EdgeKind.HIDDEN)
        with pytest.raises(ValueError, match="own rank"):
            ring.channel.send(
                torch.zeros(1, device=ring.device), destination=RANK, kind=EdgeKind.HIDDEN
            )

    nccl(body)


def test_after_closing_nothing_is_left_and_it_can_be_opened_again(session: Session) -> None:
    session.close()
    closed: list[TensorChannel] = []

    async def body(ring: Ring) -> None:
        tensor = torch.full((4,), float(len(closed)), device=ring.device)
        buffer = torch.zeros_like(tensor)
        await pass_on(ring, tensor, buffer, EdgeKind.HIDDEN)
        if not ring.is_first:
            assert buffer.tolist() == [len(closed)] * 4
        await ring.channel.aclose()
        assert not dist.is_initialized()
        with pytest.raises(ChannelClosedError):
            ring.channel.send(tensor, destination=(RANK + 1) % SIZE, kind=EdgeKind.HIDDEN)
        closed.append(ring.channel)

    for _ in range(2):
        session.run(body)
        session.close()
    assert closed[0] is not closed[1]
