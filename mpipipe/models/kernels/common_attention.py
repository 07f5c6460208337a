"""Attention of the rows of a decode step over the pages that they have in common, read once.

The first half of a decode step with common pages, known as cascade attention: a program takes many
rows of one group, with all query heads of a KV head, over a piece of the group's common pages. It
leaves a softmax sum and a mean of values for each row and head in float32, with which
`decode_attention` begins the row's own pages. (FlashInfer,
https://flashinfer.ai/2024/02/02/cascade-inference.html; Hydragen, arXiv:2402.05099.)

Groups are read from tables on the device. The grid is that of the most tiles that any groups of so
many rows can have; programs without a tile leave at once. So a CUDA graph may hold the launch, and
an empty table leaves every row to read alone.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from mpipipe.kv_cache.common_tables import MAX_GROUPS
from mpipipe.models.kernels.launch import (
    LOG2_E,
    await_inputs,
    block_dim,
    launch_options,
    loaded_dim,
    num_processors,
    soft_capped,
)
from mpipipe.models.kernels.prefill_attention import prefill_tuning

if TYPE_CHECKING:
    from mpipipe.kv_cache.common_tables import CommonTables
    from mpipipe.models.kernels.prefill_attention import PrefillTuning
    from mpipipe.models.layer_options import AttentionOptions

__all__ = ["CommonParts", "attend_common", "can_attend_common"]

_TILE_QUERIES = 64  # queries of a tile at most: those that 4 warps hold
_MAX_PIECES = 8  # each is stored, and loaded again by every row
_PIECE_BLOCKS = 4  # of a piece at least, where all blocks are filled


class CommonParts(NamedTuple):
    """What rows found in the common pages of their groups; only where `tokens_B` is not 0."""

    tokens_B: torch.Tensor  # int32: common tokens of each row's group
    mixed_BHPD: torch.Tensor  # float32: the mean of the values of each piece
    sums_BHP: torch.Tensor  # float32: the logarithm to base 2 of its softmax sum


def can_attend_common(
    query_BHD: torch.Tensor, key_cache: torch.Tensor, max_kv_len: int, options: AttentionOptions
) -> bool:
    """Whether tiles hold two rows, and no window may end within the common pages."""
    group = query_BHD.shape[1] // key_cache.shape[2]
    window = options.window
    return (
        query_BHD.shape[0] > 1
        and 2 * group <= _tuning(key_cache).block_queries
        and (window is None or window >= max_kv_len)
    )


def attend_common(
    query_BHD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table_BP: torch.Tensor,
    tables: CommonTables,
    *,
    max_kv_len: int,
    options: AttentionOptions,
    tuning: PrefillTuning | None = None,
) -> CommonParts:
    """Attention of grouped rows over what is common to their groups. If `can_attend_common`.

    Args as for `paged_decode_attention`; `tuning`: None takes that of prefill steps.
    """
    num_rows, num_heads, head_dim = query_BHD.shape
    _, page_size, num_kv_heads, _ = key_cache.shape
    tuning = tuning or _tuning(key_cache)
    group = num_heads // num_kv_heads
    tile_rows = tuning.block_queries // group
    streams, processors = num_kv_heads * -(-num_rows // tile_rows), num_processors(query_BHD.device)
    pieces = _num_pieces(streams, max_kv_len, tuning.block_tokens, processors)
    sums_BHP = query_BHD.new_empty((num_rows, num_heads, pieces), dtype=torch.float32)
    mixed_BHPD = sums_BHP.new_empty((*sums_BHP.shape, head_dim))
    shape = {"HEAD_DIM": head_dim, "GROUP": group, "TILE_ROWS": tile_rows, "PIECES": pieces}
    _common_kernel[(num_kv_heads, _most_tiles(num_rows, tile_rows), pieces)](
        *(query_BHD, key_cache, value_cache, page_table_BP, *tables, mixed_BHPD, sums_BHP),
        *(options.scale if options.softcap else options.scale * LOG2_E, options.softcap or 0.0),
        *(*query_BHD.stride()[:2], page_table_BP.stride(0), *key_cache.stride()[:3]),
        PAGE_SIZE=page_size,
        LOADED_DIM=loaded_dim(key_cache),
        GROUPS=MAX_GROUPS,
        SOFTCAP=options.softcap is not None,
        BLOCK_QUERIES=tuning.block_queries,
        BLOCK_TOKENS=tuning.block_tokens,
        BLOCK_DIM=block_dim(head_dim),
        STAGES=tuning.num_stages,
        num_warps=tuning.num_warps,
        **launch_options(query_BHD.device),
        **shape,
    )
    return CommonParts(tables.common_tokens, mixed_BHPD, sums_BHP)


def _tuning(key_cache: torch.Tensor) -> PrefillTuning:
    """That of prompt chunks as long as a tile: the work is theirs, but for the mask."""
    return prefill_tuning(key_cache, _TILE_QUERIES)


def _most_tiles(num_rows: int, tile_rows: int) -> int:
    """Of any groups of so many rows: each but for full tiles has one that lacks a row at least."""
    num_groups = min(MAX_GROUPS, num_rows // 2)
    return (num_rows + num_groups * (tile_rows - 1)) // tile_rows


@cache
def _num_pieces(num_streams: int, max_kv_len: int, block_tokens: int, processors: int) -> int:
    """A power of two, so that two programs for each multiprocessor have work, if there is enough.

    By estimate: not measured yet. `num_streams`: KV heads × tiles of a group of all rows.
    """
    blocks = -(-max_kv_len // block_tokens)
    most = min(2 * processors // num_streams, blocks // _PIECE_BLOCKS, _MAX_PIECES)
    return 1 << (max(most, 1).bit_length() - 1)


# What differs from step to step outside of graphs makes no kernel of its own:
# see `decode_attention`.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "tokens_ptr", "rows_ptr", "ends_ptr"],
)
def _common_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    tokens_ptr,
    rows_ptr,
    ends_ptr,
    part_ptr,
    sum_ptr,
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
    GROUPS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    piece = tl.program_id(2)
    # Which group has the tile, and which of its rows.
    number = tl.arange(0, GROUPS)
    group_end = tl.load(ends_ptr + number)
    group_start = tl.load(ends_ptr + number - 1, mask=number > 0, other=0)
    tiles = tl.cdiv(group_end - group_start, TILE_ROWS)
    tile_end = tl.cumsum(tiles, 0)
    if tile >= tl.max(tile_end, axis=0):
        return
    own = (tile_end > tile) & (tile_end - tiles <= tile)
    start = tl.sum(tl.where(own, group_start, 0), axis=0)
    last = tl.sum(tl.where(own, group_end, 0), axis=0)
    first = start + (tile - tl.sum(tl.where(own, tile_end - tiles, 0), axis=0)) * TILE_ROWS
    leader = tl.load(rows_ptr + start).to(tl.int64)
    num_tokens = tl.load(tokens_ptr + leader)
    per_piece = tl.cdiv(tl.cdiv(num_tokens, BLOCK_TOKENS), PIECES) * BLOCK_TOKENS
    begin = piece * per_piece
    end = tl.minimum(begin + per_piece, num_tokens)
    index = tl.arange(0, BLOCK_QUERIES)
    dim = tl.arange(0, BLOCK_DIM)
    place = first + index // GROUP
    known = (index < TILE_ROWS * GROUP) & (place < last)
    row = tl.load(rows_ptr + place, mask=known, other=0).to(tl.int64)
    head = kv_head * GROUP + index % GROUP
    inside = known[:, None] & (dim < HEAD_DIM)[None, :]
    queries = query_ptr + row[:, None] * query_row_stride + head[:, None] * query_head_stride
    query = tl.load(queries + dim[None, :], mask=inside, other=0.0)
    top = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    mixed = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    table = table_ptr + leader * table_stride
    for from_token in tl.range(begin, end, BLOCK_TOKENS, num_stages=STAGES):
        token = from_token + tl.arange(0, BLOCK_TOKENS)
        seen = token < end
        page = tl.load(table + token // PAGE_SIZE, mask=seen, other=0)
        cell = page.to(tl.int64) * PAGE_STRIDE + (token % PAGE_SIZE) * OFFSET_STRIDE
        cells = (cell + kv_head * HEAD_STRIDE)[:, None] + dim[None, :]
        loaded = seen[:, None] & (dim < LOADED_DIM)[None, :]
        key = tl.load(key_ptr + cells, mask=loaded, other=0.0)
        value = tl.load(value_ptr + cells, mask=loaded, other=0.0)
        score = tl.dot(query, key.T, input_precision="ieee") * scale
        if SOFTCAP:
            score = soft_capped(score, softcap) * 1.4426950408889634
        score = tl.where(seen[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))  # finite: a block holds a seen token
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, axis=1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weight.to(value.dtype), value, mixed, input_precision="ieee")
        top = new_top
    total = tl.where(total > 0.0, total, 1.0)  # 0: an empty piece, whose `top` is -inf
    stream = row * tl.num_programs(0) * GROUP + head
    part = stream * PIECES + piece
    mixed = mixed / total[:, None]
    tl.store(part_ptr + part[:, None] * HEAD_DIM + dim[None, :], mixed, mask=inside)
    tl.store(sum_ptr + part, top + tl.log2(total), mask=known)
