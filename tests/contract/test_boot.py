"""The parts of a stage are closed, whoever fails, unless work that was given up may use them."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpipipe.abandoned import abandon, is_abandoned_work_running
from mpipipe.clock import MonotonicClock
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.errors import CheckpointError
from mpipipe.metrics.boot import BootTimeline
from mpipipe.metrics.log import NullLog
from mpipipe.planning.layout import Layout
from mpipipe.progress import ProgressEngine, new_event_loop
from mpipipe.runtime import boot as boot_module
from mpipipe.runtime.boot import _load
from mpipipe.runtime.ranks import AgreedError, Ranks
from mpipipe.topology.launcher import Launcher, LaunchInfo
from tests.contract.engine_pipeline import engine_plan

LIMIT_S = 20.0


class Parts:
    """Tells whether it was closed."""

    load_warnings: tuple[str, ...] = ()
    is_closed = False

    def close(self) -> None:
        self.is_closed = True


def load_on_two_ranks(monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> tuple[Parts, bool]:
    """The parts of rank 0, when all is over, and whether they were open behind the load.

    Rank 1 fails, if wanted, when rank 0 has loaded.
    """
    parts, loaded = Parts(), threading.Event()
    plan = engine_plan(2)

    def load_parts(_plan: object, stage: Any, *_: object, **__: object) -> Parts:
        if stage.stage == 0:
            loaded.set()
            return parts
        assert loaded.wait(LIMIT_S)
        if fails:
            raise CheckpointError("a file is broken")
        return Parts()

    async def one(ranks: Ranks) -> bool:
        loading = SimpleNamespace(
            ranks=ranks,
            layout=Layout((plan.ranks,)),
            log=NullLog(),
            loaded=SimpleNamespace(
                config=SimpleNamespace(model=SimpleNamespace(trust_remote_code=False))
            ),
        )
        stage = plan.stages[ranks.mesh.rank]
        with ExitStack() as opened:
            try:
                await _load(loading, (plan,), stage, torch.device("cpu"), opened, links=None)  # type: ignore[arg-type]
            except AgreedError:
                assert fails
            return not parts.is_closed

    async def main() -> list[bool]:
        engine, clock, info = ProgressEngine(), MonotonicClock(), LaunchInfo(Launcher.HYDRA)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(engine.run())
            running = []
            for channel in open_memory_channels(2, engine):
                mesh, timeline = Mesh(channel, engine, clock), BootTimeline(clock)
                ranks = Ranks(mesh, engine, clock, info, tasks, "", None, boot=timeline)
                mesh.start()
                running.append(tasks.create_task(one(ranks)))
            outcomes = await asyncio.gather(*running)
            polling.cancel()
        return outcomes

    monkeypatch.setattr(boot_module, "load_parts", load_parts)
    monkeypatch.setattr(boot_module, "stage_bytes", lambda *_: {})
    monkeypatch.setattr(boot_module, "prepare_offload_folder", lambda *_, **__: None)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return parts, runner.run(main())[0]


@pytest.mark.parametrize("fails", [False, True])
def test_parts_are_closed_also_where_the_load_of_another_rank_fails(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, was_open = load_on_two_ranks(monkeypatch, fails=fails)
    assert parts.is_closed
    assert was_open


def test_parts_stay_open_while_abandoned_work_may_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    abandon(lambda: not ended.is_set())
    parts, _ = load_on_two_ranks(monkeypatch, fails=False)
    ended.set()
    assert not parts.is_closed
    assert not is_abandoned_work_running()
