"""The gated activation of an MLP: silu(gate) * up, from the merged projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mpipipe.models.kernels.launch import await_inputs, launch_options

__all__ = ["gated_silu"]

_BLOCK = 1024  # elements per program, 8 per thread: one 16-byte load of each half


def gated_silu(gate_up_TX: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: [T, X / 2], where gate is the first half of each row, up the second.

    silu is computed in float32 and rounded to the dtype before the product, as torch does.
    """
    num_rows, doubled = gate_up_TX.shape
    size = doubled // 2
    out_TI = gate_up_TX.new_empty((num_rows, size))
    assert gate_up_TX.stride(1) == 1
    if num_rows:
        _gated_silu_kernel[(num_rows, triton.cdiv(size, _BLOCK))](
            *(gate_up_TX, out_TI, gate_up_TX.stride(0), size),
            BLOCK=_BLOCK,
            num_warps=4,
            **launch_options(gate_up_TX.device),
        )
    return out_TI


@triton.jit
def _silu_product(gate, up):
    """silu(gate), rounded to the dtype, times up."""
    exact = gate.to(tl.float32)
    silu = (exact / (1.0 + tl.exp(-exact))).to(gate.dtype)
    return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _gated_silu_kernel(
    gate_up_ptr, out_ptr, row_stride, size, EARLY: tl.constexpr, BLOCK: tl.constexpr
):
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up_ptr + row * row_stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * row_stride + size + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * size + column, _silu_product(gate, up), mask=inside)
