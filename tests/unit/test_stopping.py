"""The switch of one rank, and how the ranks tell each other."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mpipipe.cli.run import run_command
from mpipipe.clock import MonotonicClock, ScriptedClock
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.errors import EXIT_REQUEUE, PeerLostError, StoppedError
from mpipipe.progress import ProgressEngine
from mpipipe.runtime import stopping
from mpipipe.runtime.launch import Ranks
from mpipipe.runtime.stopping import StopSwitch, keep_wall_time, stop_signals, watch_for_stop
from mpipipe.topology.launcher import Launcher, LaunchInfo


def test_the_first_reason_counts() -> None:
    switch = StopSwitch()
    assert switch.reason == ""
    switch.check()
    switch.trip("SIGTERM")
    switch.trip("SIGUSR1 on rank 1")
    assert switch.reason == "SIGTERM"
    with pytest.raises(StoppedError, match="SIGTERM"):
        switch.check()


def test_a_signal_that_is_sent_twice_at_once_is_one_and_a_later_one_ends_the_job() -> None:
    clock, codes = ScriptedClock(), list[int]()
    switch = StopSwitch(now_s=clock.now_s)
    switch.exit_now = codes.append
    switch.signalled(signal.SIGUSR1)
    clock.advance(0.5)
    switch.signalled(signal.SIGTERM)
    assert codes == []
    assert switch.reason == "SIGUSR1"
    clock.advance(5.0)
    switch.signalled(signal.SIGTERM)
    assert codes == [EXIT_REQUEUE]


def test_the_end_of_the_wall_time_trips_the_switch() -> None:
    clock = ScriptedClock()
    switch = StopSwitch(60.0, clock.now_s)
    clock.advance(59.0)
    assert (switch.reason, switch.seconds_left) == ("", 1.0)
    clock.advance(1.0)
    assert "wall time" in switch.reason


@pytest.mark.parametrize(
    ("environ", "left_s"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, 3600 - 60),  # a minute's margin …
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, 3600 - 60),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, None),  # the head's task
    ],
)
def test_the_head_of_a_job_stops_before_its_wall_time(
    environ: dict[str, str], left_s: float | None
) -> None:
    def run(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "1:00:00\n", "")

    switch = StopSwitch()
    keep_wall_time(switch, environ, run)
    left = switch.seconds_left
    assert left == (None if left_s is None else pytest.approx(left_s, abs=5))


def test_a_short_job_has_a_short_margin() -> None:
    def run(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "1:40\n", "")

    switch = StopSwitch()
    keep_wall_time(switch, {"SLURM_JOB_ID": "7"}, run)
    assert switch.seconds_left == pytest.approx(90, abs=5)


def test_signals_of_the_process_trip_the_switch_and_wake_the_loop() -> None:
    before = {number: signal.getsignal(number) for number in stopping._SIGNALS}

    async def wait(switch: StopSwitch) -> str:
        loop = asyncio.get_running_loop()
        loop.call_soon(os.kill, os.getpid(), signal.SIGUSR2)
        async with asyncio.timeout(20):
            return await switch.tripped()

    try:
        switch = StopSwitch()
        with stop_signals(switch):
            assert asyncio.run(wait(switch)) == "SIGUSR2"
        os.kill(os.getpid(), signal.SIGTERM)  # the exit code is decided: ignored
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def test_a_signal_while_slurm_is_asked_and_modules_are_imported_stops_the_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in stopping._SIGNALS}

    def ask(switch: StopSwitch, _: Mapping[str, str]) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr("mpipipe.cli.run.keep_wall_time", ask)
    for name in os.environ:
        if name.startswith(("SLURM_", "PMI", "OMPI_")):
            monkeypatch.delenv(name)
    try:
        code = run_command(tmp_path / "never read.toml", [], show=False, debug=False)
    finally:
        for number, action in before.items():
            signal.signal(number, action)
    assert code == EXIT_REQUEUE
    assert "told to stop (SIGUSR1)" in capsys.readouterr().err


def test_waiting_ends_with_the_wall_time_too() -> None:
    async def wait() -> str:
        async with asyncio.timeout(20):
            return await StopSwitch(0.01).tripped()

    assert "wall time" in asyncio.run(wait())


# ---- all ranks -----------------------------------------------------------------------------------


@asynccontextmanager
async def three_ranks() -> AsyncIterator[list[Ranks]]:
    engine, clock = ProgressEngine(), MonotonicClock()
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        polling = tasks.create_task(engine.run())
        ranks = []
        for channel in open_memory_channels(3, engine):
            mesh = Mesh(channel, engine, clock)
            mesh.start()
            info = LaunchInfo(Launcher.NONE)
            ranks.append(Ranks(mesh, engine, clock, info, tasks, "", None, StopSwitch()))
        yield ranks
        polling.cancel()


async def stop_at(told: int, ranks: list[Ranks], silent: Sequence[int] = ()) -> list[str]:
    """Trip one rank's switch; returns every watching rank's reason, and when the head stopped."""
    stopped = asyncio.Event()
    watching = [
        rank.tasks.create_task(watched(rank, stopped))
        for rank in ranks
        if rank.mesh.rank not in silent
    ]
    ranks[told].stop.signalled(signal.SIGTERM)
    await asyncio.wait(watching)
    return [await rank.stop.tripped() for rank in ranks if rank.mesh.rank not in silent]


async def watched(rank: Ranks, stopped: asyncio.Event) -> None:
    def stop() -> None:
        assert rank.mesh.is_head
        assert not stopped.is_set(), "the head is told once"
        stopped.set()

    async with watch_for_stop(rank, stop):
        await stopped.wait()
        await rank.mesh.barrier("end", 10.0)


@pytest.mark.parametrize("told", [0, 1, 2])
def test_whoever_is_told_to_stop_stops_all_ranks(told: int) -> None:
    async def run() -> list[str]:
        async with three_ranks() as ranks:
            return await stop_at(told, ranks)

    reasons = asyncio.run(run())
    assert all("SIGTERM" in reason for reason in reasons)
    if told:
        assert reasons[0] == f"SIGTERM on rank {told}"


def test_all_ranks_told_at_once_stop_once() -> None:
    async def run() -> None:
        async with three_ranks() as ranks:
            for rank in ranks[1:]:
                rank.stop.signalled(signal.SIGUSR1)
            assert await stop_at(0, ranks) == ["SIGTERM", "SIGUSR1", "SIGUSR1"]

    asyncio.run(run())


@pytest.mark.parametrize(("told", "silent"), [(0, 2), (1, 2), (1, 0)])
def test_a_rank_that_does_not_answer_is_named(
    told: int, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_ANSWER_LIMIT_S", 0.05)
    monkeypatch.setattr(stopping, "_HEAD_LIMIT_S", 0.1)

    async def run() -> None:
        async with three_ranks() as ranks:
            await stop_at(told, ranks, silent=[silent])

    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(run())
    group: BaseException = raised.value
    while isinstance(group, ExceptionGroup):
        group = group.exceptions[0]
    assert isinstance(group, PeerLostError)
    assert f"rank {silent}" in str(group)
    assert "SIGTERM" in str(group)
