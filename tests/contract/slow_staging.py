"""A device that is the CPU and copies late: for the staged channel where there is no GPU."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

_LOOKS_UNTIL_DONE = 3


@dataclass
class SlowMark:
    """Passed when looked at for the third time; then the copy, and those before it, are made."""

    staging: SlowStaging
    target: torch.Tensor
    source: torch.Tensor
    looks: int = 0
    done: bool = False

    def query(self) -> bool:
        self.looks += 1
        if self.looks >= _LOOKS_UNTIL_DONE and not self.done:
            self.staging.copy_until(self)
        return self.done


@dataclass
class SlowStaging:
    """Copies to the host happen late; those to the device at once, as tests look at the result."""

    num_allocated: int = 0
    _pending: deque[SlowMark] = field(default_factory=deque)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self.num_allocated += 1
        return torch.full((num_bytes,), 0xA5, dtype=torch.uint8)

    def to_host(self, host: torch.Tensor, tensor: torch.Tensor) -> SlowMark:
        # The stream has the tensor as it is now, whatever happens to it later.
        mark = SlowMark(self, host, tensor.clone())
        self._pending.append(mark)
        return mark

    def to_device(self, tensor: torch.Tensor, host: torch.Tensor) -> SlowMark:
        tensor.copy_(host)
        return SlowMark(self, tensor, host, done=True)

    def copy_until(self, last: SlowMark) -> None:
        while not last.done:
            mark = self._pending.popleft()
            mark.target.copy_(mark.source)
            mark.done = True
