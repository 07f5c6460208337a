"""Host memory that a GPU copies to and from in stream order, and copies that can be asked for.

Not here: what travels where (`staged`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Protocol

import torch

__all__ = ["CudaStaging", "HostBuffers", "Mark", "Staging"]

_LEAST_BUFFER_BYTES = 4096


class Mark(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the stream has passed it."""
        ...


class Staging(Protocol):
    """Copies between a device and host memory that it can reach, in stream order."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Host memory: uint8 [num_bytes]."""
        ...

    def to_host(self, host: torch.Tensor, tensor: torch.Tensor) -> Mark:
        """Add the copy `host` ← `tensor` to the current stream; the mark is behind it."""
        ...

    def to_device(self, tensor: torch.Tensor, host: torch.Tensor) -> Mark:
        """Add the copy `tensor` ← `host` to the current stream; the mark is behind it."""
        ...


class CudaStaging:
    """Pinned memory and CUDA events."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Pinned, so that copies do not wait on the host."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def to_host(self, host: torch.Tensor, tensor: torch.Tensor) -> torch.cuda.Event:
        """See the protocol."""
        return self._copy(host, tensor)

    def to_device(self, tensor: torch.Tensor, host: torch.Tensor) -> torch.cuda.Event:
        """See the protocol."""
        return self._copy(tensor, host)

    @torch.inference_mode()  # a target made in this mode may be written in no other
    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        target.copy_(source, non_blocking=True)
        mark = torch.cuda.Event()
        mark.record()
        return mark


@dataclass(slots=True)
class HostBuffers:
    """Host buffers by size, kept: pinning memory takes a millisecond."""

    staging: Staging
    free: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))

    def take(self, num_bytes: int) -> torch.Tensor:
        """At least `num_bytes`: uint8, a power of two long."""
        size = max(_LEAST_BUFFER_BYTES, 1 << max(0, num_bytes - 1).bit_length())
        ready = self.free[size]
        return ready.pop() if ready else self.staging.allocate(size)

    def give_back(self, host: torch.Tensor) -> None:
        """Nothing reads or writes it any more."""
        self.free[host.nbytes].append(host)
