"""From processes to ranks that know each other, and back: the outermost frame of every command.

An error that all ranks agreed on (`AgreedError`) ends them in order, with MPI finalised. Any other
exception on one rank is told on its own standard error and aborts the job, so that no rank hangs.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from mpipipe.abandoned import abandon, is_abandoned_work_running
from mpipipe.clock import Clock, MonotonicClock
from mpipipe.control_plane.channel import Channel
from mpipipe.control_plane.heartbeats import Heartbeats, Vitals
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.control_plane.probe import RawMessages
from mpipipe.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EnvironmentSetupError,
    MpipipeError,
    PeerLostError,
)
from mpipipe.metrics.boot import BootTimeline
from mpipipe.progress import ProgressEngine
from mpipipe.runtime.memory_shortage import memory_shortage
from mpipipe.runtime.stop_switch import StopSwitch
from mpipipe.topology.host import host_name
from mpipipe.topology.launcher import LaunchInfo, check_pmi, check_world_size, detect

__all__ = [
    "AgreedError",
    "PhaseThread",
    "Ranks",
    "in_phase",
    "leave",
    "open_ranks",
    "share_exit_code",
    "told_by_head",
]

T = TypeVar("T")

# Loading a large model from a busy parallel file system takes minutes, and every rank waits for the
# slowest. A rank that dies meanwhile is noticed by the launcher, not by this deadline.
PHASE_DEADLINE_S = 3600.0
_TELL_S = 0.25
_TOLD_ELSEWHERE_S = 1.5


class AgreedError(Exception):
    """An error that every rank knows of: all leave together, in order."""

    def __init__(self, error: MpipipeError) -> None:
        super().__init__(str(error))
        self.error = error


class PhaseThread:
    """The one thread that does a rank's blocking work, while the event loop goes on polling.

    Importing torch, loading weights and capturing graphs take from seconds to minutes. The event
    loop must hear the other ranks and a signal meanwhile, and MPI may be called from its thread
    only. One thread for all phases, as torch keeps the current device, stream and modes per thread.

    Work that was given up goes on in its thread until the process ends: the interpreter waits for
    it at exit, `os._exit` does not (`leave`).
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "phase")

    def begin(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Start `work`; the future has what it returns or raises. Cancelling gives it up."""
        running = self._executor.submit(work)
        begun: asyncio.Future[T] = asyncio.wrap_future(running)

        def note(ended: asyncio.Future[T]) -> None:
            if ended.cancelled() and not running.done():
                abandon(lambda: not running.done())

        begun.add_done_callback(note)
        return begun

    def close(self) -> None:
        """Take no more work; does not wait for what is running."""
        self._executor.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank among the others."""

    mesh: Mesh
    engine: ProgressEngine
    clock: Clock
    info: LaunchInfo
    tasks: asyncio.TaskGroup  # holds what runs as long as the session
    mpi_library: str  # what it calls itself, one line; "" without MPI
    raw: RawMessages | None  # plain MPI, to measure against; None without MPI
    stop: StopSwitch = field(default_factory=StopSwitch)  # never tripped unless given
    phase_thread: PhaseThread = field(default_factory=PhaseThread)
    phase_ended_s: dict[str, float] = field(default_factory=dict)  # in seconds of the clock
    boot: BootTimeline = field(default_factory=lambda: BootTimeline(MonotonicClock()))
    # Told of each phase that ended well: its name, seconds of this rank's own work, seconds waited.
    on_phase: list[Callable[[str, float, float], object]] = field(default_factory=list)
    vitals: Vitals = field(default_factory=Vitals)  # no heartbeats until it has a timeout
    # Bytes of this rank by what they are for, once planned: for the sentence when memory runs out.
    memory_needs: dict[str, int] = field(default_factory=dict)
    # Told the error that ends the ranks early, the first one and not what followed from it.
    on_failure: list[Callable[[BaseException], None]] = field(default_factory=list)

    @property
    def is_head(self) -> bool:
        """Whether this rank decides."""
        return self.mesh.is_head


async def in_phase(
    ranks: Ranks,
    phase: str,
    work: Callable[[], T],
    deadline_s: float = PHASE_DEADLINE_S,
    *,
    stoppable: bool = True,
) -> T:
    """Do `work` in this rank's phase thread, then agree with all others that theirs went well.

    The event loop goes on polling. A rank that is told to stop does not begin, or gives its work
    up, unless `stoppable` is off; so does a rank when another rank has failed meanwhile. In the
    boot, the time after a rank's own work is `wait`.

    Raises:
        AgreedError: the work of some rank failed; raised on every rank.
    """
    ranks.vitals.phase = phase
    began_s = ranks.clock.now_s()
    judging = ranks.tasks.create_task(_verdict(ranks.mesh, phase, deadline_s), name="verdict")
    begun: list[asyncio.Future[Any]] = [judging]
    error: MpipipeError | None = None
    try:
        try:
            if stoppable:
                ranks.stop.check()
                begun.append(ranks.tasks.create_task(ranks.stop.tripped(), name="stop in a phase"))
            working = ranks.phase_thread.begin(work)
            begun.append(working)
            with ranks.engine.computing():  # no spinning beside the thread
                await asyncio.wait(begun, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
            elif stoppable:
                ranks.stop.check()
        except Exception as caught:
            error = _for_the_user(caught, ranks)
            if error is None:
                raise
        if not judging.done():
            ranks.mesh.report(phase, error)
        agreed = await _outcome(ranks, phase, judging, began_s)
        if agreed is not None:
            raise _agreed(error, agreed) from error
        return working.result()
    finally:
        for future in begun:
            future.cancel()
        await asyncio.wait(begun)


async def _outcome(
    ranks: Ranks, phase: str, judging: asyncio.Future[MpipipeError | None], began_s: float
) -> MpipipeError | None:
    """What the ranks agree on; this one's own work, which `began_s`, is done."""
    done_s = ranks.clock.now_s()
    with ranks.boot.waiting(phase):
        agreed = await judging
    if agreed is None:
        ended_s = ranks.phase_ended_s[phase] = ranks.clock.now_s()
        for tell in ranks.on_phase:
            tell(phase, done_s - began_s, ended_s - done_s)
    return agreed


async def told_by_head(ranks: Ranks, phase: str, work: Callable[[], bytes]) -> bytes:
    """Do `work` on the head, in a phase of all ranks; every rank gets what it returns.

    Raises:
        AgreedError: it failed; raised on every rank.
    """
    payload = await in_phase(ranks, phase, lambda: work() if ranks.is_head else None)
    return await ranks.mesh.broadcast(phase, payload, PHASE_DEADLINE_S)


async def share_exit_code(ranks: Ranks, exit_code: int, deadline_s: float) -> int:
    """The head's exit code on every rank: launchers report whichever they see first."""
    payload = str(exit_code).encode() if ranks.is_head else None
    return int(await ranks.mesh.broadcast("exit code", payload, deadline_s))


def _agreed(own: MpipipeError | None, agreed: MpipipeError) -> AgreedError:
    """This rank's own error, or the one of another, with the exit code of all."""
    told = own or agreed
    told.exit_code = agreed.exit_code  # launchers mix different ones: MPICH's `or`s them
    return AgreedError(told)


def _for_the_user(error: BaseException, ranks: Ranks) -> MpipipeError | None:
    """The sentence that `error` is to a user; None: it is a bug."""
    shortage = memory_shortage(error, ranks.memory_needs)
    return shortage or (error if isinstance(error, MpipipeError) else None)


async def _verdict(mesh: Mesh, phase: str, deadline_s: float) -> MpipipeError | None:
    """What the ranks agree on; returned, as an error of a task would end the task group."""
    try:
        await mesh.verdict(phase, deadline_s)
    except MpipipeError as agreed:
        return agreed
    return None


@asynccontextmanager
async def open_ranks(
    clock: Clock,
    *,
    stop: StopSwitch | None = None,
    boot: BootTimeline | None = None,
    debug: bool = False,
) -> AsyncIterator[Ranks]:
    """Join the other ranks of this launch; leave them in order, or abort them all.

    `stop` is tripped by what may end the run early; without it, nothing does. `boot` has what this
    process did so far; without it, the boot begins here.

    Raises:
        MpipipeError: the error that all ranks agreed on, or MPI could not be set up.
    """
    boot = boot or BootTimeline(clock)
    boot.begin("mpi")
    info = detect(os.environ)
    engine = ProgressEngine()
    opened = _open_channel(info, engine)
    mesh = Mesh(opened.channel, engine, clock)
    switch = stop or StopSwitch()
    if mesh.world_size > 1:
        switch.exit_now = mesh.abort
    library, raw = opened.mpi_library, opened.raw
    ranks: Ranks | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            ranks = Ranks(mesh, engine, clock, info, tasks, library, raw, switch, boot=boot)
            async with _in_touch(ranks):
                yield ranks
    except BaseException as raised:  # noqa: BLE001 - the supervisor: no rank may be left waiting
        assert ranks is not None
        error = _first(raised)
        is_agreed = isinstance(error, AgreedError)
        told = error.error if isinstance(error, AgreedError) else error
        told = _for_the_user(told, ranks) or told
        try:
            for tell in ranks.on_failure:
                tell(told)
        finally:  # whatever becomes of them, the others do not wait
            if mesh.world_size > 1 and not is_agreed:
                _tell_and_abort(mesh, told, debug=debug)
        raise told from error.__cause__


@asynccontextmanager
async def _in_touch(ranks: Ranks) -> AsyncIterator[None]:
    """While inside, messages and heartbeats flow; then all ranks close the channel together."""
    polling = ranks.tasks.create_task(ranks.engine.run(), name="progress")
    ranks.mesh.start()
    beating = ranks.tasks.create_task(_beat(ranks), name="heartbeats")
    try:
        yield
    except AgreedError as agreed:
        beating.cancel()
        try:
            await ranks.mesh.aclose()
        except MpipipeError:
            # Some rank cannot leave in order: tell the cause, not that, and abort.
            raise agreed.error from agreed.__cause__
        raise
    beating.cancel()
    await ranks.mesh.aclose()
    polling.cancel()
    ranks.phase_thread.close()


async def _beat(ranks: Ranks) -> None:
    """Tell and hear that ranks are alive; a single rank has no other to hear.

    Raises:
        PeerLostError: through `ranks.tasks`: a rank is silent.
    """
    if ranks.mesh.world_size > 1:
        await Heartbeats(ranks.mesh, ranks.clock, host_name(), ranks.vitals).run()


@dataclass(frozen=True, slots=True)
class _Opened:
    channel: Channel
    mpi_library: str = ""
    raw: RawMessages | None = None


def _open_channel(info: LaunchInfo, engine: ProgressEngine) -> _Opened:
    """MPI when ranks were launched; one process needs none, and none may be installed."""
    if not info.mpi_expected:
        check_world_size(info, 1)
        return _Opened(open_memory_channels(1, engine)[0])
    from mpipipe.control_plane import mpi

    library = mpi.library_version()
    check_pmi(info, library)
    channel = mpi.open_mpi_control_channel(engine, init_limit_s=_init_limit_s())
    check_world_size(info, channel.world_size, library)
    return _Opened(channel, library.partition("\n")[0], channel)


def _init_limit_s() -> float:
    """How long MPI may take to start: MPIPIPE_INIT_TIMEOUT_S, or two minutes."""
    try:
        return float(os.environ.get("MPIPIPE_INIT_TIMEOUT_S", "120"))
    except ValueError:
        raise EnvironmentSetupError(
            f"MPIPIPE_INIT_TIMEOUT_S={os.environ['MPIPIPE_INIT_TIMEOUT_S']} is no number: "
            "give seconds"
        ) from None


def _first(raised: BaseException) -> BaseException:
    """The first real error of a task group's exception group."""
    while isinstance(raised, BaseExceptionGroup):
        raised = raised.exceptions[0]
    return raised


def _tell_and_abort(mesh: Mesh, error: BaseException, *, debug: bool) -> None:
    """Say which rank failed and why, then end all ranks: the others cannot go on without it."""
    exit_code = EXIT_BUG
    if isinstance(error, MpipipeError):
        exit_code = error.exit_code
    elif isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
        exit_code = EXIT_INTERRUPTED
    if isinstance(error, PeerLostError) and error.told_by is not None:
        time.sleep(_TOLD_ELSEWHERE_S)  # that rank tells the user and ends us all; if it can
        mesh.abort(exit_code)
    where = f"rank {mesh.rank} on {host_name()}"
    if isinstance(error, MpipipeError) and not debug:
        text = f"mpipipe: error: {where}: {error}"
    elif exit_code == EXIT_INTERRUPTED:
        text = f"mpipipe: interrupted: {where} ends the job"
    else:
        trace = "".join(traceback.format_exception(error))
        text = f"mpipipe: {where} failed unexpectedly and ends the job:\n{trace}"
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the process ends in the next lines
    # MPICH's launcher forwards a rank's text from another process, and drops what it has not read
    # when the abort comes: at once after the text, one time in five.
    time.sleep(_TELL_S)
    mesh.abort(exit_code)


def leave(exit_code: int) -> NoReturn:
    """End this process with `exit_code`; does not wait for work that was given up."""
    if not is_abandoned_work_running():
        sys.exit(exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    if "mpipipe.control_plane.mpi" in sys.modules:
        from mpipipe.control_plane import mpi

        mpi.end_process(exit_code)
    os._exit(exit_code)
