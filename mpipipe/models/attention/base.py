"""The contract of an attention backend: write this step's K and V, then attend over the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from mpipipe.kv_cache.base import KVCache
    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.layer_options import AttentionOptions

__all__ = ["AttentionBackend"]


class AttentionBackend(Protocol):
    """Stateless; one instance serves all layers of a stage."""

    name: str
    needs_seq_lens: bool
    """It reads `layout.seq_lens`, so the host must know every length: no CUDA graph, and no lengths
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
