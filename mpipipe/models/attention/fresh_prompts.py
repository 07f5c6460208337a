"""Prompts of equal length that begin in this step, with torch's scaled_dot_product_attention.

Nothing has to be read from pages, and prompts of one length make a plain batch, for which torch
has faster kernels than ours: on an H200, 32/8 heads of 128 over 8,192 tokens, 99 µs in prompts of
512 against 189 of our paged kernel (233 of torch's `varlen_attn`), and 265 against 437 in
prompts of 2,048. Head dimensions that are no multiple of 8 would be padded: 583 against 256 at 100.

Before compute capability 8.0 torch has no flash kernel, and its memory-efficient one wants as many
KV heads as query heads: query heads in groups would get the plain formula, with all scores at once.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.layer_options import AttentionOptions

__all__ = ["attend_fresh", "can_attend_fresh"]

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
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def attend_fresh(
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
