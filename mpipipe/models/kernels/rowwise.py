"""What a layer does row by row: RMS normalisation, alone or behind a residual addition, and SiLU.

Norms have one program per row; the row stays in registers, so each element is read and written
once. The gated activation of an MLP is silu(gate) * up, from the merged projection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mpipipe.models.kernels.launch import await_inputs, launch_options

__all__ = ["add_rms_norm", "gated_silu", "rms_norm"]

_SILU_BLOCK = 1024  # elements per program, 8 per thread: one 16-byte load of each half


def rms_norm(hidden_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Each row over its root mean square, times `weight_H`: [T, H].

    Statistics in float32; the normalised row is rounded to the dtype, then multiplied, as
    transformers' LlamaRMSNorm does.
    """
    return _norm(hidden_TH, None, weight_H, eps)[0]


def add_rms_norm(
    hidden_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of hidden + residual, and that sum rounded to the dtype: two [T, H]."""
    return _norm(hidden_TH, residual_TH, weight_H, eps)


def _norm(
    hidden_TH: torch.Tensor, residual_TH: torch.Tensor | None, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, size = hidden_TH.shape
    out_TH = torch.empty_like(hidden_TH, memory_format=torch.contiguous_format)
    added_TH, sum_TH = hidden_TH, out_TH
    if residual_TH is not None:
        added_TH, sum_TH = residual_TH, torch.empty_like(out_TH)
    assert hidden_TH.stride(1) == 1
    assert added_TH.stride(1) == 1
    assert weight_H.is_contiguous()
    if not num_rows:
        return out_TH, sum_TH
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(num_rows,)](
        hidden_TH,
        added_TH,
        weight_H,
        out_TH,
        sum_TH,
        hidden_TH.stride(0),
        added_TH.stride(0),
        size,
        eps,
        ADD=residual_TH is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),  # 16 elements a thread: two 16-byte loads
        **launch_options(hidden_TH.device),
    )
    return out_TH, sum_TH


@triton.jit
def _rms_norm_kernel(
    hidden_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    hidden_stride,
    residual_stride,
    size,
    eps,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < size
    await_inputs(EARLY)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    row = tl.program_id(0).to(tl.int64)
    value = tl.load(hidden_ptr + row * hidden_stride + column, mask=inside, other=0.0)
    if ADD:
        added = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(sum_ptr + row * size + column, value, mask=inside)
    exact = value.to(tl.float32)
    normed = exact * tl.rsqrt(tl.sum(exact * exact, axis=0) / size + eps)
    normed = normed.to(value.dtype).to(tl.float32) * weight
    tl.store(out_ptr + row * size + column, normed.to(value.dtype), mask=inside)


def gated_silu(gate_up_TX: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: [T, X / 2], where gate is the first half of each row, up the second.

    silu is computed in float32 and rounded to the dtype before the product, as torch does.
    """
    num_rows, doubled = gate_up_TX.shape
    size = doubled // 2
    out_TI = gate_up_TX.new_empty((num_rows, size))
    assert gate_up_TX.stride(1) == 1
    if num_rows:
        _gated_silu_kernel[(num_rows, triton.cdiv(size, _SILU_BLOCK))](
            *(gate_up_TX, out_TI, gate_up_TX.stride(0), size),
            BLOCK=_SILU_BLOCK,
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
