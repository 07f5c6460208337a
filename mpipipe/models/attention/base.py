"""The contract of an attention backend: write this step's K and V, then attend over the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from mpipipe.kv_cache.base import KVCache
    from mpipipe.kv_cache.layout import BatchLayout

__all__ = ["AttentionBackend", "AttentionOptions"]


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What differs between layers and families."""

    scale: float  # the factor on q·k, usually 1 / sqrt(D)
    window: int | None = None  # a query sees the last `window` positions, its own included
    softcap: float | None = None  # scores become softcap · tanh(scores / softcap)


class AttentionBackend(Protocol):
    """Stateless; one instance serves all layers of a stage."""

    name: str
    needs_spans: bool
    """It reads `layout.spans`, so the host must know every length: no CUDA graph, and no lengths
    that advance on the device. A backend without this takes decode steps from tensors alone."""
    head_major: bool
    """On a GPU it reads a page's tokens head by head (`PagedKVCache.allocate`)."""

    def attend(
        self,
        *,
        layer: int,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        cache: KVCache,
        layout: BatchLayout,
        options: AttentionOptions,
        stored: bool = False,
    ) -> torch.Tensor:
        """Write K and V of this step into `cache`, return the attention output [T, H, D].

        `layer` counts within the stage, from 0. `stored`: this step's K and V are in the cache
        already (a fused kernel wrote them); they are given all the same.
        """
        ...
