"""Causal attention of prompt chunks over the paged cache that already holds their own tokens.

One program per block of a chunk's queries and head, with a running softmax over blocks of K and V
(flash attention). Chunks differ in length: programs beyond a chunk's end leave at once. Blocks that
every query of the program sees whole need no mask and are done in a loop of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from mpipipe.models.kernels.launch import (
    LOG2_E,
    await_inputs,
    block_dim,
    gpu_capability,
    has_async_copy,
    launch_options,
    loaded_dim,
    soft_capped,
)

if TYPE_CHECKING:
    from mpipipe.models.layer_options import AttentionOptions

__all__ = ["Chunks", "PrefillTuning", "paged_prefill_attention", "prefill_tuning"]


class Chunks(NamedTuple):
    """Which rows of a step belong to which sequence."""

    starts_B1: torch.Tensor  # int32: first row of each sequence, then T
    max_len: int  # what no chunk exceeds; sets the grid


class PrefillTuning(NamedTuple):
    """Tile sizes and the launch's resources."""

    block_queries: int = 128
    block_tokens: int = 64
    num_warps: int = 8
    num_stages: int = 2


def paged_prefill_attention(
    query_THD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table_BP: torch.Tensor,
    kv_lens_B: torch.Tensor,
    *,
    chunks: Chunks,
    options: AttentionOptions,
    tuning: PrefillTuning | None = None,
) -> torch.Tensor:
    """Attention of each sequence's rows over its cached tokens up to their own: [T, H, D].

    Args:
        query_THD: any strides but 1 along D.
        key_cache: [pages, page_size, K, D], any strides but 1 along D; D <= 256. The chunks' own
            tokens are already written.
        value_cache: the same shape and strides.
        page_table_BP: int32.
        kv_lens_B: int32, the chunk included: its first query is at kv_len - query_len.
        chunks: the rows of each sequence.
        options: scale, window, softcap.
        tuning: None takes what was measured best.
    """
    num_rows, num_heads, head_dim = query_THD.shape
    _, page_size, num_kv_heads, _ = key_cache.shape
    assert key_cache.stride() == value_cache.stride()
    assert query_THD.stride(2) == key_cache.stride(3) == page_table_BP.stride(1) == 1
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
    if not num_rows:
        return out_THD
    tuning = tuning or prefill_tuning(key_cache, chunks.max_len)
    grid = (triton.cdiv(chunks.max_len, tuning.block_queries), num_heads, kv_lens_B.shape[0])
    _prefill_kernel[grid](
        *(query_THD, key_cache, value_cache, page_table_BP, kv_lens_B, chunks.starts_B1, out_THD),
        *(options.scale if options.softcap else options.scale * LOG2_E, options.softcap or 0.0),
        *(*query_THD.stride()[:2], page_table_BP.stride(0), *key_cache.stride()[:3]),
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        LOADED_DIM=loaded_dim(key_cache),
        GROUP=num_heads // num_kv_heads,
        WINDOW=options.window or 0,
        SOFTCAP=options.softcap is not None,
        BLOCK_QUERIES=tuning.block_queries,
        BLOCK_TOKENS=tuning.block_tokens,
        BLOCK_DIM=block_dim(head_dim),
        STAGES=tuning.num_stages,
        num_warps=tuning.num_warps,
        **launch_options(query_THD.device),
    )
    return out_THD


def prefill_tuning(key_cache: torch.Tensor, max_query_len: int) -> PrefillTuning:
    """Of chunks of so many queries at most.

    Within 64 KB of shared memory on Turing, 99 on consumer Ampere and Ada, 227 on Hopper.

    On an H200, 16 prompts of 512: 189 us with 128 tokens a block for D = 128 (64 tokens: 199), but
    256 us with 64 tokens for D = 100 (128 tokens: 276).
    """
    capability, row_bytes = (
        gpu_capability(key_cache.device),
        key_cache.shape[3] * key_cache.element_size(),
    )
    wide = row_bytes > 256
    if capability is not None and not has_async_copy(key_cache.device):
        return PrefillTuning(16 if wide else 32, 32, 4, 1)
    if row_bytes > 512:
        return PrefillTuning(32, 32, 4, 1)
    if capability is not None and capability[0] not in {9, 10}:
        return PrefillTuning(64, 32, 4, 1 if wide else 2)
    if wide or max_query_len <= 64:
        return PrefillTuning(64, 64, 4, 2)
    return PrefillTuning(block_tokens=128) if row_bytes == 256 else PrefillTuning()


# What differs from step to step makes no kernel of its own: see `decode_attention`.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "lens_ptr", "starts_ptr"],
)
def _prefill_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    lens_ptr,
    starts_ptr,
    out_ptr,
    scale,
    softcap,
    query_row_stride,
    query_head_stride,
    table_stride,
    PAGE_STRIDE: tl.constexpr,
    OFFSET_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LOADED_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first: they end the launch
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    row_begin = tl.load(starts_ptr + sequence)
    query_len = tl.load(starts_ptr + sequence + 1) - row_begin
    first = block * BLOCK_QUERIES
    if first >= query_len:
        return
    kv_len = tl.load(lens_ptr + sequence)
    index = first + tl.arange(0, BLOCK_QUERIES)
    dim = tl.arange(0, BLOCK_DIM)
    row = (row_begin + index).to(tl.int64)
    inside = (index < query_len)[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(
        query_ptr + row[:, None] * query_row_stride + head * query_head_stride + dim[None, :],
        mask=inside,
        other=0.0,
    )
    position = kv_len - query_len + index
    first_seen = kv_len - query_len + first  # by every query of this program, it and all before
    end = tl.minimum(first_seen + BLOCK_QUERIES, kv_len)
    begin = 0
    plain_end = first_seen // BLOCK_TOKENS * BLOCK_TOKENS
    if WINDOW > 0:
        begin = tl.maximum(first_seen - WINDOW + 1, 0) // BLOCK_TOKENS * BLOCK_TOKENS
        plain_end = begin
    top = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    mixed = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    cells = (head // GROUP) * HEAD_STRIDE
    table = table_ptr + sequence * table_stride
    for part in tl.static_range(0 if WINDOW == 0 else 1, 2):
        low = begin if part == 0 else plain_end
        high = plain_end if part == 0 else end
        for start in tl.range(low, high, BLOCK_TOKENS, num_stages=STAGES):
            token = start + tl.arange(0, BLOCK_TOKENS)
            page = tl.load(table + token // PAGE_SIZE, mask=token < end, other=0)
            cell = page.to(tl.int64) * PAGE_STRIDE + (token % PAGE_SIZE) * OFFSET_STRIDE
            place = (cell + cells)[:, None] + dim[None, :]
            loaded = (dim < LOADED_DIM)[None, :] & (token < end)[:, None]
            key = tl.load(key_ptr + place, mask=loaded, other=0.0)
            value = tl.load(value_ptr + place, mask=loaded, other=0.0)
            score = tl.dot(query, key.T, input_precision="ieee") * scale
            if SOFTCAP:
                score = soft_capped(score, softcap) * 1.4426950408889634
            if part == 1:
                seen = token[None, :] <= position[:, None]
                if WINDOW > 0:
                    seen = seen & (token[None, :] > position[:, None] - WINDOW)
                score = tl.where(seen, score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, axis=1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far
            weight = tl.exp2(score - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weight, axis=1)
            mixed = mixed * shrink[:, None]
            mixed = tl.dot(weight.to(value.dtype), value, mixed, input_precision="ieee")
            top = new_top
    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    out = out_ptr + (row * tl.num_programs(1) + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out, mixed, mask=inside)
