"""What surrounds the layers of a decode step, in as few launches as it takes.

`advance_rows` before them: lengths, positions, cache slots and input tokens of all rows, one launch
instead of ten. `greedy_ids` behind them: the likeliest token of each row, two launches, spread over
the GPU (torch's own max gives a row to one block: 41 µs for a row of 128,256, H200).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mpipipe.models.kernels.launch import await_inputs, launch_options

__all__ = ["advance_rows", "greedy_ids"]

_PART = 2048  # logits of one program: 63 programs for a row of 128,256


def advance_rows(
    kv_len_B: torch.Tensor,
    active_B: torch.Tensor,
    pages_BP: torch.Tensor,
    request_rows_B: torch.Tensor,
    last_token_N: torch.Tensor,
    *,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add a token to every active row.

    Args:
        kv_len_B: int32, grows in place by `active_B`.
        active_B: int32, 1 for rows that hold a sequence.
        pages_BP: int32 page tables.
        request_rows_B: int64, places in `last_token_N`.
        last_token_N: int64; negative ones are read as 0.
        page_size: tokens per page.

    Returns:
        Positions, cache slots (page * page_size + offset) and tokens of the rows: int64 [B] each.
    """
    num_rows = kv_len_B.shape[0]
    out_3B = torch.empty(3, num_rows, dtype=torch.int64, device=kv_len_B.device)
    _advance_kernel[(triton.cdiv(num_rows, 128),)](
        *(kv_len_B, active_B, pages_BP, request_rows_B, last_token_N, out_3B),
        *(num_rows, pages_BP.stride(0)),
        PAGE_SIZE=page_size,
        BLOCK=128,
        num_warps=4,
        **launch_options(kv_len_B.device),
    )
    return out_3B[0], out_3B[1], out_3B[2]


@triton.jit(do_not_specialize=["num_rows"])
def _advance_kernel(
    len_ptr,
    active_ptr,
    pages_ptr,
    request_rows_ptr,
    token_ptr,
    out_ptr,
    num_rows,
    pages_stride,
    PAGE_SIZE: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_inputs(EARLY)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    length = tl.load(len_ptr + row, mask=inside, other=0)
    length += tl.load(active_ptr + row, mask=inside, other=0)
    tl.store(len_ptr + row, length, mask=inside)
    position = tl.maximum(length - 1, 0)
    place = row.to(tl.int64) * pages_stride + position // PAGE_SIZE
    page = tl.load(pages_ptr + place, mask=inside, other=0).to(tl.int64)
    request_row = tl.load(request_rows_ptr + row, mask=inside, other=0)
    token = tl.maximum(tl.load(token_ptr + request_row, mask=inside, other=0), 0)
    tl.store(out_ptr + row, position.to(tl.int64), mask=inside)
    tl.store(out_ptr + num_rows + row, page * PAGE_SIZE + position % PAGE_SIZE, mask=inside)
    tl.store(out_ptr + 2 * num_rows + row, token, mask=inside)


def greedy_ids(logits_SV: torch.Tensor) -> torch.Tensor:
    """The lowest id of each row's largest logit, -1 where that is not finite: int64 [S]."""
    num_rows, num_ids = logits_SV.shape
    device = logits_SV.device
    parts = triton.cdiv(num_ids, _PART)
    ids_S = torch.empty(num_rows, dtype=torch.int64, device=device)
    if not num_rows:
        return ids_S
    tops = torch.empty(num_rows, parts, dtype=torch.float32, device=device)
    places = torch.empty(num_rows, parts, dtype=torch.int32, device=device)
    _part_kernel[(num_rows, parts)](
        *(logits_SV, tops, places, num_ids, logits_SV.stride(0)),
        BLOCK=_PART,
        num_warps=4,
        **launch_options(device),
    )
    _best_kernel[(num_rows,)](
        *(tops, places, ids_S, parts),
        BLOCK=triton.next_power_of_2(parts),
        num_warps=1,
        **launch_options(device),
    )
    return ids_S


@triton.jit
def _first_of_largest(value, place):
    """The largest value and the lowest place that holds it."""
    top = tl.max(value, axis=0)
    return top, tl.min(tl.where(value == top, place, 2147483647), axis=0)


@triton.jit
def _part_kernel(
    logits_ptr, top_ptr, place_ptr, num_ids, row_stride, EARLY: tl.constexpr, BLOCK: tl.constexpr
):
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_ids
    value = tl.load(logits_ptr + row * row_stride + place, mask=inside, other=float("-inf"))
    value = value.to(tl.float32)
    value = tl.where(value == value, value, float("inf"))  # noqa: PLR0124 - NaN counts as infinity
    top, first = _first_of_largest(value, tl.where(inside, place, 2147483647))
    cell = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(top_ptr + cell, top)
    tl.store(place_ptr + cell, first)


@triton.jit
def _best_kernel(top_ptr, place_ptr, ids_ptr, parts, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    inside = part < parts
    value = tl.load(top_ptr + row * parts + part, mask=inside, other=float("-inf"))
    place = tl.load(place_ptr + row * parts + part, mask=inside, other=2147483647)
    top, first = _first_of_largest(value, place)
    finite = (top < float("inf")) & (top > float("-inf"))
    tl.store(ids_ptr + row, tl.where(finite, first.to(tl.int64), -1))
