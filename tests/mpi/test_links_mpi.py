"""The doctor's link figures, on however many ranks there are."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from mpipipe.clock import MonotonicClock
from mpipipe.doctor.probes import links
from mpipipe.doctor.probes.links import measure_links, neighbours
from mpipipe.errors import EnvironmentSetupError, MpipipeError
from mpipipe.progress import new_event_loop
from mpipipe.runtime.handshake import read_resources
from mpipipe.runtime.ranks import Ranks, open_ranks
from mpipipe.runtime.tensor_channel import open_transport
from mpipipe.topology.host import host_name

LIMIT_S = 40
SOON_S = 20  # and not after 25 or 30 s, which are the limits of connecting and measuring


def on_ranks(body) -> None:  # type: ignore[no-untyped-def]
    async def run() -> None:
        async with asyncio.timeout(LIMIT_S), open_ranks(MonotonicClock()) as ranks:
            await body(ranks)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_pair_of_neighbours_is_measured_in_the_order_of_stages(device: str) -> None:
    """Without GPUs `cuda` measures what a run would use instead."""

    async def body(ranks: Ranks) -> None:
        order = [0, *range(ranks.mesh.world_size - 1, 0, -1)]
        figures = await measure_links(ranks, device=device, stage_order=order)  # type: ignore[arg-type]
        if not ranks.is_head:
            assert figures is None
            return
        assert figures is not None
        assert [(figure.source, figure.target) for figure in figures] == neighbours(order)
        assert {figure.transport for figure in figures} <= {"mpi", "nccl"}
        assert all(figure.latency_us > 0 and figure.bandwidth_gb_s > 0 for figure in figures)
        assert all(figure.source_host == figure.target_host == host_name() for figure in figures)

    on_ranks(body)


def test_a_rank_that_cannot_connect_is_an_error_on_every_rank_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(ranks: Ranks) -> None:
        last = ranks.mesh.world_size - 1

        async def refuse(*parts, **settings):  # type: ignore[no-untyped-def]
            channel = await open_transport(*parts, **settings)
            await channel.aclose()
            if ranks.mesh.rank == last:
                raise EnvironmentSetupError("no way through")
            return channel

        monkeypatch.setattr(links, "open_transport", refuse)
        start_s = time.monotonic()
        if last == 0:
            assert await measure_links(ranks, device="cpu") == []
            return
        with pytest.raises(MpipipeError, match="no way through"):
            await measure_links(ranks, device="cpu")
        assert time.monotonic() - start_s < SOON_S

    on_ranks(body)


def test_the_ranks_of_a_host_count_themselves_where_no_launcher_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def look(device: str, local_rank: int):  # type: ignore[no-untyped-def]
        seen.append(local_rank)
        return read_gpu(device, local_rank)

    from mpipipe.runtime import handshake

    read_gpu = handshake._read_gpu
    monkeypatch.setattr(handshake, "_read_gpu", look)
    monkeypatch.setattr(handshake, "told_local_rank", lambda environ: None)

    async def body(ranks: Ranks) -> None:
        resources = await read_resources(ranks, "cpu", deadline_s=LIMIT_S)
        assert seen == [ranks.mesh.rank]  # all are on one host
        assert resources.cores

    on_ranks(body)


def test_ids_close_the_ring() -> None:
    assert neighbours([0]) == []
    assert neighbours([0, 1]) == [(0, 1)]
    assert neighbours([0, 2, 1]) == [(0, 2), (2, 1), (1, 0)]


def test_a_rank_without_memory_is_an_error_of_all_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(ranks: Ranks) -> None:
        last = ranks.mesh.world_size - 1
        if last == 0:
            return

        def full(*_: object, **settings: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.\nGPU 0")

        if ranks.mesh.rank == last:
            monkeypatch.setattr(torch, "zeros", full)
        start_s = time.monotonic()
        with pytest.raises(MpipipeError, match="CUDA out of memory") as raised:
            await measure_links(ranks, device="cpu")
        assert "--gpus-per-node=N" in str(raised.value)
        assert raised.value.exit_code == 5
        assert time.monotonic() - start_s < SOON_S  # no rank waits for tensors that do not come

    on_ranks(body)
