"""A rank that is told to stop stops all: the switches of all ranks are one while steps run.

A rank whose switch is tripped tells the head, the head tells all. `stop_switch` says what
trips a switch, `scheduler.runner.Runner.stop` what the scheduler does then.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from mpipipe.control_plane.messages import StopRequested
from mpipipe.errors import DeadlineError, PeerLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from mpipipe.control_plane.mesh import Mesh
    from mpipipe.runtime.ranks import Ranks

__all__ = ["watch_for_stop"]

# Every rank's event loop is free while its stage computes, so an answer takes milliseconds. A rank
# that says nothing for so long is gone: after `srun -K` the others have 30 s until SIGKILL.
_ANSWER_LIMIT_S = 10.0
_HEAD_LIMIT_S = 15.0  # the head may be merging files
_GATHER = "stop"


@asynccontextmanager
async def watch_for_stop(ranks: Ranks, stop: Callable[[], None]) -> AsyncIterator[None]:
    """While inside, a tripped switch on any rank trips that of every rank.

    The head calls `stop` then, once, and makes sure that all ranks are still there: steps in flight
    come back only from a pipeline that is whole.

    Raises:
        PeerLostError: on the head, through `ranks.tasks`: a rank does not answer.
    """
    watching = ranks.tasks.create_task(_watch(ranks, stop), name="stop")
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])


async def _watch(ranks: Ranks, stop: Callable[[], None]) -> None:
    mesh, switch = ranks.mesh, ranks.stop
    listening = ranks.tasks.create_task(_listen(ranks), name="stop of others")
    try:
        reason = await switch.tripped()
        if not mesh.is_head:
            mesh.send(0, StopRequested(f"{reason} on rank {mesh.rank}"))
            await _head_speaks(listening, reason)
            return
        stop()
        for rank in range(1, mesh.world_size):
            mesh.send(rank, StopRequested(reason))
        await _answers(mesh, reason)
    finally:
        listening.cancel()
        await asyncio.wait([listening])


async def _listen(ranks: Ranks) -> None:
    """The head listens to the first rank that asks; the others to the head, whom they answer."""
    mesh = ranks.mesh
    _, message = await mesh.mailbox(StopRequested).get()
    assert isinstance(message, StopRequested)
    ranks.stop.trip(message.reason)
    if not mesh.is_head:
        await mesh.gather(_GATHER, b"", _ANSWER_LIMIT_S)


async def _head_speaks(listening: asyncio.Task[None], reason: str) -> None:
    done, _ = await asyncio.wait([listening], timeout=_HEAD_LIMIT_S)
    if not done:
        raise PeerLostError(
            f"the run was told to stop ({reason}), but rank 0, which decides, says nothing within "
            f"{_HEAD_LIMIT_S:g} s; most likely it died: look for the first error in its log"
        )


async def _answers(mesh: Mesh, reason: str) -> None:
    try:
        await mesh.gather(_GATHER, b"", _ANSWER_LIMIT_S)
    except DeadlineError as error:
        raise PeerLostError(f"the run was told to stop ({reason}), but {error}") from error
