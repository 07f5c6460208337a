"""The one component of a process that polls: it asks everything that can complete whether it has.

MPI has no file descriptor to wait on, so a process must ask again and again. After activity the
engine asks eagerly for a while, then it backs off: each pause is longer than the last, so that an
idle rank costs next to nothing. While this rank computes the engine never spins: the loop thread
would take the GIL, and perhaps the core, from the computing thread.

On the loop of `new_event_loop` the engine polls inside the loop's own wait, which makes a round
three times cheaper and lets a completion reach its task at once. On any other asyncio loop it polls
from its coroutine.

The channels register what is polled; this file knows neither MPI nor CUDA.

Invariants: everything runs in the event-loop thread; an error in a poll ends `run` with that error;
while steps run nothing else in mpipipe polls, except a profile (`bench.timeline`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import time
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

__all__ = ["ProgressEngine", "new_event_loop", "run_async"]

T = TypeVar("T")

_SPIN_TURNS = 300
# With fewer cores than ranks a spinning rank may take a neighbour's core: back off soon.
_SPIN_TURNS_CROWDED = 20
_FIRST_BACKOFF_S = (
    50e-6  # a shorter pause would not end sooner: the kernel adds as much (timer slack)
)
# Each pause is 3 % longer than the last, so a pause is about 3 % of the quiet time so far, and the
# engine notices a completion late by about 1.5 % of the time it took, however long that was.
_BACKOFF_GROWTH = 1.03
# One waking costs 100-600 µs of CPU on a virtual machine (60 µs of it the kernel's, the rest cold
# caches): pauses of 2 ms cost 6 % of a core there, of 20 ms 2.5 %, of 40 ms 1.7 %.
_MAX_BACKOFF_S = 40e-3
# While a step computes no task of this rank waits for a message; only large MPI transfers need a
# poll or two to get through their handshake.
_FIRST_COMPUTING_BACKOFF_S = 200e-6
_COMPUTING_BACKOFF_GROWTH = 1.5
_MAX_COMPUTING_BACKOFF_S = 4e-3
_MAX_BOOSTED_BACKOFF_S = 1e-3


class ProgressEngine:
    """Polls what is registered, eagerly after activity, rarely when idle.

    Args:
        spin: idle rounds after activity before the first pause; 0 never spins.
    """

    def __init__(self, *, spin: int = _SPIN_TURNS) -> None:
        self._spin = spin
        self._spins_left = spin
        self._backoff_s = 0.0
        self._polls: tuple[Callable[[], bool], ...] = ()
        self._num_computing = 0
        self._num_boosting = 0
        self._num_awaited = 0
        self._backoff_end: asyncio.Future[None] | None = None
        self._failure: asyncio.Future[None] | None = None

    def register(self, poll: Callable[[], bool]) -> Callable[[], None]:
        """Ask `poll` in every round; it must not block, and returns True if something completed.

        A task that a poll wakes while it returns False waits for the end of the pause.
        Returns the function that unregisters it (idempotent).
        """
        self._polls = (*self._polls, poll)
        self.wake()

        def unregister() -> None:
            # Bound methods are equal but not identical from one access to the next.
            self._polls = tuple(known for known in self._polls if known != poll)

        return unregister

    def share_cores(self, *, num_ranks: int, num_cores: int) -> None:
        """Spin less when `num_ranks` ranks of this host share `num_cores` usable cores."""
        if num_ranks > num_cores:
            self._spin = min(self._spin, _SPIN_TURNS_CROWDED)
            self._spins_left = min(self._spins_left, self._spin)

    def wake(self) -> None:
        """Poll eagerly again, at once: something may soon complete.

        From the event-loop thread only; other threads use `loop.call_soon_threadsafe`.
        """
        self._spins_left = self._spin
        self._backoff_s = 0.0
        if self._backoff_end is not None:
            _end(self._backoff_end)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """A thread of this rank computes while the body runs: no spinning. May nest."""
        self._num_computing += 1
        self._backoff_s = 0.0
        try:
            yield
        finally:
            self._num_computing -= 1
            self.wake()

    def boost(self, change: int) -> None:
        """Poll at least every millisecond for `change` more (or fewer) transfers under way.

        MPI moves a large tensor in pieces, some 100 KB per poll where it may not copy from process
        to process at once. 52 MB took 10 s with the pauses of an idle rank (Open MPI 5.0.8).
        """
        self._num_boosting += change
        assert self._num_boosting >= 0, "a transfer ended twice"

    def awaited(self, change: int) -> None:
        """The computing thread itself waits for `change` more (or fewer) things: poll eagerly."""
        self._num_awaited += change
        assert self._num_awaited >= 0, "what was awaited ended twice"
        self.wake()

    # ---- polling ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Poll until cancelled; the owner puts this into its TaskGroup.

        Raises:
            Exception: an error of a poll.
        """
        self.wake()
        loop: object = asyncio.get_running_loop()
        if not isinstance(loop, _PollingLoop):
            await self._run_from_coroutine()
        else:
            await self._run_from_selector(loop)

    async def _run_from_selector(self, loop: _PollingLoop) -> None:
        self._failure = loop.create_future()
        loop.attach(self)
        try:
            await self._failure
        finally:
            loop.attach(None)
            self._failure = None

    def poll(self) -> bool:
        """Ask everything once; True if something completed."""
        active = False
        for poll in self._polls:
            if poll():
                active = True
        if active:
            self.wake()
        return active

    def poll_guarded(self) -> bool:
        """`poll` for the selector: an error ends `run`, it does not go into the loop."""
        try:
            return self.poll()
        except Exception as error:  # noqa: BLE001 - raised by `run`
            assert self._failure is not None, "polled while not running"
            if not self._failure.done():
                self._failure.set_exception(error)
            return True

    def next_pause_s(self) -> float:
        """Seconds to pause before the next round; 0 to spin. Each call counts as one pause."""
        computes = self._num_computing > self._num_awaited
        if computes:
            backoff_s = max(self._backoff_s, _FIRST_COMPUTING_BACKOFF_S)
            self._backoff_s = min(backoff_s * _COMPUTING_BACKOFF_GROWTH, _MAX_COMPUTING_BACKOFF_S)
        elif self._spins_left > 0:
            self._spins_left -= 1
            return 0.0
        else:
            backoff_s = max(self._backoff_s, _FIRST_BACKOFF_S)
            self._backoff_s = min(backoff_s * _BACKOFF_GROWTH, _MAX_BACKOFF_S)
        if self._num_boosting and not computes:
            backoff_s = min(backoff_s, _MAX_BOOSTED_BACKOFF_S)
        return backoff_s

    async def _run_from_coroutine(self) -> None:
        while True:
            self.poll()
            pause_s = self.next_pause_s()
            if pause_s == 0:
                os.sched_yield()
                await asyncio.sleep(0)
            else:
                await self._back_off(pause_s)

    async def _back_off(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._backoff_end = loop.create_future()
        timer = loop.call_later(seconds, _end, self._backoff_end)
        try:
            await self._backoff_end
        finally:
            timer.cancel()
            self._backoff_end = None


def _end(backoff: asyncio.Future[None]) -> None:
    if not backoff.done():
        backoff.set_result(None)


# ---- the loop ------------------------------------------------------------------------------------

# Polling the file descriptors costs 3 µs, as much as a message; they carry only signals and the
# calls of other threads, which can wait for a few turns.
_TURNS_PER_POLL = 8

_Ready = list[tuple[selectors.SelectorKey, int]]


class _PollingSelector(selectors.SelectSelector):
    """Waits for file descriptors and lets the engine poll meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.engine: ProgressEngine | None = None
        self._turn = 0

    def _poll_descriptors(self) -> _Ready:
        """The descriptors that are ready, asked only every few turns while the loop is busy."""
        self._turn = (self._turn + 1) % _TURNS_PER_POLL
        return super().select(0) if self._turn == 0 else []

    def select(self, timeout: float | None = None) -> _Ready:
        """As in the base class; returns early, with nothing, when a poll completed something."""
        engine = self.engine
        if engine is None:
            return super().select(timeout)
        if engine.poll_guarded() or timeout == 0:
            return self._poll_descriptors()
        end_s = None if timeout is None else time.monotonic() + timeout
        while True:
            pause_s = engine.next_pause_s()
            if end_s is not None:
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    return super().select(0)
                pause_s = min(pause_s, left_s)
            if pause_s == 0:
                os.sched_yield()  # 0.3 µs; a rank that computes may have the core
                ready = self._poll_descriptors()
            else:
                ready = super().select(pause_s)
            if engine.poll_guarded() or ready:
                return ready


class _PollingLoop(asyncio.SelectorEventLoop):
    """asyncio's loop over a `_PollingSelector`, with a name for it."""

    def __init__(self, selector: _PollingSelector) -> None:
        super().__init__(selector)
        self._polling_selector = selector

    def attach(self, engine: ProgressEngine | None) -> None:
        """Let `engine` poll from now on; None: no engine."""
        self._polling_selector.engine = engine


def new_event_loop() -> asyncio.SelectorEventLoop:
    """The loop that mpipipe runs on.

    It waits with `select`, as epoll rounds every wait up to 1 ms: with pauses of 50 µs a message
    took 68 µs one way on `select`, 550 µs on asyncio's default loop.
    """
    return _PollingLoop(_PollingSelector())


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on the loop of `new_event_loop`, as `asyncio.run` does on its own."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
