"""The progress engine: who is asked when, and what a pause gives way to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from mpipipe.progress import ProgressEngine, new_event_loop

LIMIT_S = 20


def on_loop(
    make: Callable[[], asyncio.AbstractEventLoop], body: Callable[[], Awaitable[None]]
) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await body()

    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(limited())


# The engine polls inside our own loop's wait, and from its coroutine on any other loop.
@pytest.fixture(params=[new_event_loop, asyncio.new_event_loop], ids=["own loop", "any loop"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[None]]], None]:
    return lambda body: on_loop(request.param, body)


Run = Callable[[Callable[[], Awaitable[None]]], None]


def test_a_poll_that_completes_something_wakes_the_task_that_waits_for_it(run: Run) -> None:
    async def body() -> None:
        engine = ProgressEngine()
        arrived: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        rounds = 0

        def poll() -> bool:
            nonlocal rounds
            rounds += 1
            if rounds != 500:  # well into the pauses
                return False
            arrived.set_result(7)
            return True

        engine.register(poll)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            assert await arrived == 7
            running.cancel()

    run(body)


def test_all_polls_are_asked_in_every_round_even_when_the_first_is_active(run: Run) -> None:
    async def body() -> None:
        engine = ProgressEngine()
        asked = [0, 0]

        def poller(index: int) -> Callable[[], bool]:
            def poll() -> bool:
                asked[index] += 1
                return index == 0

            return poll

        engine.register(poller(0))
        engine.register(poller(1))
        for _ in range(5):
            assert engine.poll()
        assert asked == [5, 5]

    run(body)


def test_an_unregistered_poll_is_not_asked_again_and_unregistering_twice_is_allowed() -> None:
    engine = ProgressEngine()
    asked: list[str] = []

    class Asked:
        def __init__(self, name: str) -> None:
            self.name = name

        def poll(self) -> bool:
            asked.append(self.name)
            return False

    unregister = engine.register(Asked("first").poll)
    engine.register(Asked("second").poll)
    unregister()
    unregister()
    engine.poll()
    assert asked == ["second"]


def test_an_error_in_a_poll_ends_run_with_that_error(run: Run) -> None:
    async def body() -> None:
        engine = ProgressEngine()

        def poll() -> bool:
            raise ValueError("the peer is gone")

        engine.register(poll)
        with pytest.raises(ValueError, match="the peer is gone"):
            await engine.run()

    run(body)


def test_the_loop_goes_on_after_run_was_cancelled(run: Run) -> None:
    async def body() -> None:
        engine = ProgressEngine()
        for _ in range(2):
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(engine.run())
                await asyncio.sleep(0)
                running.cancel()
        await asyncio.sleep(0.001)

    run(body)


def test_wake_cuts_a_nap_short(run: Run) -> None:
    """With pauses that cannot end by themselves, only a wake can lead to the next round."""

    async def body() -> None:
        engine = EndlessNaps(spin=0)
        noticed = asyncio.Event()
        posted = False

        def poll() -> bool:
            if posted:
                noticed.set()
            return posted

        engine.register(poll)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            for _ in range(5):
                await asyncio.sleep(0)
            posted = True
            engine.wake()
            await noticed.wait()
            running.cancel()

    run(body)


class EndlessNaps(ProgressEngine):
    def next_pause_s(self) -> float:
        return 3600.0


def test_other_tasks_and_timers_run_while_the_engine_is_active_all_the_time(run: Run) -> None:
    async def body() -> None:
        engine = ProgressEngine()
        engine.register(lambda: True)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            await asyncio.sleep(0.005)
            for _ in range(10):
                await asyncio.sleep(0)
            running.cancel()

    run(body)


def test_a_thread_can_hand_its_result_to_the_loop_while_the_engine_pauses(run: Run) -> None:
    async def body() -> None:
        engine = EndlessNaps(spin=0)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            with engine.computing():
                assert await asyncio.to_thread(lambda: 3) == 3
            running.cancel()

    run(body)


def pauses(engine: ProgressEngine, count: int) -> list[float]:
    return [engine.next_pause_s() for _ in range(count)]


def test_after_activity_the_engine_spins_then_pauses_ever_longer_up_to_a_limit() -> None:
    engine = ProgressEngine(spin=3)
    found = pauses(engine, 500)
    assert found[:3] == [0.0, 0.0, 0.0]
    backoffs = found[3:]
    assert backoffs[0] == pytest.approx(50e-6)
    assert backoffs == sorted(backoffs)
    assert backoffs[-1] == pytest.approx(40e-3)


def test_something_completed_makes_it_spin_again() -> None:
    engine = ProgressEngine(spin=2)
    pauses(engine, 100)
    engine.register(lambda: True)
    pauses(engine, 100)
    engine.poll()
    assert pauses(engine, 3)[:2] == [0.0, 0.0]


def test_while_computing_it_never_spins_and_pauses_at_least_200_us() -> None:
    engine = ProgressEngine(spin=100)
    with engine.computing():
        engine.wake()
        backoffs = pauses(engine, 50)
    assert min(backoffs) >= 200e-6
    assert max(backoffs) <= 4e-3


def test_computing_counts_threads_so_the_first_to_end_does_not_start_the_spinning() -> None:
    engine = ProgressEngine(spin=100)
    with engine.computing():
        with engine.computing():
            pass
        assert engine.next_pause_s() > 0
    assert engine.next_pause_s() == 0


def test_crowded_cores_shorten_the_spinning() -> None:
    roomy, crowded = ProgressEngine(spin=100), ProgressEngine(spin=100)
    roomy.share_cores(num_ranks=2, num_cores=2)
    crowded.share_cores(num_ranks=4, num_cores=2)
    assert pauses(roomy, 100) == [0.0] * 100
    assert pauses(crowded, 100).count(0.0) == 20
    crowded.wake()
    assert pauses(crowded, 100).count(0.0) == 20


def test_pauses_stay_short_while_a_large_transfer_moves_only_when_polled() -> None:
    engine = ProgressEngine(spin=0)
    engine.boost(+1)
    pressed = [engine.next_pause_s() for _ in range(400)]
    engine.boost(-1)
    free = [engine.next_pause_s() for _ in range(400)]
    assert max(pressed) == 1e-3
    assert max(free) > 1e-2
    engine.boost(+1)
    with engine.computing():
        assert (
            max(engine.next_pause_s() for _ in range(40)) > 1e-3
        )  # the compute thread comes first
