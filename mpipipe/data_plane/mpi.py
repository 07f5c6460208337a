"""CPU tensors over MPI: Isend and Irecv of their bytes, without a copy. Importing this loads MPI.

The kind of edge is the tag, so MPI itself matches transfers in the order they were started. All
calls come from the event-loop thread, on a private duplicate of the world communicator. Tensors to
the own rank take the loopback.

`MpiLanes` adds up what the lanes of a stage compute. Their compute threads ask for it and wait; the
event loop's thread does it. The summands are gathered and added in the order of the lanes, so that
all lanes have equal bits, in every type.

`control_plane.mpi` starts and finalizes MPI; `staged` carries GPU tensors.

Measured, 2 ranks of one host: 16 KiB 6 µs, 4 MiB 0.39 ms one way.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mpipipe.data_plane.channel import (
    MOST_BYTES,
    EdgeKind,
    PendingTransfer,
    check_transfer,
    drain,
)
from mpipipe.data_plane.lanes import joined_columns
from mpipipe.data_plane.loopback import LoopbackChannel, open_loopback_channels
from mpipipe.errors import ChannelClosedError, EnvironmentSetupError, MpipipeError, PeerLostError

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    raise EnvironmentSetupError(
        f"MPI could not be loaded ({error}); mpi4py found no MPI library: install one with `pip "
        "install mpipipe[mpich]`, or load your site's MPI module"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from mpipipe.progress import ProgressEngine

__all__ = ["MpiLanes", "MpiTensorChannel", "open_mpi_channel", "open_mpi_lanes"]

_LARGE_BYTES = 4 << 20  # above this MPI may need many polls to move a tensor


def open_mpi_channel(engine: ProgressEngine) -> MpiTensorChannel:
    """Open this rank's end. Collective: every rank calls it, after the control channel is open.

    Raises:
        EnvironmentSetupError: MPI is not running.
    """
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise EnvironmentSetupError(
            "tensors over MPI were asked for but MPI is not running: open the control channel first"
        )
    communicator = MPI.COMM_WORLD.Dup()
    communicator.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py raises MPI.Exception
    rank = communicator.Get_rank()
    loopback = open_loopback_channels(communicator.Get_size())[rank]
    channel = MpiTensorChannel(communicator, engine, loopback)
    channel.start()
    return channel


@dataclass(frozen=True, slots=True)
class _Active:
    """A transfer that MPI works on; keeps its memory alive."""

    request: MPI.Request
    transfer: PendingTransfer
    tensor: torch.Tensor
    is_send: bool


class MpiTensorChannel:
    """This rank's end of the data plane.

    Args:
        communicator: private; freed by `aclose`.
        engine: polls.
        loopback: takes what goes to the own rank.
    """

    def __init__(
        self, communicator: MPI.Intracomm, engine: ProgressEngine, loopback: LoopbackChannel
    ) -> None:
        self._communicator = communicator
        self._engine = engine
        self._loopback = loopback
        self._rank = communicator.Get_rank()
        self._world_size = communicator.Get_size()
        self._active: list[_Active] = []
        self._status = MPI.Status()
        self._unregister: Callable[[], None] | None = None
        self._closed = False

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    def start(self) -> None:
        """Let the engine poll."""
        self._unregister = self._engine.register(self._poll)

    def send(self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind) -> PendingTransfer:
        """Start sending; see the contract.

        Raises:
            ValueError: `tensor` is not on the CPU, not contiguous or over 2 GiB; no such rank.
            ChannelClosedError: after `aclose`.
            PeerLostError: MPI failed.
        """
        if destination == self._rank:
            return self._loopback.send(tensor, destination=destination, kind=kind)
        transfer = PendingTransfer(f"send of {kind.name} to rank {destination}", tensor.nbytes)
        self._start(transfer, tensor, destination, kind, is_send=True)
        return transfer

    def receive(self, buffer: torch.Tensor, *, source: int, kind: EdgeKind) -> PendingTransfer:
        """Start receiving; see the contract. Raises as `send`."""
        if source == self._rank:
            return self._loopback.receive(buffer, source=source, kind=kind)
        transfer = PendingTransfer(f"receive of {kind.name} from rank {source}", buffer.nbytes)
        self._start(transfer, buffer, source, kind, is_send=False)
        return transfer

    def _start(
        self,
        transfer: PendingTransfer,
        tensor: torch.Tensor,
        peer: int,
        kind: EdgeKind,
        *,
        is_send: bool,
    ) -> None:
        what, size = transfer.what, self._world_size
        check_transfer(
            what, tensor, peer, world_size=size, closed=self._closed, most_bytes=MOST_BYTES
        )
        if tensor.device.type != "cpu":
            raise ValueError(f"{what}: the tensor is on {tensor.device}, not in CPU memory")
        start = self._communicator.Isend if is_send else self._communicator.Irecv
        try:
            request = start([_bytes_of(tensor), MPI.BYTE], peer, kind)
        except MPI.Exception as error:
            raise _failure(transfer, error) from error
        active = _Active(request, transfer, tensor, is_send)
        # Short tensors are mostly gone, or here, at once.
        if not self._finish(active):
            self._active.append(active)
            self._boost(active, +1)
        self._engine.wake()

    def _boost(self, active: _Active, change: int) -> None:
        if active.transfer.num_bytes > _LARGE_BYTES:
            self._engine.boost(change)

    # ---- progress --------------------------------------------------------------------------------

    def _poll(self) -> bool:
        if not self._active:
            return False
        before, self._active = self._active, []
        for active in before:
            if self._finish(active):
                self._boost(active, -1)
            else:
                self._active.append(active)
        return len(self._active) < len(before)

    def _finish(self, active: _Active) -> bool:
        """Whether MPI is through with it; then its waiter is told."""
        transfer, problem = active.transfer, None
        try:
            if not active.request.Test(self._status):
                return False
        except MPI.Exception as error:
            transfer.finish(_failure(transfer, error))
            return True
        if not active.is_send and self._status.Get_count(MPI.BYTE) != transfer.num_bytes:
            came = self._status.Get_count(MPI.BYTE)
            problem = transfer.mismatch(f"{transfer.num_bytes} bytes", came)
        transfer.finish(problem)
        return True

    # ---- ending ----------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Finish the sends, give up receives that nothing came for, release. Idempotent.

        Polls by itself, as the engine may have stopped.

        Raises:
            DeadlineError: another rank does not take what was sent to it.
        """
        if self._closed:
            return
        self._closed = True
        await self._loopback.aclose()
        await drain(
            lambda: [active.transfer.what for active in self._active if active.is_send],
            self._poll,
            cause="the other rank hangs or died: see its log",
        )
        self._give_up_receives()
        if self._unregister is not None:
            self._unregister()
        self._communicator.Free()

    def _give_up_receives(self) -> None:
        self._poll()
        for active in self._active:
            self._boost(active, -1)
            active.request.Cancel()
            active.request.Wait()
            active.transfer.give_up()
        self._active = []


# ---- lanes ---------------------------------------------------------------------------------------


def open_mpi_lanes(engine: ProgressEngine, *, stage: int, lane: int) -> MpiLanes:
    """This rank's lane of its stage. Collective: every rank of the world calls it.

    Args:
        engine: polls.
        stage: a number that the lanes of a stage share with no other rank.
        lane: the own number in it.
    """
    communicator = MPI.COMM_WORLD.Split(stage, lane)
    communicator.Set_errhandler(MPI.ERRORS_RETURN)
    lanes = MpiLanes(communicator, engine, asyncio.get_running_loop())
    lanes.start()
    return lanes


@dataclass(frozen=True, slots=True)
class _Gathering:
    """Tensors on their way between the lanes; keeps their memory alive."""

    request: MPI.Request
    done: Future[None]
    tensors: tuple[torch.Tensor, torch.Tensor]


class MpiLanes:
    """One lane's end, called from a thread that computes; see `Lanes`.

    Args:
        communicator: of the stage's lanes; freed by `close`.
        engine: polls.
        loop: whose thread calls MPI.
    """

    def __init__(
        self,
        communicator: MPI.Comm,
        engine: ProgressEngine,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.lane = communicator.Get_rank()
        self.num_lanes = communicator.Get_size()
        self._communicator = communicator
        self._engine = engine
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._active: list[_Gathering] = []
        self._unregister: Callable[[], None] | None = None
        self._lock = threading.Lock()  # of the two below: closing must find all that wait
        self._waiting: set[Future[None]] = set()
        self._closed = False

    def start(self) -> None:
        """Let the engine poll."""
        self._unregister = self._engine.register(self._poll)

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        """See `Lanes.add_up`."""
        return partial.copy_(self._all(partial).sum(dim=0))

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """See `Lanes.gather`."""
        return joined_columns(self._all(part))

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Lanes.from_first`."""
        return tensor.copy_(self._all(tensor)[0])

    def _all(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all lanes: [lanes, ...]. Waits for the event loop's thread."""
        assert threading.get_ident() != self._loop_thread, "it would wait for itself"
        gathered = tensor.new_empty(self.num_lanes, *tensor.shape)
        if tensor.numel():
            done = self._new_waiting()
            try:
                self._loop.call_soon_threadsafe(self._begin, tensor, gathered, done)
                done.result()
            finally:
                with self._lock:
                    self._waiting.discard(done)
        return gathered

    def _new_waiting(self) -> Future[None]:
        done: Future[None] = Future()
        with self._lock:
            if self._closed:
                raise ChannelClosedError("a stage computed after its lanes were closed")
            self._waiting.add(done)
        return done

    def _begin(self, tensor: torch.Tensor, gathered: torch.Tensor, done: Future[None]) -> None:
        if self._closed:  # after it asked, which `close` answered
            return
        try:
            request = self._communicator.Iallgather(_bytes_of(tensor), _bytes_of(gathered))
        except MPI.Exception as error:
            done.set_exception(_lost_lane(error))
            return
        self._active.append(_Gathering(request, done, (tensor, gathered)))
        self._engine.awaited(+1)

    def _poll(self) -> bool:
        before, self._active = self._active, []
        for active in before:
            try:
                ended, error = active.request.Test(), None
            except MPI.Exception as failure:
                ended, error = True, _lost_lane(failure)
            if not ended:
                self._active.append(active)
                continue
            self._engine.awaited(-1)
            if error is None:
                active.done.set_result(None)
            else:
                active.done.set_exception(error)
        return len(self._active) < len(before)

    def close(self) -> None:
        """Let go of a thread that waits, and of the communicator. Idempotent.

        A thread that asks later, while the loop's thread waits for it to end, is refused at once.
        What is under way when a run fails cannot be taken back: MPI ends it with the process.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting = [done for done in self._waiting if not done.done()]
        if self._unregister is not None:
            self._unregister()
        for _ in self._active:
            self._engine.awaited(-1)
        for done in waiting:
            done.set_exception(ChannelClosedError("the lanes of a stage were closed"))
        if not self._active:
            self._communicator.Free()


def _lost_lane(error: MPI.Exception) -> PeerLostError:
    return PeerLostError(
        f"MPI failed between the ranks of a stage: {error}; most likely one of them died: look "
        "for the first error in the logs"
    )


def _bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The memory of a contiguous CPU tensor of any type, as MPI wants it."""
    view: npt.NDArray[np.uint8] = tensor.detach().flatten().view(torch.uint8).numpy()
    return view


def _failure(transfer: PendingTransfer, error: MPI.Exception) -> MpipipeError:
    """What MPI's error means: a longer message than the buffer, or a rank that is gone."""
    if error.Get_error_class() == MPI.ERR_TRUNCATE:
        return transfer.mismatch(f"{transfer.num_bytes} bytes", "more")
    return PeerLostError(
        f"MPI failed during the {transfer.what}: {error}; most likely that rank died: look for the "
        "first error in the logs"
    )
