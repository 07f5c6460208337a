"""KV pages in host memory: those of preempted sequences, saved from the cache and restored to it.

The head says which page goes where (`scheduler.slot_allocator`); this only copies, in the order in
which it is told. A page is copied whole, all layers' keys and values of it.

On a CPU a copy is done when the call returns. On a GPU copies have a CUDA stream of their own, in
batches of a few pages: kernels read and write pinned memory over the link while the stage computes.
A copy begins behind all steps launched before it, and `settle` lets the next step wait for the
copies of just those pages that it reads or writes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from mpipipe.kv_cache.copy_times import CopyTimes
from mpipipe.metrics.offload import PageMoveUse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mpipipe.kv_cache.paged import PagedKVCache

__all__ = ["HostPages", "page_bytes"]

_BATCH_BYTES = 32 << 20  # of the device, between cache and host memory


class HostPages:
    """The host's side of a stage's cache.

    Args:
        cache: whose pages these are.
        host_memory: uint8 [n]: pinned host memory as the GPU sees it, or memory of the host, which
            a GPU's copies then wait for.
        num_pages: that it holds; each of `page_bytes(cache)`.
        upload: a copy of page numbers on the device of the cache.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        host_memory: torch.Tensor,
        num_pages: int,
        upload: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._pages_NPX = _as_words(cache.pages_NPX)
        num_parts, _, num_words = self._pages_NPX.shape
        shape = (num_parts, num_pages, num_words)
        self._host_NPX = host_memory.view(self._pages_NPX.dtype).view(shape)
        self._upload = upload
        self._page_bytes = page_bytes(cache)
        self._batch = max(1, _BATCH_BYTES // self._page_bytes)
        self._device = self._pages_NPX.device
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._moving: dict[int, torch.cuda.Event] = {}  # by page of the cache: it is copied
        self._times = CopyTimes()
        self._num_saves = 0
        self._num_saved = 0
        self._num_restored = 0

    def save(self, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Copy `pages` of the cache to `host_pages`."""
        self._num_saves += 1
        self._num_saved += len(pages)
        for part in self._batches(len(pages)):
            self._copy(pages[part], host_pages[part], to_host=True)

    def restore(self, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        """Copy `host_pages` to `pages` of the cache."""
        self._num_restored += len(pages)
        for part in self._batches(len(pages)):
            self._copy(pages[part], host_pages[part], to_host=False)

    def settle(self, pages: Iterable[int]) -> None:
        """What the current stream does next waits for the copies of `pages` of the cache."""
        if not self._moving:
            return
        awaited = {id(e): e for page in pages if (e := self._moving.get(page)) is not None}
        for event in awaited.values():
            torch.cuda.current_stream(self._device).wait_event(event)
        self._moving = {page: event for page, event in self._moving.items() if not event.query()}

    def finish(self) -> None:
        """Wait for all copies: the steps before them are done, and the memory may go then."""
        if self._copies is not None:
            self._copies.synchronize()
        self._moving.clear()

    def use(self) -> PageMoveUse:
        """What was moved so far."""
        return PageMoveUse(
            num_saved=self._num_saves,
            saved_bytes=self._num_saved * self._page_bytes,
            restored_bytes=self._num_restored * self._page_bytes,
            bytes_per_s=self._times.bytes_per_s,
        )

    def _batches(self, num_pages: int) -> list[slice]:
        return [slice(n, n + self._batch) for n in range(0, num_pages, self._batch)]

    def _copy(self, pages: Sequence[int], host_pages: Sequence[int], *, to_host: bool) -> None:
        """One batch."""
        ends = [
            (self._pages_NPX, self._ids(self._pages_NPX, pages)),
            (self._host_NPX, self._ids(self._host_NPX, host_pages)),
        ]
        (source_NPX, source_P), (target_NPX, target_P) = ends if to_host else reversed(ends)
        num_bytes = len(pages) * self._page_bytes

        def copy() -> None:
            found_NPX = source_NPX.index_select(1, source_P).to(target_NPX.device)
            target_NPX.index_copy_(1, target_P, found_NPX)

        if self._copies is None:
            began_s = time.perf_counter()
            copy()
            self._times.add(num_bytes, time.perf_counter() - began_s)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            began = self._times.begin(self._copies)
            copy()
            self._times.end(self._copies, began, num_bytes)
            done = torch.cuda.Event()
            done.record(self._copies)
        for ids_P in (source_P, target_P):
            if ids_P.is_cuda:
                ids_P.record_stream(self._copies)
        self._moving.update(dict.fromkeys(pages, done))

    def _ids(self, tensor_NPX: torch.Tensor, pages: Sequence[int]) -> torch.Tensor:
        ids_P = torch.tensor(pages, dtype=torch.int64)
        return self._upload(ids_P) if tensor_NPX.is_cuda else ids_P


def page_bytes(cache: PagedKVCache) -> int:
    """Of one page over all layers, keys and values."""
    num_parts, _, num_elements = cache.pages_NPX.shape
    return num_parts * num_elements * cache.pages_NPX.element_size()


def _as_words(pages_NPX: torch.Tensor) -> torch.Tensor:
    """The same memory in elements of 8 bytes, where they divide a page: fewer, larger accesses."""
    num_bytes = pages_NPX.shape[2] * pages_NPX.element_size()
    return pages_NPX.view(torch.int64 if num_bytes % 8 == 0 else torch.uint8)
