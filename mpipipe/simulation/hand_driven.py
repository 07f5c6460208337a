"""Asynchronous code without an event loop: it goes on when the simulation lets it, and only then.

The runner and rank 0's dispatch wait for nothing but their mailboxes. So their own code runs here,
one at a time, at moments that the simulation chooses.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, Generic, TypeVar

from mpipipe.control_plane.mailbox import Mailbox

__all__ = ["HandDriven", "SimulatedInbox", "drive"]

T = TypeVar("T")


class _Pause:
    """Awaited, it gives control back to whoever drives the code."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class SimulatedInbox(Mailbox[T]):
    """A mailbox whose reader is driven by hand."""

    async def wait(self) -> None:
        """Give control back; the reader looks again when it is driven next."""
        await _Pause()


class HandDriven(Generic[T]):
    """An asynchronous generator that goes on only in `advance`.

    Args:
        generator: waits for nothing but a `SimulatedInbox`.
    """

    def __init__(self, generator: AsyncGenerator[T, None]) -> None:
        self.is_over = False
        self._generator = generator
        self._waiting: Coroutine[Any, Any, T] | None = None

    def advance(self) -> list[T]:
        """Let it run until it waits or ends; returns what it yielded. Raises what it raises."""
        yielded: list[T] = []
        while not self.is_over:
            waiting = self._waiting or self._generator.__anext__()
            try:
                waiting.send(None)
            except StopIteration as stopped:
                self._waiting = None
                yielded.append(stopped.value)
            except StopAsyncIteration:
                self.is_over = True
            else:
                self._waiting = waiting
                break
        return yielded


def drive(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that has nothing to wait for.

    Raises:
        AssertionError: it waits: our bug.
    """
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError(f"{coroutine} waits, and nothing would let it go on")
