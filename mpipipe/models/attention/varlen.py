"""Attention with torch's own `varlen_attn` over pages: flash attention, no further package.

torch 2.13 and later; compute capability 8.0 and later; float16 and bfloat16; head dimensions that
are multiples of 8, up to 256. It takes every step from tensors alone, so a CUDA graph may hold
decode steps. It knows no softcap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mpipipe.errors import ConfigError
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.attention.base import AttentionBackend, AttentionInputs

if TYPE_CHECKING:
    from mpipipe.kv_cache.layout import BatchLayout

__all__ = ["VarlenAttention", "has_paged_varlen"]


def has_paged_varlen() -> bool:
    """Whether this torch's `varlen_attn` takes a page table."""
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "block_table" in inspect.signature(varlen_attn).parameters


class VarlenAttention(AttentionBackend):
    """Decodes and chunks of prompts in one call."""

    name = "varlen"
    needs_seq_lens = False
    head_major = False

    def attend_stored(self, inputs: AttentionInputs) -> torch.Tensor:
        """See `AttentionBackend`.

        Raises:
            ConfigError: the model caps its scores.
        """
        from torch.nn.attention.varlen import varlen_attn

        layer, query_THD, key_TKD, _, cache, layout, options = inputs
        assert isinstance(cache, PagedKVCache), "it reads pages"
        if options.softcap is not None:
            raise ConfigError(
                'pipeline.attention = "varlen", but this model caps its attention scores, which '
                'torch\'s varlen_attn does not do: use "triton" or "auto"'
            )
        window = -1 if options.window is None else options.window - 1
        attended_THD = varlen_attn(
            query_THD,
            cache.keys[layer],
            cache.values[layer],
            _query_starts(layout),
            None,
            layout.max_query_len,
            layout.max_kv_len,
            scale=options.scale,
            window_size=(window, 0),
            enable_gqa=query_THD.shape[1] != key_TKD.shape[1],
            seqused_k=layout.kv_lens_B,
            block_table=layout.page_table_BP,
        )
        assert isinstance(attended_THD, torch.Tensor)
        return attended_THD


def _query_starts(layout: BatchLayout) -> torch.Tensor:
    """int32 [B + 1]; a decode step has one row per sequence."""
    if layout.query_starts_B1 is not None:
        return layout.query_starts_B1
    device = layout.kv_lens_B.device
    return layout.derive(
        ("varlen", "starts"),
        lambda: torch.arange(layout.num_tokens + 1, dtype=torch.int32, device=device),
    )
