"""A stage's transfers. Those of decode steps move the same memory again and again: prepared once.

Prepared where programs leave their results at fixed addresses, that is with CUDA graphs, and where
the channel can repeat a transfer (`RepeatingChannel`); plain transfers everywhere else. The two
ends of an edge may differ in that, as both move all rows of a program, padding included.

Why a repeated send needs no copy of the result: what overwrites it is the next step of the slot,
whose input comes from the head, which has received the ids of this step by then
(`AheadWorker._receive_needed`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpipipe.control_plane.messages import DecodeScheduled, StepScheduled
from mpipipe.data_plane.channel import EdgeKind, RepeatingChannel

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mpipipe.data_plane.channel import TensorChannel

__all__ = ["Hops"]

_Step = StepScheduled | DecodeScheduled
_Memory = tuple[EdgeKind, int, int]  # address, bytes


class Hops:
    """This stage's ends of its edges.

    Args:
        channel: carries the tensors.
        fixed: the tensors of decode steps stay where they are as long as the channel is open.
    """

    def __init__(self, channel: TensorChannel, *, fixed: bool) -> None:
        self._channel = channel
        self._repeating = channel if fixed and isinstance(channel, RepeatingChannel) else None
        self._sends: dict[_Memory, Callable[[], None]] = {}
        self._receives: dict[_Memory, Callable[[], None]] = {}

    def send(self, step: _Step, tensor: torch.Tensor, to: int, kind: EdgeKind) -> None:
        """Add a send of what `step` made."""
        if self._repeating is None or not isinstance(step, DecodeScheduled):
            self._channel.send(tensor, destination=to, kind=kind)
            return
        key = (kind, tensor.data_ptr(), tensor.nbytes)
        send = self._sends.get(key)
        if send is None:
            send = self._repeating.repeated_send(tensor, destination=to, kind=kind)
            self._sends[key] = send
        send()

    async def receive(
        self,
        step: StepScheduled | DecodeScheduled,
        buffer: torch.Tensor,
        source: int,
        kind: EdgeKind,
    ) -> None:
        """Add a receive of what `step` needs, or made."""
        if self._repeating is None or not isinstance(step, DecodeScheduled):
            await self._channel.receive(buffer, source=source, kind=kind).wait()
            return
        key = (kind, buffer.data_ptr(), buffer.nbytes)
        receive = self._receives.get(key)
        if receive is None:
            receive = self._repeating.repeated_receive(buffer, source=source, kind=kind)
            self._receives[key] = receive
        receive()
