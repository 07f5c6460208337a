"""What ranks say of themselves, in a run and in `mpipipe plan`, and how they share their hosts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from mpipipe.cli import plan as plan_cli
from mpipipe.clock import MonotonicClock
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.planning import resources
from mpipipe.planning.resources import RankResources
from mpipipe.progress import ProgressEngine, new_event_loop
from mpipipe.runtime import handshake
from mpipipe.runtime.ranks import Ranks
from mpipipe.topology.gpu import GpuFacts
from mpipipe.topology.host import HostFacts
from mpipipe.topology.launcher import Launcher, LaunchInfo

LIMIT_S = 20.0


class Shares(ProgressEngine):
    """Notes what it is told of its host."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, int]] = []

    def share_cores(self, *, num_ranks: int, num_cores: int) -> None:
        self.told.append((num_ranks, num_cores))


@pytest.mark.parametrize(
    ("hosts", "told"),
    [
        (("n0", "n1"), [(1, 2), (1, 2)]),  # a rank on each of two hosts is not crowded
        (("n0", "n0", "n1"), [(2, 2), (2, 2), (1, 2)]),
    ],
)
def test_ranks_that_meet_share_the_cores_of_their_own_host_only(
    hosts: tuple[str, ...], told: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read_resources(
        ranks: Ranks, device: str, *, offload_dir: str, deadline_s: float
    ) -> RankResources:
        rank = ranks.mesh.rank
        return RankResources(rank, hosts[rank], 1, "srun", 2, 2**30, cores=((0, 1),))

    monkeypatch.setattr(handshake, "read_resources", read_resources)

    async def main() -> list[tuple[int, int]]:
        engine, found = ProgressEngine(), []
        info, clock = LaunchInfo(Launcher.SRUN), MonotonicClock()
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            exchanges = []
            for channel in open_memory_channels(len(hosts), engine):
                mesh, shares = Mesh(channel, engine, clock), Shares()
                mesh.start()
                found.append(shares)
                ranks = Ranks(mesh, shares, clock, info, tasks, "", None)
                exchanges.append(handshake.exchange_resources(ranks, "cpu", deadline_s=LIMIT_S))
            await asyncio.gather(*exchanges)
            running.cancel()
        return [share for shares in found for share in shares.told]

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        assert runner.run(main()) == told


GPUS = tuple(
    GpuFacts(
        index=index,
        name="NVIDIA H200",
        uuid=f"GPU-{index}",
        capability=90,
        memory_bytes=140 * 2**30,
        free_bytes=139 * 2**30,
        nccl_version="unknown",
        pci=f"0000:{index}b:00.0",
    )
    for index in (0, 1)
)
NEAR = {"0000:0b:00.0": (0, 1, 2, 3), "0000:1b:00.0": (4, 5, 6, 7)}


def test_mpipipe_plan_shows_the_cores_and_threads_that_a_run_would_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_cli, "query_host", lambda: (GPUS, ()))
    monkeypatch.setattr(plan_cli, "driver_in_sight", lambda: True)
    monkeypatch.setattr(resources, "read_host", lambda: HostFacts("n0", 8, 64 * 2**30))
    monkeypatch.setattr(resources, "cpus_near", lambda pci: NEAR[pci])
    monkeypatch.setattr(resources, "usable_physical_cores", lambda: tuple((n,) for n in range(8)))
    monkeypatch.setattr(resources, "allowed_cpus", lambda: tuple(range(8)))
    config = Path(__file__).parents[2] / "configs/bench_gpu.toml"
    plan_cli.plan_command(config, [], plan_cli.PlanRequest(num_stages=2, as_json=True))
    plan = json.loads(capsys.readouterr().out)["plan"]
    (bind,) = (entry for entry in plan["resolved"] if entry["setting"] == "pipeline.bind")
    assert bind["value"] == "rank 0: 0-3 | rank 1: 4-7"
    assert plan["threads_per_rank"] == 4
