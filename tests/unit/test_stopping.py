"""The switch of one rank, and how the ranks tell each other."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpipipe.clock import MonotonicClock, ScriptedClock
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.errors import (
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    PeerLostError,
    StoppedByUserError,
    StoppedError,
)
from mpipipe.progress import ProgressEngine
from mpipipe.runtime import shared_stop
from mpipipe.runtime.ranks import Ranks
from mpipipe.runtime.shared_stop import watch_for_stop
from mpipipe.runtime.stop_switch import StopSwitch, keep_wall_time
from mpipipe.topology.launcher import Launcher, LaunchInfo

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("reason", ["the job's wall time ends", "SIGTERM on rank 1"])
def test_the_first_signal_of_a_rank_that_stops_already_is_no_second_one(reason: str) -> None:
    clock, codes = ScriptedClock(), list[int]()
    switch = StopSwitch(now_s=clock.now_s)
    switch.exit_now = codes.append
    switch.trip(reason)
    clock.advance(30.0)
    switch.signalled(signal.SIGUSR1)  # a site's own warning
    assert codes == []
    clock.advance(5.0)
    switch.signalled(signal.SIGTERM)
    assert codes == [EXIT_REQUEUE]


def test_ctrl_c_stops_in_order_too_with_its_own_exit_code() -> None:
    clock, codes = ScriptedClock(), list[int]()
    switch = StopSwitch(now_s=clock.now_s)
    switch.exit_now = codes.append
    switch.signalled(signal.SIGINT)
    assert switch.exit_code == EXIT_INTERRUPTED
    with pytest.raises(StoppedByUserError, match="SIGINT"):
        switch.check()
    clock.advance(5.0)
    switch.signalled(signal.SIGINT)
    assert codes == [EXIT_INTERRUPTED]
    told = StopSwitch()
    told.trip("SIGINT on rank 1")
    assert told.exit_code == EXIT_INTERRUPTED
    assert StopSwitch().exit_code == EXIT_REQUEUE


def test_many_threads_that_trip_at_once_give_one_reason() -> None:
    switch, start = StopSwitch(), threading.Barrier(8)

    def trip(number: int) -> None:
        start.wait(20)
        switch.signalled(number)

    numbers = [signal.SIGTERM, signal.SIGUSR1] * 4
    threads = [threading.Thread(target=trip, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert switch.reason in {"SIGTERM", "SIGUSR1"}


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


@dataclass(frozen=True, slots=True)
class Ended:
    """How a Python program ended."""

    code: int
    out: str
    err: str


def python(program: str, *, preexec: Callable[[], object] | None = None) -> Ended:
    """Run `program` in a process of its own, as signals are a process's; no rank, no Slurm."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "PMI", "OMPI_"))
    }
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=environ,
        preexec_fn=preexec,
    )
    return Ended(result.returncode, result.stdout, result.stderr)


_TAKING = """
import os, signal, threading
from mpipipe.runtime.stop_switch import StopSwitch, stop_signals

class Switch(StopSwitch):
    def signalled(self, number):
        print(signal.Signals(number).name, flush=True)
        taken.set()

taken = threading.Event()

def fire(*numbers):
    for number in numbers:
        taken.clear()
        os.kill(os.getpid(), number)
        assert taken.wait(20), number
"""
_ALL = "signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP"


def test_signals_are_taken_whatever_a_library_does_with_their_handlers() -> None:
    program = f"""{_TAKING}
with stop_signals(Switch()):
    for number in ({_ALL}):
        signal.signal(number, signal.SIG_DFL)  # would end the process
    fire({_ALL})
os.kill(os.getpid(), signal.SIGTERM)  # the exit code is decided: ignored
print("end")
"""
    ended = python(program)
    assert ended == Ended(0, "SIGTERM\nSIGUSR1\nSIGUSR2\nSIGINT\nSIGHUP\nend\n", "")


def test_signals_are_taken_when_a_librarys_thread_unblocks_them() -> None:
    program = f"""{_TAKING}
with stop_signals(Switch()):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    assert taken.wait(20)
"""
    assert python(program) == Ended(0, "SIGTERM\n", "")


def test_nohup_is_respected() -> None:
    program = f"""{_TAKING}
with stop_signals(Switch()):
    os.kill(os.getpid(), signal.SIGHUP)
    fire(signal.SIGTERM)
"""

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    assert python(program, preexec=ignore) == Ended(0, "SIGTERM\n", "")


def test_a_signal_wakes_the_loop() -> None:
    program = """
import asyncio, os, signal
from mpipipe.runtime.stop_switch import StopSwitch, stop_signals

async def wait(switch):
    asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGUSR2)
    async with asyncio.timeout(20):
        return await switch.tripped()

switch = StopSwitch()
with stop_signals(switch):
    print(asyncio.run(wait(switch)))
"""
    assert python(program) == Ended(0, "SIGUSR2\n", "")


@pytest.mark.parametrize(
    ("name", "code"), [("SIGUSR1", EXIT_REQUEUE), ("SIGINT", EXIT_INTERRUPTED)]
)
def test_a_signal_while_slurm_is_asked_and_modules_are_imported_stops_the_run_in_order(
    name: str, code: int
) -> None:
    program = f"""
import os, pathlib, signal, sys
import mpipipe.cli.run as run

def ask(switch, environ):
    os.kill(os.getpid(), signal.{name})

run.keep_wall_time = ask
sys.exit(run.run_command(pathlib.Path("never read.toml"), [], show=False, debug=False))
"""
    ended = python(program)
    assert ended.code == code
    assert f"told to stop ({name})" in ended.err
    assert "Traceback" not in ended.err


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
def test_any_rank_that_is_told_to_stop_stops_all_ranks(told: int) -> None:
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
    # Short is the limit of who waits in vain: the others may get no core for a moment.
    monkeypatch.setattr(shared_stop, "_HEAD_LIMIT_S" if silent == 0 else "_ANSWER_LIMIT_S", 0.05)

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
