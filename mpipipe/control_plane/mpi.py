"""Control frames over MPI. Importing this file loads MPI: import it late.

Receives are pre-posted (`receive_ring`). Longer frames travel in fragments, marked by their tag.
All calls come from the event-loop thread (THREAD_FUNNELED), on a private duplicate of the world.
The exception is `abort`: a second signal, or the loss of the supervisor, calls it from its own
thread. Tensors travel through `data_plane.mpi`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NoReturn

import mpi4py

from mpipipe.control_plane.launch_watch import launch_watch
from mpipipe.control_plane.mailbox import Mailbox
from mpipipe.control_plane.pmi_relay import short_pmi_values
from mpipipe.control_plane.receive_ring import ReceiveRing
from mpipipe.errors import ChannelClosedError, DeadlineError, EnvironmentSetupError, PeerLostError
from mpipipe.topology.launcher import Launcher, detect

if "mpi4py.MPI" not in sys.modules:
    # Init and Finalize are ours: Init under a watch, Finalize only after an orderly end.
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    mpi4py.rc.thread_level = "funneled"
try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    raise EnvironmentSetupError(
        f"MPI could not be loaded ({str(error).splitlines()[0]}): install one with `pip install "
        "mpipipe[mpich]`, load your site's MPI module, or run a single stage without mpirun or srun"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpipipe.progress import ProgressEngine

__all__ = [
    "MpiChannel",
    "end_process",
    "finalize",
    "library_version",
    "module_file",
    "open_mpi_control_channel",
    "thread_level",
]

_SLOT_BYTES = 32 * 1024
# Receive slots over all sources, and at least per source: so many frames may arrive between two
# polls before MPI has to copy them aside. 2 MiB of memory up to 17 ranks.
_NUM_SLOTS, _MIN_SLOTS = 64, 4
# Tags: what a piece is to the frame it belongs to.
_WHOLE, _MORE, _LAST, _QUIET = 1, 2, 3, 4
_RAW = 4  # on the world itself, where nothing else travels
_CLOSE_LIMIT_S = 30.0
_CLOSE_POLL_S = 0.5e-3
# An Abort that hangs is cut short by the kernel: mpi4py holds the GIL in it.
_ABORT_LIMIT_S = 5
_LAUNCHER_LIMIT_S = 1.0

_open_channels: set[MpiChannel] = set()  # not yet closed in order


def open_mpi_control_channel(engine: ProgressEngine, *, init_limit_s: float = 120.0) -> MpiChannel:
    """Start MPI unless it is started, and open this rank's channel. Collective.

    When MPI does not start within `init_limit_s` the process ends with exit code 5.
    """
    if not MPI.Is_initialized():
        with launch_watch(init_limit_s), short_pmi_values(os.environ):
            MPI.Init_thread(MPI.THREAD_FUNNELED)
        atexit.register(finalize)
    communicator = MPI.COMM_WORLD.Dup()
    communicator.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py raises MPI.Exception
    channel = MpiChannel(communicator, engine)
    _open_channels.add(channel)
    channel.start()
    return channel


class MpiChannel:
    """This rank's end of the control plane.

    Args:
        communicator: private; freed by `aclose`.
        engine: polls.
    """

    def __init__(self, communicator: MPI.Intracomm, engine: ProgressEngine) -> None:
        self._communicator = communicator
        self._engine = engine
        self._rank = communicator.Get_rank()
        self._world_size = communicator.Get_size()
        self._inbox: Mailbox[tuple[int, bytes]] = Mailbox(
            f"the control channel of rank {self._rank}"
        )
        self._rings: list[ReceiveRing[MPI.Status]] = []
        self._status = MPI.Status()
        self._pieces: dict[int, list[bytes]] = {}  # of unfinished frames, by source
        self._sends: deque[MPI.Request] = deque()  # unfinished; each keeps its buffer alive
        self._unregister: Callable[[], None] | None = None
        self._closed = False

    @property
    def rank(self) -> int:
        """The own number, from 0."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    def start(self) -> None:
        """Post the receives and let the engine poll."""
        num_slots = max(_MIN_SLOTS, _NUM_SLOTS // max(self._world_size - 1, 1))
        for source in range(self._world_size):
            if source != self._rank:
                slots = [bytearray(_SLOT_BYTES) for _ in range(num_slots)]
                receives = [
                    self._communicator.Recv_init([slot, MPI.BYTE], source, MPI.ANY_TAG)
                    for slot in slots
                ]
                MPI.Prequest.Startall(receives)
                self._rings.append(ReceiveRing(source, slots, receives))
        self._unregister = self._engine.register(self._poll)

    # ---- sending ---------------------------------------------------------------------------------

    def send_nowait(self, to: int, frame: bytes, *, quiet: bool = False) -> None:
        """Start sending. Raises as in the contract, and PeerLostError when MPI says so."""
        if self._closed:
            raise ChannelClosedError(f"rank {self._rank} sent to rank {to} after closing")
        if not 0 <= to < self._world_size:
            raise ValueError(f"there is no rank {to}: ranks are 0 to {self._world_size - 1}")
        if to == self._rank:
            self._inbox.put((to, frame))
        else:
            try:
                self._send_pieces(to, frame, _QUIET if quiet else _WHOLE)
            except MPI.Exception as error:
                raise _lost_peer(f"sending to rank {to}", error) from error
        if not quiet:
            self._engine.wake()

    def _send_pieces(self, to: int, frame: bytes, tag: int) -> None:
        if len(frame) <= _SLOT_BYTES:
            self._send_piece(to, frame, tag)
            return
        view = memoryview(frame)
        for start in range(0, len(frame), _SLOT_BYTES):
            end = start + _SLOT_BYTES
            self._send_piece(to, view[start:end], _LAST if end >= len(frame) else _MORE)

    def _send_piece(self, to: int, piece: bytes | memoryview, tag: int) -> None:
        request = self._communicator.Isend([piece, MPI.BYTE], to, tag)
        if not request.Test():  # short messages are mostly done at once
            self._sends.append(request)

    # ---- receiving -------------------------------------------------------------------------------

    def receive_nowait(self) -> tuple[int, bytes] | None:
        """The next frame that was polled already, or None. Raises as in the contract."""
        return self._inbox.get_nowait()

    def _poll(self) -> bool:
        try:
            finished = self._finish_sends()
            return self._finish_receives() or finished
        except MPI.Exception as error:
            raise _lost_peer("polling", error) from error

    def _finish_sends(self) -> bool:
        # Oldest first, and no further than the first unfinished one: a flood of thousands must not
        # be looked through at every poll (it cost 250 µs a poll with Testsome).
        progressed = False
        while self._sends and self._sends[0].Test():
            self._sends.popleft()
            progressed = True
        return progressed

    def _finish_receives(self) -> bool:
        progressed = False
        for ring in self._rings:
            for _ in range(len(ring)):
                if (piece := ring.next_piece(self._status)) is None:
                    break
                tag = self._status.Get_tag()
                self._take_piece(ring.source, tag, piece)
                progressed = progressed or tag != _QUIET
        return progressed

    def _take_piece(self, source: int, tag: int, piece: bytes) -> None:
        if tag in {_WHOLE, _QUIET}:
            self._inbox.put((source, piece))
            return
        pieces = self._pieces.setdefault(source, [])
        pieces.append(piece)
        if tag == _LAST:
            self._inbox.put((source, b"".join(self._pieces.pop(source))))

    # ---- ending ----------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Finish sending, wait until every rank closes, release.

        Polls by itself, as the engine may have stopped. MPI itself is finalized when the process
        exits, as it cannot be initialised again for a second pipeline.
        """
        if self._closed:
            return
        self._closed = True
        limit_s = time.monotonic() + _CLOSE_LIMIT_S
        await self._poll_until(lambda: not self._sends, limit_s)
        barrier = self._communicator.Ibarrier()
        await self._poll_until(barrier.Test, limit_s)
        if self._unregister is not None:
            self._unregister()
        self._inbox.close()
        for ring in self._rings:
            ring.free()
        self._communicator.Free()
        _open_channels.discard(self)

    async def _poll_until(self, condition: Callable[[], bool], limit_s: float) -> None:
        while not condition():
            if time.monotonic() >= limit_s:
                raise DeadlineError(
                    f"rank {self._rank} could not close its control channel within "
                    f"{_CLOSE_LIMIT_S:g} s because another rank did not close its own; most likely "
                    "that rank hangs or died: see its log"
                )
            if not self._poll():
                await asyncio.sleep(_CLOSE_POLL_S)

    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks now; this one within 5 s even when MPI hangs."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_ABORT_LIMIT_S)  # from any thread: a second signal may be taken in its own
        try:
            with contextlib.suppress(RuntimeError):  # a signal came in the middle of a print
                sys.stdout.flush()
                sys.stderr.flush()
            if not MPI.Is_finalized():
                MPI.COMM_WORLD.Abort(exit_code)
        finally:
            os._exit(exit_code)

    # ---- plain MPI, for comparison ---------------------------------------------------------------

    def raw_round_trips_s(self, num_bytes: int, num_repetitions: int) -> list[float]:
        """Seconds of each blocking round trip between ranks 0 and 1; empty on rank 1.

        Both ranks call it at about the same time. Blocks the event loop.
        """
        world, peer, buffer = MPI.COMM_WORLD, 1 - self._rank, bytearray(num_bytes)
        times_s = []
        for _ in range(num_repetitions):
            start_s = time.perf_counter()
            if self._rank == 0:
                world.Send(buffer, peer, _RAW)
                world.Recv(buffer, peer, _RAW)
                times_s.append(time.perf_counter() - start_s)
            else:
                world.Recv(buffer, peer, _RAW)
                world.Send(buffer, peer, _RAW)
        return times_s

    def raw_one_way_per_s(self, num_bytes: int, num_messages: int) -> float:
        """Messages per second from rank 0 to rank 1 until the last one is read; 0 on rank 1."""
        world, buffer, answer = MPI.COMM_WORLD, bytearray(num_bytes), bytearray(1)
        start_s = time.perf_counter()
        if self._rank == 0:
            for _ in range(num_messages):
                world.Send(buffer, 1, _RAW)
            world.Recv(answer, 1, _RAW)
            return num_messages / (time.perf_counter() - start_s)
        for _ in range(num_messages):
            world.Recv(buffer, 0, _RAW)
        world.Send(answer, 0, _RAW)
        return 0.0


def finalize() -> None:
    """At exit: finalize MPI after an orderly end; else leave it, as finalizing would hang."""
    if not _open_channels and not MPI.Is_finalized():
        MPI.Finalize()


def end_process(exit_code: int) -> NoReturn:
    """Finalize MPI and end at once, although threads still work.

    MPICH tells its launcher only in a handler of C's `exit` that a rank ends in order. The launcher
    takes one that `os._exit` ended for a dead one: it kills the others while they leave, and
    reports their SIGKILL (9) in place of the exit code.
    """
    finalize()
    if MPI.Is_finalized() and detect(os.environ).launcher is Launcher.HYDRA:
        with contextlib.suppress(KeyError, OSError, ValueError):  # no PMI, or the launcher is gone
            pmi = int(os.environ["PMI_FD"])
            os.write(pmi, b"cmd=finalize\n")
            select.select([pmi], [], [], _LAUNCHER_LIMIT_S)  # it answers once it has noted that
    os._exit(exit_code)


def _lost_peer(doing: str, error: MPI.Exception) -> PeerLostError:
    return PeerLostError(
        f"MPI failed while {doing}: {error}; most likely another rank died: look for the first "
        "error in the logs of the other ranks"
    )


def library_version() -> str:
    """The MPI library's description of itself, in lines; MPI need not be started."""
    return MPI.Get_library_version().replace("\0", "")  # Open MPI 4.1 counts the end as text


def module_file() -> str:
    """The file of mpi4py's extension module; its name may tell the ABI."""
    return str(MPI.__file__)


def thread_level() -> str:
    """The granted use by threads: `single`, `funneled`, `serialized` or `multiple`."""
    names = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    granted = MPI.Query_thread()
    return next(name.lower() for name in names if getattr(MPI, f"THREAD_{name}") == granted)
