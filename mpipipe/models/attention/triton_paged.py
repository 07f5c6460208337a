"""Attention with our own Triton kernels: any GPU since Turing, any head dimension up to 256.

Decode steps need tensors alone (`kv_cache.layout.decode_layout`), so a CUDA graph may hold them. In
other steps the leading decodes go to the decode kernel and the chunks of prompts to the prefill
kernel; prompts that begin in this step go to torch's flash attention where that is allowed and
possible (`fresh_prompts`), over the step's own K and V.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.attention.base import AttentionBackend, AttentionInputs
from mpipipe.models.attention.fresh_prompts import attend_fresh, can_attend_fresh

if TYPE_CHECKING:
    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.layer_options import AttentionOptions

__all__ = ["TritonAttention"]


class TritonAttention(AttentionBackend):
    """Paged decode and prefill kernels of `models/kernels`."""

    name = "triton"
    needs_seq_lens = False
    head_major = True

    def __init__(self, *, fresh_with_torch: bool = True) -> None:
        self._fresh_with_torch = fresh_with_torch

    def attend_stored(self, inputs: AttentionInputs) -> torch.Tensor:
        """See `AttentionBackend`."""
        layer, query_THD, key_TKD, value_TKD, cache, layout, options = inputs
        assert isinstance(cache, PagedKVCache), "the kernels read pages"
        num_decodes = layout.num_decodes
        if layout.is_decode:
            return _decode(query_THD, cache, layer, layout, options)
        outputs: list[torch.Tensor] = []
        if num_decodes:
            outputs.append(_decode(query_THD[:num_decodes], cache, layer, layout, options))
            query_THD = query_THD[num_decodes:]
            key_TKD, value_TKD = key_TKD[num_decodes:], value_TKD[num_decodes:]
            layout = _chunks_only(layout)
        if self._fresh_with_torch and can_attend_fresh(query_THD, key_TKD, layout, options):
            outputs.append(attend_fresh(query_THD, key_TKD, value_TKD, layout, options))
        else:
            outputs.append(_prefill(query_THD, cache, layer, layout, options))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _decode(
    query_BHD: torch.Tensor,
    cache: PagedKVCache,
    layer: int,
    layout: BatchLayout,
    options: AttentionOptions,
) -> torch.Tensor:
    from mpipipe.models.kernels.decode_attention import paged_decode_attention

    num_rows = query_BHD.shape[0]
    return paged_decode_attention(
        query_BHD,
        cache.keys[layer],
        cache.values[layer],
        layout.page_table_BP[:num_rows],
        layout.kv_lens_B[:num_rows],
        max_kv_len=layout.max_kv_len,
        options=options,
    )


def _prefill(
    query_THD: torch.Tensor,
    cache: PagedKVCache,
    layer: int,
    layout: BatchLayout,
    options: AttentionOptions,
) -> torch.Tensor:
    from mpipipe.models.kernels.prefill_attention import Chunks, paged_prefill_attention

    assert layout.query_starts_B1 is not None, "the layout was sent to the device"
    return paged_prefill_attention(
        query_THD,
        cache.keys[layer],
        cache.values[layer],
        layout.page_table_BP,
        layout.kv_lens_B,
        chunks=Chunks(layout.query_starts_B1, layout.max_query_len),
        options=options,
    )


def _chunks_only(layout: BatchLayout) -> BatchLayout:
    """The step without its leading decodes; made by the first layer, used by all."""
    key = ("triton", "chunks")
    chunks = layout.derived.get(key)
    if chunks is None:
        first = layout.num_decodes
        assert layout.query_starts_B1 is not None, "the layout was sent to the device"
        chunks = layout.derived[key] = replace(
            layout,
            seq_lens=layout.seq_lens[first:],
            num_decodes=0,
            positions_T=layout.positions_T[first:],
            slot_mapping_T=layout.slot_mapping_T[first:],
            page_table_BP=layout.page_table_BP[first:],
            kv_lens_B=layout.kv_lens_B[first:],
            query_starts_B1=layout.query_starts_B1[first:] - first,
            derived={},
        )
    assert isinstance(chunks, type(layout))
    return chunks
