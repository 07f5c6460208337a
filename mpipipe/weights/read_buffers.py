"""A fixed number of chunks of host memory, through which bytes pass on their way to a tensor.

Needed where bytes cannot be read straight into the tensor: it is on a GPU, or of another type than
the file. For a GPU the chunks are pinned, copies run on a stream of their own, and the type is
changed there; a chunk is free again when the event behind its copy is done.
"""

from __future__ import annotations

from collections import deque

import torch

from mpipipe.weights.pinned_memory import PinnedMemory

__all__ = ["ReadBuffers", "content_of"]


def content_of(chunk: torch.Tensor, stored: torch.dtype, out: torch.Tensor) -> torch.Tensor:
    """What a chunk holds for `out` (flat), in the type of the file."""
    return chunk[: out.numel() * stored.itemsize].view(stored)


class ReadBuffers:
    """Chunks in turn. Its memory is asked for when the first chunk is.

    Args:
        num_chunks: in use at a time.
        chunk_bytes: of each; a multiple of 8.
        device: of the tensors. For a GPU the memory is pinned; where that is refused it is
            pageable, and `warnings` says so.
    """

    def __init__(self, num_chunks: int, chunk_bytes: int, device: torch.device) -> None:
        self.warnings: list[str] = []
        self._shape = (num_chunks, chunk_bytes)
        self._pinned = PinnedMemory(device)
        self._free: list[torch.Tensor] | None = None
        self._copies: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
        self._stream: torch.cuda.Stream | None = None

    def take(self) -> torch.Tensor | None:
        """A free chunk, uint8 [chunk_bytes]; None: all are in use."""
        if self._free is None:
            self._free = list(self._allocate())
        while self._copies and self._copies[0][0].query():
            self._free.append(self._copies.popleft()[1])
        return self._free.pop() if self._free else None

    def _allocate(self) -> torch.Tensor:
        memory = self._pinned.take(self._shape[0] * self._shape[1])
        if self._pinned.refused_bytes:
            self.warnings.append(
                f"{memory.numel() >> 20} MiB of host memory cannot be pinned "
                f"({self._pinned.reason}): weights go to the GPU through pageable memory, at about "
                "half the speed; raise `ulimit -l`, or leave more memory free"
            )
        return memory.view(self._shape)

    def give_back(self, chunk: torch.Tensor) -> None:
        """Free a chunk."""
        assert self._free is not None, "chunks are taken first"
        self._free.append(chunk)

    def send(self, chunk: torch.Tensor, stored: torch.dtype, out: torch.Tensor) -> None:
        """Begin to put what `chunk` holds into `out` (flat, on a GPU); it is free after that.

        `settle` comes before `out` is used.
        """
        content = content_of(chunk, stored, out)
        if self._stream is None:
            self._stream = torch.cuda.Stream(out.device)
        # `out` may stand where the caller's stream still works on what was freed.
        self._stream.wait_stream(torch.cuda.current_stream(out.device))
        with torch.cuda.stream(self._stream):
            if out.dtype != stored:  # torch would convert on the host, before the copy
                content = content.to(out.device, non_blocking=True)
            out.copy_(content, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._copies.append((event, chunk))

    def settle(self) -> None:
        """The caller's stream goes on after all that was sent."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def wait(self) -> None:
        """Until the chunk that was sent first is free."""
        self._copies[0][0].synchronize()

    def close(self) -> None:
        """Wait for copies, then give the memory back to the system."""
        if self._stream is not None:
            self._stream.synchronize()
        self._copies.clear()
        self._free = None
        self._pinned.close()
