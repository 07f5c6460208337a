"""A queue with one reader, in one event loop: put now, get when there is something.

Smaller than `asyncio.Queue` on purpose: it can be closed, which wakes the reader, and putting never
waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from mpipipe.errors import ChannelClosedError

__all__ = ["Mailbox"]

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items in the order they were put, for one reader at a time.

    Args:
        name: for the error of a reader that comes after `close`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._items: deque[T] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._closed = False

    def put(self, item: T) -> None:
        """Add an item; after `close` it is dropped."""
        if self._closed:
            return
        self._items.append(item)
        self.wake()

    @property
    def num_waiting(self) -> int:
        """Items that were put and not read; may be asked after `close`."""
        return len(self._items)

    async def get(self) -> T:
        """The next item; waits for it. Cancelling loses nothing.

        Raises:
            ChannelClosedError: closed, and nothing is left.
        """
        while not self._items:
            self._check_open()
            await self.wait()
        return self._items.popleft()

    async def wait(self) -> None:
        """Return when something is put, or `wake` or `close` is called."""
        assert self._reader is None, f"two readers of the mailbox {self._name!r}"
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def wake(self) -> None:
        """Let `wait` return although nothing was put."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def get_nowait(self) -> T | None:
        """The next item, or None when there is none.

        Raises:
            ChannelClosedError: closed, and nothing is left.
        """
        if self._items:
            return self._items.popleft()
        self._check_open()
        return None

    def close(self) -> None:
        """Wake the reader: after the items that are left, `get` raises. Idempotent."""
        self._closed = True
        self.wake()

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosedError(
                f"{self._name} was read after it was closed; unless this rank is shutting down, "
                "this is a bug in mpipipe: please report it with the log"
            )
