"""Ownership of KV pages: the accounting half of the paged cache, without tensors.

`paged.py` holds what lies in a page, `scheduler.policy` decides which sequence gets one.
Invariants: a page is free or owned, never both; the lowest free ids are handed out first, so equal
histories give equal page tables.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from mpipipe.errors import OutOfPagesError

__all__ = ["PageAllocator"]


class PageAllocator:
    """A fixed pool of `num_pages` pages of `page_size` tokens each, ids 0 … num_pages - 1."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages >= 0, f"num_pages = {num_pages}"
        assert page_size >= 1, f"page_size = {page_size}"
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages))  # a heap: ascending order is one already
        self._is_owned = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Pages that no sequence owns."""
        return len(self._free)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit when one sequence owns every page."""
        return self.num_pages * self.page_size

    def pages_for_tokens(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of one sequence occupy."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int) -> tuple[int, ...]:
        """Take `num_pages` pages, lowest ids first, ascending.

        Raises:
            OutOfPagesError: fewer are free; nothing is taken.
        """
        assert num_pages >= 0, f"allocate({num_pages})"
        if num_pages > len(self._free):
            raise OutOfPagesError(
                f"{num_pages} KV pages asked for, {len(self._free)} of {self.num_pages} are free: "
                "the scheduler must preempt first"
            )
        pages = tuple([heapq.heappop(self._free) for _ in range(num_pages)])
        for page in pages:
            self._is_owned[page] = 1
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back. Giving back a free or unknown page is our own bug and asserts."""
        for page in pages:
            assert 0 <= page < self.num_pages, f"page {page} is not of this pool"
            assert self._is_owned[page], f"page {page} is freed twice"
            self._is_owned[page] = 0
            heapq.heappush(self._free, page)
