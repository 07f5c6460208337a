"""NCCL transfers of fixed memory, captured as CUDA graphs and replayed.

Adding a transfer to a stream through torch.distributed costs the host 40 to 130 µs on a virtual
machine with 2 H200, a replay 10 to 16; on the device both take the same time (a lap of two stages
of 0.42 ms: 874 and 870 µs). The other end may well add its side without a graph.

Not here: what is sent where (`nccl`). Invariant: `release` comes before NCCL's groups are left, as
a communicator waits for the graphs that use it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpipipe.errors import EnvironmentSetupError

__all__ = ["CapturedTransfers"]


class CapturedTransfers:
    """The graphs of one channel.

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
