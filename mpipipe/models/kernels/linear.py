"""Matrix products for few rows: the time to stream the weight once, and little else.

Each program keeps several tiles of its weight rows in flight and multiplies them with all T rows at
once on the matrix units. Where the weight has too few rows to occupy the GPU, programs share a
tile's input dimension; each leaves its partial sums, and the one that comes last adds them up in
the order of the input, so the result does not depend on timing.

A weight of 8 bits (`quantized_linear`) is converted to the dtype of the rows in registers, and each
sum is multiplied with the scale of its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from mpipipe.models.kernels.launch import (
    MAX_COUNTERS,
    await_inputs,
    gpu_capability,
    has_async_copy,
    launch_options,
    num_processors,
    zeroed_counters,
)

__all__ = [
    "MAX_ROWS",
    "LinearTuning",
    "default_tuning",
    "launch_linear",
    "prefers_small_linear",
    "small_linear",
]

MAX_ROWS = 32


@dataclass(frozen=True, slots=True)
class LinearTuning:
    """How a product is cut. `tests/gpu/bench_kernels.py` measures the alternatives."""

    block_out: int = 64
    block_in: int = 128
    pieces: int = 1  # of the input dimension
    num_warps: int = 4
    num_stages: int = 4
    least_rows: int = 16  # in a tile: what few rows are padded to
    block_rows: int = 32  # at most in a tile: more rows have programs of their own


def small_linear(
    hidden_TH: torch.Tensor,
    weight_OH: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    *,
    tuning: LinearTuning | None = None,
) -> torch.Tensor:
    """The product hidden · weightᵀ (+ bias): [T, O], for T <= MAX_ROWS.

    Accumulates in float32. Deterministic.

    Call it once outside of any CUDA graph first: its counters are allocated then. They are shared
    by all launches on a device, so calls must not run at the same time on several streams.
    """
    num_rows, num_out, num_in = hidden_TH.shape[0], *weight_OH.shape
    assert num_rows <= MAX_ROWS, f"{num_rows} rows, at most {MAX_ROWS} allowed"
    tuning = tuning or default_tuning(num_out, num_in, hidden_TH.device)
    return launch_linear(hidden_TH, weight_OH, None, bias_O, tuning)


@cache
def prefers_small_linear(num_rows: int, num_out: int, num_in: int, device: torch.device) -> bool:
    """Whether `small_linear` beats torch's linear, by what was measured on an H200.

    There it is 3 to 20 % faster up to 32 rows, except where the tiles of the weight's rows fill the
    GPU more than once but not often: then the last ones run alone, and cuBLAS cuts better
    (17280x3200: 32.4 us against 30.4). 28672x4096 is equal alone and 4 % faster between kernels
    that are launched early. Other GPUs were not measured.
    """
    capability = gpu_capability(device)
    if capability is None or capability[0] != 9:
        return False
    if not 0 < num_rows <= MAX_ROWS or num_in % 8:
        return False
    rounds = -(-num_out // 64) / num_processors(device)
    return rounds <= 1.25 or rounds >= 3.3


@cache
def default_tuning(num_out: int, num_in: int, device: torch.device) -> LinearTuning:
    """The cut for a shape, by the rules that reproduce what an H200 showed.

    6 stages hold 144 KB, so one program at a time per multiprocessor; 4 stages hold 96 KB, two.
    """
    if not has_async_copy(device):
        return LinearTuning(block_out=32, block_in=64, num_stages=1)
    capability = gpu_capability(device)
    if capability is not None and capability[0] not in {9, 10}:
        return LinearTuning(block_out=32, num_stages=3)  # within 99 KB
    processors, tiles = num_processors(device), -(-num_out // 64)
    pieces = 1
    if num_in >= _LONG and tiles * 2 <= processors:
        pieces = processors // tiles
        if tiles * pieces < 0.9 * processors:  # 3200x8640: 4 pieces 17.1 us, 1 piece 19.0
            return LinearTuning(pieces=round(1.5 * processors / tiles), num_stages=4)
    return LinearTuning(pieces=pieces, num_stages=6 if tiles * pieces <= processors else 4)


_LONG = 8192  # from so many inputs on, sharing them pays for adding the sums (4096x4096: not)


def launch_linear(
    hidden_TH: torch.Tensor,
    weight_OH: torch.Tensor,
    scale_O: torch.Tensor | None,
    bias_O: torch.Tensor | None,
    tuning: LinearTuning,
) -> torch.Tensor:
    """The product hidden · weightᵀ (· scale) (+ bias): [T, O], in hidden's dtype. T > 0."""
    num_rows, num_in = hidden_TH.shape
    num_out = weight_OH.shape[0]
    assert num_rows > 0
    assert hidden_TH.stride(1) == weight_OH.stride(1) == 1
    out_TO = hidden_TH.new_empty((num_rows, num_out))
    block_rows = max(triton.next_power_of_2(num_rows), tuning.least_rows)
    block_rows = min(block_rows, tuning.block_rows)
    row_tiles = triton.cdiv(num_rows, block_rows)
    programs = triton.cdiv(num_out, tuning.block_out) * row_tiles
    parts = counters = out_TO
    if tuning.pieces > 1:
        assert programs <= MAX_COUNTERS
        size = programs * tuning.pieces * tuning.block_out * block_rows
        parts = hidden_TH.new_empty(size, dtype=torch.float32)
        counters = zeroed_counters(hidden_TH.device)
    _linear_kernel[(programs, tuning.pieces)](
        *(hidden_TH, weight_OH, hidden_TH if scale_O is None else scale_O),
        *(hidden_TH if bias_O is None else bias_O, out_TO),
        *(parts, counters, num_rows, num_out, num_in),
        *(hidden_TH.stride(0), weight_OH.stride(0)),
        HAS_SCALE=scale_O is not None,
        HAS_BIAS=bias_O is not None,
        WHOLE=num_in % tuning.block_in == 0 and num_out % tuning.block_out == 0,
        ROW_TILES=row_tiles > 1,
        PIECES=tuning.pieces,
        BLOCK_ROWS=block_rows,
        BLOCK_OUT=tuning.block_out,
        BLOCK_IN=tuning.block_in,
        STAGES=tuning.num_stages,
        num_warps=tuning.num_warps,
        **launch_options(weight_OH.device),
    )
    return out_TO


@triton.jit
def _place(program, num_rows, ROW_TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The tile of the weight's rows, and the rows to multiply it with; neighbours share a tile."""
    row = tl.arange(0, BLOCK_ROWS)
    if ROW_TILES:
        row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
        return program // row_tiles, row + (program % row_tiles) * BLOCK_ROWS
    return program, row


@triton.jit
def _load_tile(pointers, known, inside, WHOLE: tl.constexpr, ROW_TILES: tl.constexpr):
    """A tile of weights; where each is read once, the L2 need not keep it."""
    POLICY: tl.constexpr = "" if ROW_TILES else "evict_first"
    if WHOLE:
        return tl.load(pointers, eviction_policy=POLICY)
    return tl.load(pointers, mask=known[:, None] & inside, other=0.0, eviction_policy=POLICY)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    hidden_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    part_ptr,
    counter_ptr,
    num_rows,
    num_out,
    num_in,
    hidden_stride,
    weight_stride,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    program = tl.program_id(0)
    piece = tl.program_id(1)
    tile, row = _place(program, num_rows, ROW_TILES, BLOCK_ROWS)
    out = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    known = out < num_out
    per_piece = tl.cdiv(tl.cdiv(num_in, BLOCK_IN), PIECES) * BLOCK_IN
    begin = piece * per_piece
    end = tl.minimum(begin + per_piece, num_in)
    weights = weight_ptr + out.to(tl.int64)[:, None] * weight_stride
    hiddens = hidden_ptr + row.to(tl.int64)[:, None] * hidden_stride
    await_inputs(EARLY)
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for start in tl.range(begin, end, BLOCK_IN, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_IN)[None, :]
        inside = column < end
        present = (row < num_rows)[:, None] if WHOLE else (row < num_rows)[:, None] & inside
        weight = _load_tile(weights + column, known, inside, WHOLE, ROW_TILES)
        hidden = tl.load(hiddens + column, mask=present, other=0.0)
        total = tl.dot(weight.to(hidden.dtype), hidden.T, total, input_precision="ieee")
    last = True
    if PIECES > 1:
        cell = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
        part = part_ptr + program.to(tl.int64) * (PIECES * BLOCK_OUT * BLOCK_ROWS) + cell
        tl.store(part + piece * (BLOCK_OUT * BLOCK_ROWS), total)
        tl.debug_barrier()  # every thread's sums are stored before the program is counted as done
        last = tl.atomic_add(counter_ptr + program, 1, sem="acq_rel") == PIECES - 1
    if last:
        if PIECES > 1:
            total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
            for other in tl.static_range(PIECES):
                total += tl.load(part + other * (BLOCK_OUT * BLOCK_ROWS), cache_modifier=".cg")
            tl.store(counter_ptr + program, 0)
        if HAS_SCALE:
            total *= tl.load(scale_ptr + out, mask=known, other=0.0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias_ptr + out, mask=known, other=0.0).to(tl.float32)[:, None]
        result = total.to(out_ptr.dtype.element_ty)
        written = known[:, None] & (row < num_rows)[None, :]
        cells = out_ptr + row.to(tl.int64)[None, :] * num_out + out[:, None]
        tl.store(cells, result, mask=written)
