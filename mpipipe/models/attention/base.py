"""The contract of an attention backend: write this step's K and V, then attend over the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from mpipipe.kv_cache.base import KVCache
    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.layer_options import AttentionOptions

__all__ = ["AttentionBackend", "AttentionInputs"]


class AttentionInputs(NamedTuple):
    """One layer's part of one step. `layer` counts within the stage, from 0."""

    layer: int
    query_THD: torch.Tensor
    key_TKD: torch.Tensor
    value_TKD: torch.Tensor
    cache: KVCache  # holds the step's K and V already
    layout: BatchLayout
    options: AttentionOptions


class AttentionBackend(ABC):
    """One instance serves all layers of a stage."""

    name: str
    # It reads `layout.seq_lens`, so the host must know every length: no CUDA graph, and no lengths
    # that advance on the device. A backend without this takes decode steps from tensors alone.
    needs_seq_lens: bool
    head_major: bool  # on a GPU it reads a page's tokens head by head (`PagedKVCache.allocate`)

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
        if not stored:
            cache.write(layer, key_TKD, value_TKD, layout)
        return self.attend_stored(
            AttentionInputs(layer, query_THD, key_TKD, value_TKD, cache, layout, options)
        )

    @abstractmethod
    def attend_stored(self, inputs: AttentionInputs) -> torch.Tensor:
        """The attention output [T, H, D]; the cache holds the step's K and V already."""
