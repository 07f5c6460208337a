"""Memory that the GPUs of a stage's lanes read from each other, for sums of a few rows.

NCCL's all-reduce takes 10 µs and more of a small tensor, of which a decode step has two a layer.
torch's symmetric memory does it in one kernel: each lane writes its summand where the others see
it, waits for them and adds all of them up, in the same order. Where GPUs cannot read each other
there is no such buffer, and NCCL does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SharedBuffer", "open_shared_buffer"]

# Beyond it each lane would read more than NCCL moves; 32 rows of Llama-3-8B.
_MOST_BYTES = 256 << 10
_ALIGNMENT = 16
_TRIAL_ELEMENTS = 4096
_TYPES = frozenset({torch.float32, torch.bfloat16})  # that torch's kernel adds


class SharedBuffer:
    """One lane's part of it.

    Args:
        memory: uint8, that the other lanes have mapped.
        group_name: of the lanes, as torch knows it.
    """

    def __init__(self, memory: torch.Tensor, group_name: str) -> None:
        self._memory = memory
        self._group_name = group_name

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether `sum_of` can be had of such a tensor; the same on every lane."""
        return tensor.dtype in _TYPES and 0 < tensor.nbytes <= _MOST_BYTES and _is_aligned(tensor)

    def sum_of(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all lanes' `partial`, behind the work of the current stream."""
        memory = self._memory[: partial.nbytes].view(partial.dtype).view(partial.shape)
        reduce = torch.ops.symm_mem.one_shot_all_reduce_copy
        total: torch.Tensor = reduce(memory, partial, "sum", self._group_name)
        return total


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Its size alone: memory of torch begins at multiples of more than that."""
    return tensor.nbytes % _ALIGNMENT == 0 and tensor.storage_offset() == 0


def open_shared_buffer(group: ProcessGroup, device: torch.device) -> SharedBuffer | None:
    """The buffer of the lanes in `group`; None: on some lane it cannot be. All call it together."""
    memory = _allocated(device)
    if not _all_have(memory is not None, group, device):
        return None
    assert memory is not None, "as all lanes"
    if not _all_have(_is_mapped(memory, group), group, device):
        return None
    shared = SharedBuffer(memory, group.group_name)
    return shared if _all_have(_adds_up(shared, group, device), group, device) else None


def _adds_up(shared: SharedBuffer, group: ProcessGroup, device: torch.device) -> bool:
    """Whether a trial sum is right; the second one uses the memory again."""
    for scale in (1.0, 3.0):
        own = torch.full((_TRIAL_ELEMENTS,), scale * (group.rank() + 1), device=device)
        expected = scale * group.size() * (group.size() + 1) / 2
        try:
            if not bool((shared.sum_of(own) == expected).all()):
                return False
        except RuntimeError:
            return False
    return True


def _allocated(device: torch.device) -> torch.Tensor | None:
    try:
        from torch.distributed import _symmetric_memory as symmetric

        memory: torch.Tensor = symmetric.empty(_MOST_BYTES, dtype=torch.uint8, device=device)
    except (ImportError, AttributeError, RuntimeError):
        return None
    return memory


def _is_mapped(memory: torch.Tensor, group: ProcessGroup) -> bool:
    """Whether this lane sees the memory of all others."""
    from torch.distributed import _symmetric_memory as symmetric

    try:
        symmetric.rendezvous(memory, group)
    except RuntimeError:
        return False
    return hasattr(torch.ops.symm_mem, "one_shot_all_reduce_copy")


def _all_have(here: bool, group: ProcessGroup, device: torch.device) -> bool:
    votes = torch.tensor([int(here)], dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=group)
    return bool(votes.item())
