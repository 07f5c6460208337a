"""Host memory that a GPU copies from by itself: page-locked ("pinned").

torch's own pinned allocator rounds up to powers of two, up to twice the memory for a layer, so
plain memory is registered with CUDA instead. Where the system refuses to lock so much, the memory
stays pageable: copies then take longer, and the calling thread waits for each.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mpipipe.weights.layer_layout import aligned_bytes

__all__ = ["PinnedMemory", "device_view"]

_HOST = torch.device("cpu")
_MOST_THREADS = 8  # that clear memory at once
_PIECE_BYTES = 64 << 20  # that one of them clears


class PinnedMemory:
    """Host memory for the weights of one stage; pinned if its device is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._registered: list[torch.Tensor] = []
        self.refused_bytes = 0  # could not be pinned
        self.reason = ""  # of the latest refusal

    def take(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes]."""
        memory = aligned_bytes(num_bytes, _HOST)
        if self.device.type == "cuda" and num_bytes:
            self._pin(memory)
        return memory

    def _pin(self, memory: torch.Tensor) -> None:
        """All of its storage: torch looks at the beginning of that to tell what is pinned."""
        cudart: Any = torch.cuda.cudart()
        storage = memory.untyped_storage()
        _clear(memory)
        code = int(cudart.cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0))
        if not code:
            self._registered.append(memory)
            return
        self.refused_bytes += memory.numel()
        self.reason = str(cudart.cudaGetErrorString(cudart.cudaError(code)))
        # CUDA tells the refusal once more, to the next kernel, which has nothing to do with it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is pinned."""
        return not self._registered

    def close(self) -> None:
        """Unpin; the memory is freed with its last tensor. Nothing may copy from it any more."""
        while self._registered:
            cudart: Any = torch.cuda.cudart()
            cudart.cudaHostUnregister(self._registered.pop().untyped_storage().data_ptr())


def _clear(memory: torch.Tensor) -> None:
    """Have the system give all of it, to several threads at once.

    CUDA would touch one page after the other in one thread: 1.2 GB/s on a machine with an H100.
    """
    pieces = memory.split(_PIECE_BYTES)
    num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)), len(pieces))
    with ThreadPoolExecutor(num_threads, "clear") as threads:
        for _ in threads.map(torch.Tensor.zero_, pieces):
            pass


class _OnHost:
    """Tells torch of pinned memory as CUDA sees it."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory  # lives as long as what torch makes of this
        self.__cuda_array_interface__ = {
            "shape": (memory.numel(),),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 3,
            "strides": None,
        }


def device_view(memory: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`memory`, pinned uint8 [n], as a tensor of the GPU: kernels read it over the link."""
    return torch.as_tensor(_OnHost(memory), device=device)
