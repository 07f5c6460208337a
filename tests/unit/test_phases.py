"""The blocking work of boot: in a thread, given up when a rank is stopped or another one fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from mpipipe.abandoned import is_abandoned_work_running
from mpipipe.clock import Clock, MonotonicClock, ScriptedClock
from mpipipe.control_plane import mesh as mesh_module
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.errors import CheckpointError, ConfigError, MpipipeError, RemoteError, StoppedError
from mpipipe.metrics.boot import BootTimeline
from mpipipe.progress import ProgressEngine, new_event_loop
from mpipipe.runtime.ranks import (
    AgreedError,
    Ranks,
    in_phase,
    leave,
)
from mpipipe.topology.launcher import Launcher, LaunchInfo

LIMIT_S = 20.0
Work = Callable[[Ranks], object]


def run_phase(
    works: list[Work],
    during: Callable[[list[Ranks]], None] = lambda _: None,
    *,
    stoppable: bool = True,
    clock: Clock | None = None,
) -> list[object]:
    """One phase of virtual ranks: each one's result, or the error that was agreed on."""

    async def one(rank: Ranks, work: Work) -> object:
        try:
            return await in_phase(rank, "load", lambda: work(rank), LIMIT_S, stoppable=stoppable)
        except AgreedError as agreed:
            return agreed.error

    async def main() -> list[object]:
        engine, info = ProgressEngine(), LaunchInfo(Launcher.HYDRA)
        now = clock or MonotonicClock()
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(engine.run())
            ranks = []
            for channel in open_memory_channels(len(works), engine):
                mesh, boot = Mesh(channel, engine, now), BootTimeline(now)
                ranks.append(Ranks(mesh, engine, now, info, tasks, "", None, boot=boot))
                ranks[-1].mesh.start()
            running = [
                tasks.create_task(one(rank, work)) for rank, work in zip(ranks, works, strict=True)
            ]
            turn = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(turn.set_result, None)
            await turn  # every rank has begun
            during(ranks)
            outcomes = await asyncio.gather(*running)
            polling.cancel()
            for rank in ranks:
                rank.phase_thread.close()
        return outcomes

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main())


class Stuck:
    """Work that does not end before the test does, as an import from a busy file system."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._end = threading.Event()

    def __call__(self, _: Ranks) -> None:
        self.begun.set()
        self._end.wait(LIMIT_S)

    def end(self) -> None:
        self._end.set()


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    work = Stuck()
    yield work
    work.end()
    while is_abandoned_work_running():  # threads of this test are none of the next one's
        threading.Event().wait(0.001)


def test_the_work_is_done_beside_the_event_loop() -> None:
    threads: list[int] = []

    def work(ranks: Ranks) -> int:
        threads.append(threading.get_ident())
        return ranks.mesh.rank

    assert run_phase([work, work]) == [0, 1]
    assert threading.get_ident() not in threads


def test_own_work_and_waiting_for_others_are_told_apart() -> None:
    """Rank 1 is done at once; rank 0 takes 5 s from when rank 1 waits for it."""
    clock, told = ScriptedClock(10.0), dict[int, tuple[str, float, float]]()
    all_ranks: list[Ranks] = []

    def prepare(ranks: list[Ranks]) -> None:
        for rank in ranks:
            number = rank.mesh.rank
            rank.on_phase.append(lambda *facts, number=number: told.update({number: facts}))
            rank.boot.begin("plan")
        all_ranks.extend(ranks)

    def work(ranks: Ranks) -> None:
        if ranks.mesh.rank == 0:
            while not all_ranks or all_ranks[1].boot.open_part != "wait":
                threading.Event().wait(0.001)
            clock.advance(5.0)

    def boots() -> list[list[tuple[str, float, str]]]:
        return [
            [(part.name, part.seconds, part.phase) for part in rank.boot.parts]
            for rank in all_ranks
        ]

    run_phase([work, work], prepare, clock=clock)
    assert told == {0: ("load", 5.0, 0.0), 1: ("load", 0.0, 5.0)}
    assert boots() == [[("plan", 5.0, "")], [("wait", 5.0, "load")]]


@pytest.mark.parametrize("told", [0, 1, 2])
def test_a_stop_on_any_rank_gives_the_work_of_all_up(told: int, stuck: Stuck) -> None:
    def stop(ranks: list[Ranks]) -> None:
        assert stuck.begun.wait(LIMIT_S)
        ranks[told].stop.trip("SIGTERM")

    outcomes = run_phase([stuck] * 3, stop)
    assert [isinstance(outcome, MpipipeError) for outcome in outcomes] == [True] * 3
    assert {outcome.exit_code for outcome in outcomes if isinstance(outcome, MpipipeError)} == {75}
    assert isinstance(outcomes[told], StoppedError)
    assert all("SIGTERM" in str(outcome) for outcome in outcomes)
    assert is_abandoned_work_running()


def test_a_rank_that_is_stopped_already_does_not_begin() -> None:
    done: list[int] = []

    def stop_first(ranks: Ranks) -> None:
        done.append(ranks.mesh.rank)

    async def main() -> None:
        engine, clock, info = ProgressEngine(), MonotonicClock(), LaunchInfo(Launcher.NONE)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(engine.run())
            mesh = Mesh(open_memory_channels(1, engine)[0], engine, clock)
            mesh.start()
            ranks = Ranks(mesh, engine, clock, info, tasks, "", None)
            ranks.stop.trip("SIGUSR1")
            with pytest.raises(AgreedError, match="SIGUSR1"):
                await in_phase(ranks, "load", lambda: stop_first(ranks))
            assert await in_phase(ranks, "merge", lambda: 5, stoppable=False) == 5
            polling.cancel()

    asyncio.run(main())
    assert done == []


def test_a_phase_that_must_end_is_not_given_up() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def merge(_: Ranks) -> str:
        begun.set()
        go_on.wait(LIMIT_S)
        return "merged"

    def stop(ranks: list[Ranks]) -> None:
        assert begun.wait(LIMIT_S)
        ranks[0].stop.trip("SIGTERM")
        go_on.set()

    assert run_phase([merge, lambda _: "waited"], stop, stoppable=False) == ["merged", "waited"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_ends_the_others_although_they_are_busy(
    failing: int, stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh_module, "_GRACE_S", 0.05)

    def fail(_: Ranks) -> None:
        assert stuck.begun.wait(LIMIT_S)
        raise CheckpointError("no such model")

    works: list[Work] = [stuck, stuck]
    works[failing] = fail
    outcomes = run_phase(works)
    assert isinstance(outcomes[failing], CheckpointError)
    other = outcomes[1 - failing]
    assert isinstance(other, RemoteError)
    assert (other.rank, other.exit_code) == (failing, 3)


def test_the_lowest_rank_s_error_is_the_one_that_is_told() -> None:
    def fail(ranks: Ranks) -> None:
        raise ConfigError(f"wrong on {ranks.mesh.rank}")

    outcomes = run_phase([lambda _: None, fail, fail])
    assert "rank 1: wrong on 1" in str(outcomes[0])


def test_ranks_that_fail_for_different_reasons_end_with_one_exit_code() -> None:
    meet = threading.Barrier(2, timeout=LIMIT_S)

    def fail_as(error: MpipipeError) -> Work:
        def fail(_: Ranks) -> None:
            meet.wait()
            raise error

        return fail

    outcomes = run_phase([fail_as(CheckpointError("no model")), fail_as(ConfigError("no prompts"))])
    assert [str(outcome) for outcome in outcomes] == ["no model", "no prompts"]
    codes = [outcome.exit_code for outcome in outcomes if isinstance(outcome, MpipipeError)]
    assert codes == [CheckpointError.exit_code] * 2


def test_leaving_waits_for_no_work_that_was_given_up(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit(code)

    def stop(ranks: list[Ranks]) -> None:
        assert stuck.begun.wait(LIMIT_S)
        ranks[0].stop.trip("SIGTERM")

    monkeypatch.setattr("mpipipe.runtime.ranks.os._exit", end)
    with pytest.raises(SystemExit):
        leave(5)
    assert ended == []  # in the ordinary way
    run_phase([stuck], stop)
    with pytest.raises(SystemExit):
        leave(75)
    assert ended == [75]
