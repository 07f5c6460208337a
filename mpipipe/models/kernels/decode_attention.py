"""Attention of one new token per sequence over the paged cache, split along the sequence.

The method is flash decoding: programs take pieces of one sequence's K and V with a running softmax,
and the pieces are joined by their softmax sums. All query heads of a KV head are served by one
program, so K and V are read once. The grid depends on host-known bounds only; programs derive their
pieces from lengths on the device, so lengths may advance between the replays of a CUDA graph.

Where rows have read the beginnings of their sequences together (`common_attention`), the first
piece of a row begins with what came of that, and its pieces are those of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mpipipe.models.kernels.launch import (
    LOG2_E,
    MAX_COUNTERS,
    await_inputs,
    block_dim,
    gpu_capability,
    has_async_copy,
    launch_options,
    loaded_dim,
    num_processors,
    soft_capped,
    zeroed_counters,
)

if TYPE_CHECKING:
    from mpipipe.models.kernels.common_attention import CommonParts
    from mpipipe.models.layer_options import AttentionOptions

__all__ = ["DecodeTuning", "num_pieces", "paged_decode_attention"]


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """How the work is cut; `tests/gpu/bench_kernels.py` measures the alternatives."""

    block_tokens: int = 64
    num_warps: int = 2
    num_stages: int = 3
    pieces: int | None = None  # None: `num_pieces`


def paged_decode_attention(
    query_BHD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table_BP: torch.Tensor,
    kv_lens_B: torch.Tensor,
    *,
    max_kv_len: int,
    options: AttentionOptions,
    common: CommonParts | None = None,
    tuning: DecodeTuning | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v of each row over its first `kv_lens_B` cached tokens: [B, H, D].

    Args:
        query_BHD: any strides but 1 along D.
        key_cache: [pages, page_size, K, D], any strides but 1 along D; D <= 256.
        value_cache: the same shape and strides.
        page_table_BP: int32.
        kv_lens_B: int32, this token included; a row of length 0 gives zeros.
        max_kv_len: what no entry of `kv_lens_B` exceeds; only the cut into pieces follows from it.
        options: scale, window, softcap.
        common: what rows found in the common pages of their groups; of the same call's arguments,
            so that no window ends within them.
        tuning: None takes what was measured best.
    """
    num_rows = query_BHD.shape[0]
    assert key_cache.stride() == value_cache.stride()
    assert query_BHD.stride(2) == key_cache.stride(3) == page_table_BP.stride(1) == 1
    out_BHD = torch.empty(query_BHD.shape, dtype=query_BHD.dtype, device=query_BHD.device)
    if num_rows:
        tuning = tuning or _default_tuning(key_cache)
        longest = min(max_kv_len, options.window) if options.window else max_kv_len
        streams, processors = num_rows * key_cache.shape[2], num_processors(query_BHD.device)
        pieces = tuning.pieces or num_pieces(streams, longest, tuning.block_tokens, processors)
        tensors = (query_BHD, key_cache, value_cache, page_table_BP, kv_lens_B, out_BHD)
        _launch(tensors, pieces, options, common, tuning)
    return out_BHD


@cache
def num_pieces(num_streams: int, max_kv_len: int, block_tokens: int, processors: int) -> int:
    """Into how many pieces each of `num_streams` (rows × KV heads) sequences is cut.

    The count with the least estimated time: rounds of resident programs × blocks per program, plus
    what a program (its start, its end) and the joining cost, in blocks. The constants reproduce the
    best counts that an H200 showed at 512 to 640 tokens: 1 piece for 512 and 2048 streams, 4 for
    128 (17.5 us; 1 piece 23.4), as many as there are blocks for 32 (10.9 us; 30.4) and for 8.
    """
    resident = _RESIDENT_PROGRAMS * processors
    blocks = -(-max(max_kv_len, 1) // block_tokens)

    def cost(pieces: int) -> float:
        rounds = max(num_streams * pieces / resident, 1.0)
        if rounds < _MANY_ROUNDS:  # later, programs of different ages even the last round out
            rounds = -(-num_streams * pieces // resident)
        joining = 0 if pieces == 1 else _JOIN_BLOCKS + pieces / 16
        return float(rounds * (-(-blocks // pieces) + _PROGRAM_BLOCKS) + joining)

    return min(range(1, min(blocks, _MAX_PIECES) + 1), key=cost)


_RESIDENT_PROGRAMS = 4  # per multiprocessor: 2 warps of 255 registers each
_MANY_ROUNDS = 6
_PROGRAM_BLOCKS = 1.0
_JOIN_BLOCKS = 2.0
_MAX_PIECES = 64


def _default_tuning(key_cache: torch.Tensor) -> DecodeTuning:
    if gpu_capability(key_cache.device) is not None and not has_async_copy(key_cache.device):
        return DecodeTuning(block_tokens=32, num_warps=4, num_stages=1)
    row_bytes = key_cache.shape[3] * key_cache.element_size()
    if row_bytes <= 256:  # wide ones: within the 99 KB of shared memory of consumer GPUs
        return DecodeTuning()
    return DecodeTuning(block_tokens=32, num_stages=3 if row_bytes <= 512 else 1)


def _launch(
    tensors: tuple[torch.Tensor, ...],
    pieces: int,
    options: AttentionOptions,
    common: CommonParts | None,
    tuning: DecodeTuning,
) -> None:
    query_BHD, key_cache, _, page_table_BP, kv_lens_B, out_BHD = tensors
    num_rows, num_heads, head_dim = query_BHD.shape
    _, page_size, num_kv_heads, _ = key_cache.shape
    group = num_heads // num_kv_heads
    parts = sums = counters = out_BHD
    if pieces > 1:
        assert num_rows * num_kv_heads <= MAX_COUNTERS, "`num_pieces` cuts no row of so many"
        counters = zeroed_counters(query_BHD.device)
        parts = query_BHD.new_empty((num_rows, num_heads, pieces, head_dim), dtype=torch.float32)
        sums = query_BHD.new_empty((num_rows, num_heads, pieces), dtype=torch.float32)
    shape = {"HEAD_DIM": head_dim, "BLOCK_DIM": block_dim(head_dim)}
    shape["BLOCK_PIECES"] = triton.next_power_of_2(pieces)
    _decode_kernel[(num_kv_heads, num_rows, pieces)](
        *(*tensors, parts, sums, counters, *(common or (kv_lens_B, out_BHD, out_BHD))),
        *(options.scale if options.softcap else options.scale * LOG2_E, options.softcap or 0.0),
        *(*query_BHD.stride()[:2], page_table_BP.stride(0), pieces, *key_cache.stride()[:3]),
        PAGE_SIZE=page_size,
        LOADED_DIM=loaded_dim(key_cache),
        GROUP=group,
        WINDOW=0 if common else options.window or 0,
        COMMON_PIECES=common.sums_BHP.shape[2] if common else 0,
        SOFTCAP=options.softcap is not None,
        BLOCK_GROUP=max(triton.next_power_of_2(group), 16),
        BLOCK_TOKENS=tuning.block_tokens,
        STAGES=tuning.num_stages,
        num_warps=tuning.num_warps,
        **launch_options(query_BHD.device),
        **shape,
    )


# What differs from step to step outside of graphs makes no kernel of its own: each would be
# compiled in the middle of a run (0.7 s on an H200's host).
@triton.jit(
    do_not_specialize=["table_stride", "pieces"],
    do_not_specialize_on_alignment=["table_ptr", "lens_ptr", "common_ptr"],
)
def _decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    lens_ptr,
    out_ptr,
    part_ptr,
    sum_ptr,
    counter_ptr,
    common_ptr,
    common_part_ptr,
    common_sum_ptr,
    scale,
    softcap,
    query_row_stride,
    query_head_stride,
    table_stride,
    pieces,
    PAGE_STRIDE: tl.constexpr,
    OFFSET_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LOADED_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    COMMON_PIECES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    kv_len = tl.load(lens_ptr + row)
    first = 0
    if COMMON_PIECES > 0:
        first = tl.load(common_ptr + row)
    elif WINDOW > 0:
        first = tl.maximum(kv_len - WINDOW, 0) // BLOCK_TOKENS * BLOCK_TOKENS
    per_piece = tl.cdiv(tl.cdiv(kv_len - first, BLOCK_TOKENS), pieces)
    begin = first + piece * per_piece * BLOCK_TOKENS
    end = tl.minimum(begin + per_piece * BLOCK_TOKENS, kv_len)
    member = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    head = kv_head * GROUP + member
    known = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    queries = query_ptr + row * query_row_stride + head[:, None] * query_head_stride
    query = tl.load(queries + dim[None, :], mask=known, other=0.0)
    top = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    num_kv_heads = tl.num_programs(0)
    stream = row * num_kv_heads * GROUP + head
    if COMMON_PIECES > 0:
        begun = member < tl.where(piece == 0, tl.minimum(first, 1) * GROUP, 0)
        for one in tl.static_range(COMMON_PIECES):  # none has begun: all stays as it is
            held = stream * COMMON_PIECES + one
            held_score = tl.load(common_sum_ptr + held, mask=begun, other=float("-inf"))
            held_values = common_part_ptr + held[:, None] * HEAD_DIM + dim[None, :]
            held_mixed = tl.load(held_values, mask=begun[:, None] & known, other=0.0)
            held_top = tl.maximum(top, held_score)
            base = tl.where(held_top == float("-inf"), 0.0, held_top)
            held_weight = tl.exp2(held_score - base)
            kept = tl.exp2(top - base)
            total = total * kept + held_weight
            mixed = mixed * kept[:, None] + held_mixed * held_weight[:, None]
            top = held_top
    for start in tl.range(begin, end, BLOCK_TOKENS, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_TOKENS)
        seen = token < end
        page = tl.load(table_ptr + row * table_stride + token // PAGE_SIZE, mask=seen, other=0)
        cell = page.to(tl.int64) * PAGE_STRIDE + (token % PAGE_SIZE) * OFFSET_STRIDE
        place = (cell + kv_head * HEAD_STRIDE)[:, None] + dim[None, :]
        loaded = seen[:, None] & (dim < LOADED_DIM)[None, :]
        key = tl.load(key_ptr + place, mask=loaded, other=0.0)
        value = tl.load(value_ptr + place, mask=loaded, other=0.0)
        if WINDOW > 0:
            seen = seen & (token >= kv_len - WINDOW)
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
    mixed = mixed / total[:, None]
    if BLOCK_PIECES == 1:
        tl.store(out_ptr + stream[:, None] * HEAD_DIM + dim[None, :], mixed, mask=known)
    else:
        part = stream * pieces + piece
        tl.store(part_ptr + part[:, None] * HEAD_DIM + dim[None, :], mixed, mask=known)
        tl.store(sum_ptr + part, top + tl.log2(total), mask=member < GROUP)
        # The program of a row that ends last joins its pieces.
        tl.debug_barrier()  # all threads have stored before the program is counted as done
        counter = counter_ptr + row * num_kv_heads + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == pieces - 1:
            tl.store(counter, 0)
            streams = (row * num_kv_heads + kv_head) * GROUP
            for one in tl.static_range(GROUP):
                place = (part_ptr, sum_ptr, out_ptr, streams + one)
                _join(place, pieces, HEAD_DIM, BLOCK_PIECES, BLOCK_DIM)


@triton.jit
def _join(
    place,
    pieces,
    HEAD_DIM: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The pieces of one head of one row, weighted by their sums; past the L1: others wrote them."""
    part_ptr, sum_ptr, out_ptr, stream = place
    piece = tl.arange(0, BLOCK_PIECES)
    dim = tl.arange(0, BLOCK_DIM)
    known = piece < pieces
    score = sum_ptr + stream * pieces + piece
    score = tl.load(score, mask=known, other=float("-inf"), cache_modifier=".cg")
    parts = part_ptr + (stream * pieces + piece[:, None]) * HEAD_DIM + dim[None, :]
    inside = known[:, None] & (dim < HEAD_DIM)[None, :]
    part = tl.load(parts, mask=inside, other=0.0, cache_modifier=".cg")
    top = tl.max(score, axis=0)
    weight = tl.exp2(score - tl.where(top == float("-inf"), 0.0, top))  # an empty row: all zero
    total = tl.sum(weight, axis=0)
    mixed = tl.sum(part * weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + stream * HEAD_DIM + dim, mixed, mask=dim < HEAD_DIM)
