"""Attention with our own Triton kernels: any GPU since Turing, any head dimension up to 256.

Decode steps need tensors alone (`kv_cache.layout.decode_layout`), so a CUDA graph may hold them;
rows that begin with the same pages may read these together (`BatchLayout.common`). In
other steps the leading decodes go to the decode kernel and the chunks of prompts to the prefill
kernel; prompts that begin in this step go to torch's flash attention where that is allowed and
possible, over the step's own K and V.

For prompts of equal length that begin in one step nothing has to be read from pages. They make a
plain batch, for which torch has faster kernels than ours: on an H200, 32/8 heads of 128 over 8,192
tokens, 99 µs in prompts of 512 against 189 of our paged kernel (233 of torch's `varlen_attn`), and
265 against 437 in prompts of 2,048. Head dimensions that are no multiple of 8 would be padded: 583
against 256 at 100.

Before compute capability 8.0 torch has no flash kernel, and its memory-efficient one wants as many
KV heads as query heads: query heads in groups would get the plain formula, with all scores at once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.attention.base import AttentionBackend, AttentionInputs

if TYPE_CHECKING:
    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.layer_options import AttentionOptions

__all__ = ["TritonAttention", "can_attend_fresh"]


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
            layout = layout.derive(("triton", "chunks"), lambda: _chunks_only(layout))
        if self._fresh_with_torch and can_attend_fresh(query_THD, key_TKD, layout, options):
            outputs.append(_attend_fresh(query_THD, key_TKD, value_TKD, layout, options))
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
    from mpipipe.models.kernels.common_attention import attend_common, can_attend_common
    from mpipipe.models.kernels.decode_attention import paged_decode_attention

    keys, values, max_kv_len = cache.keys[layer], cache.values[layer], layout.max_kv_len
    num_rows = query_BHD.shape[0]
    page_table_BP, parts = layout.page_table_BP[:num_rows], None
    if layout.common and can_attend_common(query_BHD, keys, max_kv_len, options):
        parts = attend_common(
            *(query_BHD, keys, values, page_table_BP, layout.common),
            max_kv_len=max_kv_len,
            options=options,
        )
    return paged_decode_attention(
        *(query_BHD, keys, values, page_table_BP, layout.kv_lens_B[:num_rows]),
        max_kv_len=max_kv_len,
        options=options,
        common=parts,
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
    """The step without its leading decodes."""
    first = layout.num_decodes
    assert layout.query_starts_B1 is not None, "the layout was sent to the device"
    return replace(
        layout,
        seq_lens=layout.seq_lens[first:],
        num_decodes=0,
        positions_T=layout.positions_T[first:],
        slot_mapping_T=layout.slot_mapping_T[first:],
        page_table_BP=layout.page_table_BP[first:],
        kv_lens_B=layout.kv_lens_B[first:],
        query_starts_B1=layout.query_starts_B1[first:] - first,
        _derived={},
    )


_ALIGNMENT = 8  # elements of a head: torch's kernels load 16 bytes at a time
_HALF_TYPES = frozenset({torch.float16, torch.bfloat16})


def can_attend_fresh(
    query_THD: torch.Tensor, key_TKD: torch.Tensor, layout: BatchLayout, options: AttentionOptions
) -> bool:
    """Whether all sequences of the step begin in it, equally long, and torch is faster."""
    num_heads, head_dim = query_THD.shape[1:]
    return (
        options.softcap is None
        and (options.window is None or options.window >= layout.max_query_len)
        and query_THD.dtype in _HALF_TYPES
        and head_dim <= 256
        and head_dim % _ALIGNMENT == 0
        and (num_heads == key_TKD.shape[1] or _has_flash_kernel(query_THD.device))
        and all(
            seq.num_computed == 0 and seq.query_len == layout.max_query_len
            for seq in layout.seq_lens
        )
    )


@cache
def _has_flash_kernel(device: torch.device) -> bool:
    from mpipipe.models.kernels.launch import gpu_capability

    capability = gpu_capability(device)
    return capability is None or capability >= (8, 0)


def _attend_fresh(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    layout: BatchLayout,
    options: AttentionOptions,
) -> torch.Tensor:
    """Causal attention of each prompt over itself: [T, H, D]. Only where `can_attend_fresh`."""
    shape = (len(layout.seq_lens), layout.max_query_len)
    query_BHLD, key_BKLD, value_BKLD = (
        tensor.unflatten(0, shape).transpose(1, 2) for tensor in (query_THD, key_TKD, value_TKD)
    )
    attended_BHLD = scaled_dot_product_attention(
        query_BHLD,
        key_BKLD,
        value_BKLD,
        is_causal=True,
        scale=options.scale,
        enable_gqa=query_THD.shape[1] != key_TKD.shape[1],
    )
    return attended_BHLD.transpose(1, 2).flatten(0, 1)
