"""The memory of a stage's KV cache: on its device, and in host memory where the plan says so."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpipipe.abandoned import ends_within
from mpipipe.checkpoint.spec import read_spec
from mpipipe.errors import EnvironmentSetupError
from mpipipe.kv_cache.base import ContiguousKVCache
from mpipipe.kv_cache.host_pages import page_bytes
from mpipipe.kv_cache.paged import HostLayers, PagedKVCache
from mpipipe.planning.memory import gib
from mpipipe.planning.tensor_parallel import lane_spec
from mpipipe.weights.cuda_carrier import END_S
from mpipipe.weights.pinned_memory import PinnedMemory, device_view

if TYPE_CHECKING:
    from mpipipe.kv_cache.base import KVCache
    from mpipipe.planning.plan import PipelinePlan, StagePlan

__all__ = ["KvMemory", "open_kv_memory"]


@dataclass(frozen=True, slots=True)
class KvMemory:
    """A cache, and the host memory for pages that it moves there."""

    cache: KVCache
    pinned: PinnedMemory
    host_memory: torch.Tensor | None = None  # as `HostPages` takes it; None: no page is moved

    @property
    def host_bytes(self) -> int:
        """Of KV pages in host memory: of layers that have all theirs there, or moved ones."""
        moved = 0 if self.host_memory is None else self.host_memory.nbytes
        return moved + (self.cache.host_bytes if isinstance(self.cache, PagedKVCache) else 0)

    @property
    def warning(self) -> str:
        """What makes moves slower than they could be; empty: nothing."""
        if not self.pinned.refused_bytes:
            return ""
        return (
            f"{gib(self.pinned.refused_bytes)} of host memory for KV pages could not be pinned "
            f"({self.pinned.reason}): saving and restoring the pages of preempted sequences takes "
            'several times as long, and steps wait for it; raise "ulimit -l" for the job, or set '
            "memory.kv_host_bytes = 0, which computes such sequences anew"
        )

    def close(self) -> None:
        """Unpin, once the GPU copies no more: after an error, copies may be under way. Idempotent.

        They may wait for a step that waits for a lost rank: after `END_S` the memory stays pinned.
        """
        if not self.pinned.is_empty and ends_within(END_S, self._wait_for_end, "kv-pages-end"):
            self.pinned.close()

    def _wait_for_end(self) -> None:
        with contextlib.suppress(RuntimeError):  # the GPU is lost: nothing is copied any more
            torch.cuda.synchronize(self.pinned.device)


def open_kv_memory(
    plan: PipelinePlan, stage: StagePlan, device: torch.device, *, head_major: bool
) -> KvMemory:
    """The cache of `stage` on `device`, of zeros.

    Raises:
        EnvironmentSetupError: host memory that a GPU must read cannot be pinned.
    """
    pinned = PinnedMemory(device)
    if plan.kv_cache == "contiguous":
        return KvMemory(ContiguousKVCache(), pinned)
    spec = lane_spec(read_spec(Path(plan.model_path)), plan.tensor_parallel)
    # On a GPU the last page is no sequence's: rows without a sequence write there.
    num_pages = plan.num_kv_pages + (device.type == "cuda")

    def take(num_bytes: int) -> torch.Tensor:
        return _as_seen(pinned.take(num_bytes), pinned, device)

    layers = () if stage.kv_in_host is None else stage.kv_in_host.layers
    host = HostLayers(tuple(layer - stage.first_layer for layer in layers), take)
    cache = PagedKVCache.allocate(
        num_layers=stage.num_layers,
        num_pages=num_pages,
        page_size=plan.page_size_tokens,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=getattr(torch, plan.dtype),
        device=device,
        head_major=head_major,
        host=host if layers else None,
    )
    if layers and pinned.refused_bytes:
        pinned.close()
        raise EnvironmentSetupError(
            f"{gib(pinned.refused_bytes)} of host memory for the KV cache of "
            f"{len(layers)} layers of stage {stage.stage} ({stage.host}) could not "
            f'be pinned ({pinned.reason}), and a GPU reads no other: raise "ulimit -l" for the '
            "job, or set memory.kv_host_bytes = 0"
        )
    if not plan.num_host_pages:
        return KvMemory(cache, pinned)
    return KvMemory(cache, pinned, take(plan.num_host_pages * page_bytes(cache)))


def _as_seen(memory: torch.Tensor, pinned: PinnedMemory, device: torch.device) -> torch.Tensor:
    """Host memory as kernels of `device` read it; where that is refused, as it is."""
    if device.type != "cuda" or pinned.refused_bytes:
        return memory
    return device_view(memory, device)
