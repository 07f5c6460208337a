"""GPU tensors between GPUs: NCCL through torch.distributed, in stream order.

Two process groups, so that ids never queue behind hidden states. Hidden states are sent and
received on the current stream, as are ids received; ids are sent on a stream of their own, so that
the last stage goes on at once whatever the head is doing. Metadata never travels.

NCCL refuses several ranks on one GPU: `staged` serves those. Transfers of fixed memory are captured
as CUDA graphs.

Invariants: both groups are made in one order on all ranks and have carried a tensor over every edge
before `connect_groups` returns, so that no step pays for connecting; nothing of
torch.distributed is left behind after `aclose`. The NCCL_* variables are left to the user.

Measured, 2 H200 of one host: 27–40 µs one way up to 1 MiB, 64 MiB at 315 GB/s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mpipipe.data_plane.channel import EdgeKind, check_transfer, drain
from mpipipe.data_plane.daemon_call import call_in_daemon
from mpipipe.data_plane.lanes import ALONE, Lanes
from mpipipe.data_plane.nccl_groups import LEAVE_LIMIT_S, NcclGroups, first_line
from mpipipe.data_plane.nccl_lanes import NcclLanes
from mpipipe.errors import DeadlineError, EnvironmentSetupError, PeerLostError

__all__ = ["NcclTensorChannel", "StreamTransfer"]


@dataclass(frozen=True, slots=True)
class StreamTransfer:
    """A transfer on the stream: work that is added to the stream later comes after it."""

    what: str

    async def wait(self) -> None:
        """Returns at once; see the contract on stream order."""


class NcclTensorChannel:
    """This rank's end.

    Args:
        groups: left by `aclose`.
    """

    def __init__(self, groups: NcclGroups) -> None:
        self._groups = groups
        self._rank = groups.rank
        self._device = groups.device
        self._ids_stream = torch.cuda.Stream(groups.device)
        self._captured = _CapturedTransfers(groups.device)
        self._closed = False

    @property
    def lanes(self) -> Lanes:
        """This rank's lane of its stage."""
        group = self._groups.lanes
        return ALONE if group is None else NcclLanes(group, self._groups.shared)

    def send(self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind) -> StreamTransfer:
        """Add a send to the current stream (ids: to their own, behind it).

        Raises:
            ValueError: `tensor` is not on this rank's GPU or not contiguous; no such other rank.
            ChannelClosedError: after `aclose`.
            PeerLostError: NCCL failed.
        """
        sent = tensor.detach()

        def add() -> None:
            if kind is EdgeKind.IDS:
                self._send_aside(sent, destination)
            else:
                self._groups.by_kind[kind].send([sent], destination, 0).wait()

        return self._add(f"send of {kind.name} to rank {destination}", tensor, destination, add)

    def _send_aside(self, ids: torch.Tensor, destination: int) -> None:
        """Send a copy (a few KB) on the stream of the ids.

        A copy, as `ids` may be a graph's output: the next replay of any graph of its pool may
        overwrite it however late the head takes this one.
        """
        current = torch.cuda.current_stream(self._device)
        copy = ids.clone()
        self._ids_stream.wait_stream(current)
        with torch.cuda.stream(self._ids_stream):
            self._groups.by_kind[EdgeKind.IDS].send([copy], destination, 0).wait()
        copy.record_stream(self._ids_stream)

    def receive(self, buffer: torch.Tensor, *, source: int, kind: EdgeKind) -> StreamTransfer:
        """Add a receive to the current stream, which waits there until the tensor comes.

        Raises as `send`.
        """
        received = buffer.detach()

        def add() -> None:
            self._groups.by_kind[kind].recv([received], source, 0).wait()

        return self._add(f"receive of {kind.name} from rank {source}", buffer, source, add)

    def _add(
        self, what: str, tensor: torch.Tensor, peer: int, add: Callable[[], object]
    ) -> StreamTransfer:
        self._check(what, tensor, peer)
        if tensor.numel():  # both ends know the shape, so an empty tensor need not travel
            try:
                add()
            except (dist.DistError, RuntimeError) as error:
                raise PeerLostError(
                    f"NCCL failed during the {what} ({first_line(error)}); most likely that rank "
                    "died: look for the first error in the logs"
                ) from error
        return StreamTransfer(what)

    def repeated_send(
        self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind
    ) -> Callable[[], None]:
        """See `RepeatingChannel`. Ids leave on their own stream, behind the current one.

        Nothing added to the current stream later waits for that: ids must lie where only what
        follows their arrival overwrites them.

        Raises as `send`; `EnvironmentSetupError` if NCCL cannot be captured.
        """
        self._check(f"send of {kind.name}", tensor, destination)
        group, tensors = self._groups.by_kind[kind], [tensor.detach()]
        aside = self._ids_stream if kind is EdgeKind.IDS else None
        return self._captured.capture(lambda: group.send(tensors, destination, 0).wait(), aside)

    def repeated_receive(
        self, buffer: torch.Tensor, *, source: int, kind: EdgeKind
    ) -> Callable[[], None]:
        """See `RepeatingChannel`. Raises as `repeated_send`."""
        self._check(f"receive of {kind.name}", buffer, source)
        group, tensors = self._groups.by_kind[kind], [buffer.detach()]
        return self._captured.capture(lambda: group.recv(tensors, source, 0).wait())

    def _check(self, what: str, tensor: torch.Tensor, peer: int) -> None:
        world_size = self._groups.world_size
        check_transfer(what, tensor, peer, world_size=world_size, closed=self._closed)
        if peer == self._rank:
            raise ValueError(f"{what}: NCCL does not send to the own rank")
        if tensor.device != self._device:
            raise ValueError(f"{what}: the tensor is on {tensor.device}, not on {self._device}")

    # ---- ending ----------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Wait for the GPU to finish, leave both groups together with the other ranks. Idempotent.

        Raises:
            DeadlineError: a transfer, or another rank, does not end.
        """
        if self._closed:
            return
        self._closed = True
        events = [torch.cuda.Event(), torch.cuda.Event()]
        events[0].record(torch.cuda.current_stream(self._device))
        events[1].record(self._ids_stream)
        await drain(
            lambda: ["transfers on the GPU"] if not all(e.query() for e in events) else [],
            lambda: False,
            cause="another rank hangs or died: see its log",
        )
        self._captured.release()
        try:
            async with asyncio.timeout(LEAVE_LIMIT_S):
                await call_in_daemon(self._groups.leave, "nccl-leave")
        except TimeoutError:
            raise DeadlineError(
                f"rank {self._rank} waited {LEAVE_LIMIT_S:g} s for the other ranks to close NCCL; "
                "most likely one of them hangs or died: see its log"
            ) from None


# ---- transfers of fixed memory -------------------------------------------------------------------


class _CapturedTransfers:
    """Transfers of fixed memory, captured as CUDA graphs and replayed.

    Adding a transfer to a stream through torch.distributed costs the host 40 to 130 µs on a virtual
    machine with 2 H200, a replay 10 to 16; on the device both take the same time (a round of two
    stages of 0.42 ms: 874 and 870 µs). The other end may add its side without a graph. `release`
    comes before NCCL's groups are left, as a communicator waits for the graphs that use it.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._capture_stream = torch.cuda.Stream(device)

    def capture(
        self, transfer: Callable[[], object], aside: torch.cuda.Stream | None = None
    ) -> Callable[[], None]:
        """What adds `transfer` to the stream that is current now, each time it is called.

        Args:
            transfer: adds itself to the current stream; its group has carried a tensor before.
            aside: the stream to replay on instead, behind what the current one has by then.

        Raises:
            EnvironmentSetupError: this NCCL cannot be captured.
        """
        stream = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        self._capture_stream.wait_stream(stream)
        try:
            with torch.cuda.stream(self._capture_stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    transfer()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            raise EnvironmentSetupError(
                f"NCCL's transfers could not be captured as a CUDA graph ({error}): set "
                "memory.cuda_graphs = false, or use the NCCL that came with torch"
            ) from error
        stream.wait_stream(self._capture_stream)
        self._graphs.append(graph)
        return graph.replay if aside is None else _behind(stream, aside, graph)

    def release(self) -> None:
        """Give all graphs up; nothing may be replayed any more, nor be under way."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


def _behind(
    stream: torch.cuda.Stream, aside: torch.cuda.Stream, graph: torch.cuda.CUDAGraph
) -> Callable[[], None]:
    """A replay on `aside`, behind what `stream` has when it is called."""
    computed = torch.cuda.Event()

    def replay() -> None:
        computed.record(stream)
        aside.wait_event(computed)
        torch.cuda.set_stream(aside)  # a third of the cost of `with torch.cuda.stream`
        try:
            graph.replay()
        finally:
            torch.cuda.set_stream(stream)

    return replay
