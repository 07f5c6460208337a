"""Rotary embedding of queries and keys, and the write of keys and values into the paged cache.

One launch per layer instead of about a dozen. cos and sin come as tensors that the model computes
once per step and all layers share: 200 bytes a token and layer, against 20 kB that the kernel moves
anyway, and every variant of rotary scaling stays transformers' own business. (Computing them here
would need sin and cos of large arguments in every layer and would have to repeat each variant.)

Rows of the cache that are padded in memory are written padding included, with zeros: a GPU reads
what surrounds a sector (32 bytes) that is written in part. On an H200, 4,096 tokens, 32 and 32
heads of 100 in rows of 104: 64 us, 90 without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mpipipe.models.kernels.launch import await_inputs, launch_options, loaded_dim

if TYPE_CHECKING:
    from mpipipe.models.layer_options import HeadNorms

__all__ = ["rotate_and_store"]

_MAX_HEADS_PER_PROGRAM = 8


def rotate_and_store(
    qkv_TX: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    slot_mapping_T: torch.Tensor,
    norms: HeadNorms | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate q and k of the merged projection, store k and v; returns q [T, H, D], k, v [T, K, D].

    q and k are views of one new tensor, v of `qkv_TX`, which stays as it is.

    Args:
        qkv_TX: X = (H + 2 K) * D: query heads, then key heads, then value heads.
        cos_TD: in the dtype of `qkv_TX`, halves equal (transformers' form): element i is rotated
            with i + D / 2. Products are rounded to the dtype before they are added, as transformers
            does.
        sin_TD: like `cos_TD`.
        key_cache: [pages, page_size, K, D] with any strides but 1 along D; padding up to the next
            multiple of 8 elements is set to zero where rows have it.
        value_cache: the same shape and strides.
        slot_mapping_T: int64: page * page_size + offset.
        norms: applied to q and k first.
    """
    num_kv_heads, head_dim = key_cache.shape[2:]
    num_tokens, width = qkv_TX.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    assert qkv_TX.stride(1) == cos_TD.stride(1) == sin_TD.stride(1) == key_cache.stride(3) == 1
    assert key_cache.stride() == value_cache.stride()
    assert cos_TD.stride() == sin_TD.stride()
    assert cos_TD.shape[1] == head_dim
    out_TQD = qkv_TX.new_empty((num_tokens, num_heads + num_kv_heads, head_dim))
    if num_tokens:
        tensors = (qkv_TX, cos_TD, sin_TD, out_TQD, key_cache, value_cache, slot_mapping_T)
        _launch(tensors, num_heads, norms)
    value_TX = qkv_TX[:, (num_heads + num_kv_heads) * head_dim :]
    value_TKD = value_TX.unflatten(1, (num_kv_heads, head_dim))
    return out_TQD[:, :num_heads], out_TQD[:, num_heads:], value_TKD


def _launch(tensors: tuple[torch.Tensor, ...], num_heads: int, norms: HeadNorms | None) -> None:
    qkv_TX, cos_TD, _, _, key_cache, _, _ = tensors
    _, page_size, num_kv_heads, head_dim = key_cache.shape
    heads = min(triton.next_power_of_2(num_kv_heads), _MAX_HEADS_PER_PROGRAM)
    stored_dim = loaded_dim(key_cache)
    blocks = triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
    _rotate_kernel[(qkv_TX.shape[0], blocks)](
        *tensors,
        norms.query_D if norms else qkv_TX,
        norms.key_D if norms else qkv_TX,
        norms.eps if norms else 0.0,
        qkv_TX.stride(0),
        cos_TD.stride(0),
        *key_cache.stride()[:3],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        NORMS=norms is not None,
        HEADS=heads,
        STORED_DIM=stored_dim,
        BLOCK_HALF=triton.next_power_of_2(stored_dim - head_dim // 2),
        num_warps=4,
        enable_fp_fusion=False,  # else a product and the sum become one operation, rounded once
        **launch_options(qkv_TX.device),
    )


@triton.jit
def _rotate_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slots_ptr,
    query_norm_ptr,
    key_norm_ptr,
    eps,
    qkv_stride,
    cos_stride,
    PAGE_STRIDE: tl.constexpr,
    OFFSET_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NORMS: tl.constexpr,
    HEADS: tl.constexpr,
    STORED_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    QUERY_BLOCKS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KEY_BLOCKS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    slot = tl.load(slots_ptr + token)
    cell = (slot // PAGE_SIZE) * PAGE_STRIDE + (slot % PAGE_SIZE) * OFFSET_STRIDE
    is_query = block < QUERY_BLOCKS
    is_value = block >= QUERY_BLOCKS + KEY_BLOCKS
    first = tl.where(is_query, 0, tl.where(is_value, QUERY_BLOCKS + KEY_BLOCKS, QUERY_BLOCKS))
    head = (block - first) * HEADS + tl.arange(0, HEADS)  # within its kind
    known = head < tl.where(is_query, NUM_HEADS, NUM_KV_HEADS)
    before = tl.where(is_query, 0, tl.where(is_value, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS))
    source = qkv_ptr + token * qkv_stride + ((before + head) * HEAD_DIM)[:, None]
    target = out_ptr + token * (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM
    target += ((before + head) * HEAD_DIM)[:, None]
    stored = cell + (head * HEAD_STRIDE)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = known[:, None] & (column < HALF)
    with_padding = known[:, None] & (column < STORED_DIM - HALF)  # zeros: see `other`
    low = tl.load(source + column, mask=inside, other=0.0)
    high = tl.load(source + HALF + column, mask=inside, other=0.0)
    if is_value:
        tl.store(value_cache_ptr + stored + column, low, mask=inside)
        tl.store(value_cache_ptr + stored + HALF + column, high, mask=with_padding)
    else:
        if NORMS:
            norm = query_norm_ptr if is_query else key_norm_ptr
            squares = tl.sum(_squared(low) + _squared(high), axis=1)
            factor = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
            low = _normed(low, factor, norm + column, column < HALF)
            high = _normed(high, factor, norm + HALF + column, column < HALF)
        cos = tl.load(cos_ptr + token * cos_stride + column, mask=column < HALF, other=0.0)
        sin = tl.load(sin_ptr + token * cos_stride + column, mask=column < HALF, other=0.0)
        turned_low = (_rounded(low, cos) - _rounded(high, sin)).to(low.dtype)
        turned_high = (_rounded(high, cos) + _rounded(low, sin)).to(low.dtype)
        tl.store(target + column, turned_low, mask=inside)
        tl.store(target + HALF + column, turned_high, mask=inside)
        if block >= QUERY_BLOCKS:
            tl.store(key_cache_ptr + stored + column, turned_low, mask=inside)
            tl.store(key_cache_ptr + stored + HALF + column, turned_high, mask=with_padding)


@triton.jit
def _squared(value):
    return value.to(tl.float32) * value.to(tl.float32)


@triton.jit
def _normed(value, factor, weight_ptr, inside):
    """Rounded to the dtype before the weight is applied, as transformers' Qwen3RMSNorm does."""
    weight = tl.load(weight_ptr, mask=inside, other=0.0).to(tl.float32)
    normed = (value.to(tl.float32) * factor).to(value.dtype)
    return (normed.to(tl.float32) * weight).to(value.dtype)


@triton.jit
def _rounded(value, factor):
    """The product, rounded to the dtype, in float32 again."""
    return (value.to(tl.float32) * factor.to(tl.float32)).to(value.dtype).to(tl.float32)
