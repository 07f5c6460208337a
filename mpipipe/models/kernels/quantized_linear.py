"""Products with weights of 8 bits: int8 or float8_e4m3fn, one float32 scale per output channel.

For few rows the weight is streamed once and converted in registers (`linear.launch_linear`). For
many rows arithmetic is what counts:

* int8: the weight is written out in the dtype of the rows, at most `DEQUANTIZED_BYTES` at once, for
  cuBLAS to multiply. The memory comes from torch's allocator, so CUDA graphs may hold it;
* float8: the rows are brought to that type, each with a scale of its own, for the matrix units of
  Ada, Hopper and later (`torch._scaled_mm`).

Which is taken follows from shapes and device only, so equal shapes give equal sums.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from mpipipe.models.kernels.launch import (
    await_inputs,
    gpu_capability,
    has_async_copy,
    launch_options,
    num_processors,
)
from mpipipe.models.kernels.linear import LinearTuning, launch_linear
from mpipipe.planning.step_limits import DEQUANTIZED_BYTES

__all__ = [
    "dequantize",
    "dequantized_linear",
    "linear_fp8",
    "linear_int8",
    "max_streamed_rows",
    "quantize_rows_fp8",
    "quantized_tuning",
    "scaled_mm_linear",
]

_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
_FP8_CAPABILITY = (8, 9)  # Ada; planning refuses float8 on GPUs before it
_BLOCK = 2048  # elements per program of `dequantize`: 16 a thread


def linear_int8(
    rows_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
) -> torch.Tensor:
    """The product rows · (weight · scale)ᵀ (+ bias): [T, O] in the dtype of the rows.

    `weight_OI` is int8. Accumulates in float32. Deterministic. Call it once outside of any CUDA
    graph first, as `linear.small_linear`.
    """
    num_rows = rows_TI.shape[0]
    if 0 < num_rows <= max_streamed_rows(rows_TI.dtype, weight_OI.dtype, rows_TI.device):
        tuning = quantized_tuning(num_rows, *weight_OI.shape, rows_TI.device)
        return launch_linear(rows_TI, weight_OI, scale_O, bias_O, tuning)
    return dequantized_linear(rows_TI, weight_OI, scale_O, bias_O)


def linear_fp8(
    rows_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
) -> torch.Tensor:
    """As `linear_int8`, of a weight in float8_e4m3fn.

    Only where many rows meet matrix units for float8 are they brought to that type.
    """
    num_rows, device = rows_TI.shape[0], rows_TI.device
    if 0 < num_rows <= max_streamed_rows(rows_TI.dtype, weight_OI.dtype, device):
        tuning = quantized_tuning(num_rows, *weight_OI.shape, device)
        return launch_linear(rows_TI, weight_OI, scale_O, bias_O, tuning)
    if num_rows and _multiplies_fp8(*weight_OI.shape, rows_TI.dtype, device):
        return scaled_mm_linear(rows_TI, weight_OI, scale_O, bias_O)
    return dequantized_linear(rows_TI, weight_OI, scale_O, bias_O)


# ---- which way, and how it is cut ----------------------------------------------------------------
#
# Measured on an H100 with Triton 3.6 (`tests/gpu/bench_quantized.py`, BENCHMARKS.md); reasoned for
# other GPUs, from the instructions, registers and shared memory of what Triton compiles for them.


@cache
def max_streamed_rows(dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> int:
    """Up to how many rows converting the weight in registers should be the faster way.

    Writing an int8 weight out in 16 bits and reading it again moves five times its bytes, as much
    time on an H100 as multiplying it with 500 rows. On Turing, where Triton has no matrix units,
    the sums of 40 rows take as long. For float8, `torch._scaled_mm` takes over where converting
    would fall behind the memory.
    """
    capability = gpu_capability(device)
    if capability is None or dtype == torch.float32:  # its tiles exceed the shared memory
        return 0
    if weight_dtype == _FP8:
        return 32 if capability >= _FP8_CAPABILITY else 0
    return 512 if capability >= (8, 0) else 32


@cache
def quantized_tuning(
    num_rows: int, num_out: int, num_in: int, device: torch.device
) -> LinearTuning:
    """How the streaming product is cut for a shape.

    On Hopper, pieces and stages are such that all programs run at once and fill the GPU: with up to
    16 rows 4096x4096 takes 9.2 us (11.5 with 4 stages and more pieces), 28672x4096 46 (54), in
    bfloat16 13.4 and 80. Two warps to a program up to 32 rows: with four, Triton takes wgmma, for
    whose operands converting a byte takes twice the instructions.
    """
    if not has_async_copy(device):
        return LinearTuning(32, 64, num_stages=1, least_rows=1, block_rows=16)
    processors, tiles = num_processors(device), -(-num_out // 64)
    if num_rows <= 64 and _is_hopper(device):
        return _few_rows_tuning(num_rows, tiles, num_in, processors)
    if num_rows <= 32:
        pieces = _pieces(tiles, 4 * processors, num_in, least=512)
        return LinearTuning(64, 128, pieces, num_warps=2, least_rows=8, block_rows=32)
    if num_rows <= 64:
        pieces = _pieces(tiles, 4 * processors, num_in, least=1024)
        return LinearTuning(64, 64, pieces, block_rows=64)
    wide_tiles = -(-num_out // 128) * -(-num_rows // 256)
    if num_rows > 128 and wide_tiles >= processors and _is_hopper(device):
        return LinearTuning(128, 64, num_warps=8, block_rows=256)
    pieces = _pieces(tiles * -(-num_rows // 128), 2 * processors, num_in, least=1024)
    return LinearTuning(64, 64, pieces, block_rows=128)


def _few_rows_tuning(num_rows: int, tiles: int, num_in: int, processors: int) -> LinearTuning:
    """Up to 64 rows on Hopper, whose multiprocessors hold two or three programs of these cuts."""
    most = 3 * processors
    if num_rows <= 16:
        pieces = _filling_pieces(tiles, most, num_in)
        return LinearTuning(64, 128, pieces, num_warps=2, num_stages=6, least_rows=8, block_rows=16)
    if num_rows <= 32:
        pieces = _filling_pieces(tiles, most, num_in)
        if num_in % 256 or tiles > most:  # 28672x4096: 51.7 us against 59.4
            return LinearTuning(64, 128, pieces, num_warps=2, num_stages=4)
        return LinearTuning(64, 256, pieces, num_warps=2, num_stages=3)
    # 4 stages leave room for two programs, 3 for three: what fills the last round of them better.
    by_stages = {4: 2 * processors, 3: most}
    pieces_of = {s: _filling_pieces(tiles, slots, num_in) for s, slots in by_stages.items()}
    stages = max(by_stages, key=lambda s: _filled(tiles * pieces_of[s], by_stages[s]))
    return LinearTuning(64, 128, pieces_of[stages], num_stages=stages, block_rows=64)


def _filling_pieces(tiles: int, slots: int, num_in: int) -> int:
    """The most pieces, each of 512 inputs or more, that all run at once; at least 1."""
    return max(1, min(slots // tiles, num_in // 512))


def _filled(programs: int, slots: int) -> float:
    """The share of the slots that run a program, over all rounds."""
    return programs / (-(-programs // slots) * slots)


def _pieces(tiles: int, programs: int, num_in: int, *, least: int) -> int:
    """Pieces of the inputs, each of `least` or more, that make about so many programs of tiles."""
    return max(1, min(round(programs / tiles), num_in // least))


def _is_hopper(device: torch.device) -> bool:
    capability = gpu_capability(device)
    return capability is not None and capability[0] == 9


@cache
def _multiplies_fp8(num_out: int, num_in: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `torch._scaled_mm` takes such a product with scales for rows and columns."""
    capability = gpu_capability(device)
    if capability is None or capability < _FP8_CAPABILITY:
        return False
    return dtype == torch.bfloat16 and num_out % 16 == 0 and num_in % 16 == 0


# ---- many rows -----------------------------------------------------------------------------------


def dequantized_linear(
    rows_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
    *,
    max_bytes: int = DEQUANTIZED_BYTES,
) -> torch.Tensor:
    """The product by way of the dequantised weight, of which at most `max_bytes` exist at once."""
    num_out, num_in = weight_OI.shape
    at_once = max(16, max_bytes // (num_in * rows_TI.element_size()))
    if num_out <= at_once:
        return linear(rows_TI, dequantize(weight_OI, scale_O, rows_TI.dtype), bias_O)
    out_TO = rows_TI.new_empty((rows_TI.shape[0], num_out))
    for first in range(0, num_out, at_once):
        part = slice(first, first + at_once)
        part_IO = dequantize(weight_OI[part], scale_O[part], rows_TI.dtype).T
        if bias_O is None:
            torch.mm(rows_TI, part_IO, out=out_TO[:, part])
        else:
            torch.addmm(bias_O[part], rows_TI, part_IO, out=out_TO[:, part])
        del part_IO  # before the next one is written, not after
    return out_TO


def dequantize(weight_OI: torch.Tensor, scale_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The product weight · scale, rounded to `dtype`: [O, I]."""
    num_out, num_in = weight_OI.shape
    assert weight_OI.stride(1) == 1
    out_OI = weight_OI.new_empty((num_out, num_in), dtype=dtype)
    _dequantize_kernel[(num_out, triton.cdiv(num_in, _BLOCK))](
        *(weight_OI, scale_O, out_OI, weight_OI.stride(0), num_in),
        BLOCK=_BLOCK,
        num_warps=4,
        **launch_options(weight_OI.device),
    )
    return out_OI


@triton.jit
def _dequantize_kernel(
    weight_ptr,
    scale_ptr,
    out_ptr,
    weight_stride,
    num_in,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_in
    weight = tl.load(weight_ptr + row * weight_stride + column, mask=inside, other=0.0)
    exact = weight.to(tl.float32) * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * num_in + column, exact.to(out_ptr.dtype.element_ty), mask=inside)


def scaled_mm_linear(
    rows_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
) -> torch.Tensor:
    """The product of two float8 matrices: bfloat16 [T, O]. O and I: multiples of 16."""
    narrow_TI, scale_T = quantize_rows_fp8(rows_TI)
    out_TO: torch.Tensor = torch._scaled_mm(
        narrow_TI,
        weight_OI.T,
        scale_a=scale_T[:, None],
        scale_b=scale_O[None],
        bias=bias_O,
        out_dtype=rows_TI.dtype,
        use_fast_accum=True,
    )
    return out_TO


def quantize_rows_fp8(rows_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in float8_e4m3fn, and its float32 scale [T]; a row of zeros stays one."""
    num_rows, size = rows_TI.shape
    assert rows_TI.stride(1) == 1
    narrow_TI = rows_TI.new_empty((num_rows, size), dtype=_FP8)
    scale_T = rows_TI.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        block = triton.next_power_of_2(size)
        _quantize_rows_kernel[(num_rows,)](
            *(rows_TI, narrow_TI, scale_T, rows_TI.stride(0), size),
            LARGEST=_FP8_MAX,
            TINY=torch.finfo(torch.float32).tiny,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            **launch_options(rows_TI.device),
        )
    return narrow_TI, scale_T


@triton.jit
def _quantize_rows_kernel(
    rows_ptr,
    narrow_ptr,
    scale_ptr,
    row_stride,
    size,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(rows_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0) / LARGEST, TINY)
    narrow = tl.clamp(value / scale, -LARGEST, LARGEST)
    tl.store(narrow_ptr + row * size + column, narrow.to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + row, scale)
