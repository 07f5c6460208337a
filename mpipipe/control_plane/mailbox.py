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
        self._wake_reader()

    async def get(self) -> T:
        """The next item; waits for it. Cancelling loses nothing.

        Raises:
            ChannelClosedError: closed, and nothing is left.
        """
        assert self._reader is None, f"two readers of the mailbox {self._name!r}"
        while not self._items:
            self._check_open()
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._items.popleft()

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
        self._wake_reader()

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosedError(
                f"{self._name} was read after it was closed; unless this rank is shutting down, "
                "this is a bug in mpipipe: please report it with the log"
            )

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
