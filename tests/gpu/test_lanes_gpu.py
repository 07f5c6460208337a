"""Sums and pieces between the lanes of a stage over NCCL and shared memory, eager and captured.

mpirun -n 2 python -m mpi4py -m pytest tests/gpu/test_lanes_gpu.py --with-mpi
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch
from mpi4py import MPI

from mpipipe.data_plane.lanes import Lanes
from mpipipe.data_plane.nccl import NcclTensorChannel
from mpipipe.data_plane.nccl_groups import connect_groups
from mpipipe.stage.cuda_stream import CudaStream

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.Get_rank(), WORLD.Get_size()
LIMIT_S = 60

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("default"),  # torch.distributed has its own opinions
    pytest.mark.skipif(torch.cuda.device_count() < SIZE, reason="needs a GPU per rank"),
]


async def broadcast(payload: bytes | None) -> bytes:
    received = WORLD.bcast(payload, root=0)
    assert isinstance(received, bytes)
    return received


@pytest.fixture(scope="module")
def channel() -> Iterator[NcclTensorChannel]:
    torch.cuda.set_device(RANK)
    with asyncio.Runner() as runner:
        opened: list[NcclTensorChannel] = []

        async def connect() -> None:
            groups = await connect_groups(
                broadcast,
                rank=RANK,
                hosts=["here"] * SIZE,
                stage_ranks=(RANK,),
                lane_groups=[range(SIZE)],
                device_index=RANK,
                timeout_s=LIMIT_S,
            )
            opened.append(NcclTensorChannel(groups))

        runner.run(connect())
        yield opened[0]
        runner.run(opened[0].aclose())


@pytest.fixture
def lanes(channel: NcclTensorChannel) -> Lanes:
    return channel.lanes


def parts(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Of every lane: [lanes, ...], the same on each."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(SIZE, *shape, generator=generator).to(dtype).cuda(RANK)


def same_everywhere(tensor: torch.Tensor) -> bool:
    mine = tensor.cpu().view(torch.uint8).numpy().tobytes()
    return len(set(WORLD.allgather(mine))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 32, 33, 1024])
def test_every_lane_has_the_sum(lanes: Lanes, rows: int, dtype: torch.dtype) -> None:
    assert (lanes.lane, lanes.num_lanes) == (RANK, SIZE)
    whole = parts(rows, 4096, dtype=dtype)
    for _ in range(3):  # the shared memory is used again
        total = lanes.add_up(whole[RANK].clone())
        torch.testing.assert_close(total.float(), whole.float().sum(dim=0), rtol=2e-2, atol=2e-2)
        assert same_everywhere(total)


def test_a_graph_holds_sums_pieces_and_what_the_first_lane_tells(lanes: Lanes) -> None:
    device = torch.device("cuda", RANK)
    stream = CudaStream(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    stream.enter()
    hidden = torch.empty(2, 4096, dtype=torch.bfloat16, device=device)
    outputs: list[torch.Tensor] = []

    def work() -> None:
        total = lanes.add_up(hidden * (RANK + 1))
        logits = lanes.gather((total[:, :8] + RANK).contiguous())
        ids = lanes.from_first(torch.full((2,), RANK, dtype=torch.int64, device=device))
        outputs[:] = [total, logits, ids]

    hidden.fill_(1.0)
    work()
    stream.drain()
    replay = stream.capture(work)
    assert replay is not None
    for value in (1.0, 3.0, 5.0):
        hidden.fill_(value)
        replay()
        stream.drain()
        expected = value * sum(range(1, SIZE + 1))
        total, logits, ids = outputs
        assert torch.equal(total, torch.full_like(total, expected))
        pieces = torch.arange(SIZE, device=device).repeat_interleave(8) + expected
        assert torch.equal(logits, pieces.to(logits.dtype).expand(2, -1))
        assert ids.tolist() == [0, 0]
    stream.release_captured()  # else NCCL waits for it when it is left
