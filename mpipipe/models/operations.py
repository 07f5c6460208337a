"""The operations that a fused stage is made of, in two forms: Triton kernels and plain torch.

Purpose: `FusedStack` is written once against `Operations`. With `triton_operations` it is fast on a
GPU; with `torch_operations` it runs on every device, and proves on a CPU that the stack is wired
right. `attention/` computes attention; cuBLAS computes large matrix products.

Invariants: both forms take and return the same shapes, round where transformers' modules round,
wait for nothing and may be captured in a CUDA graph. Shape letters as in `kv_cache.layout`;
X = (H + 2 K) * D, I intermediate size, O and I the sides of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, silu

from mpipipe.kv_cache.layout import place_rows
from mpipipe.kv_cache.paged import store_rows
from mpipipe.models.quantized_linear import (
    QuantizedProduct,
    linear_fp8,
    linear_int8,
    linear_int8_blocked,
)

if TYPE_CHECKING:
    from mpipipe.models.layer_options import HeadNorms

__all__ = ["Operations", "choose_operations", "torch_operations", "triton_operations"]


_Two = tuple[torch.Tensor, torch.Tensor]
_Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Operations:
    """One form of all operations.

    * `rms_norm(hidden_TH, weight_H, eps)` → normed [T, H];
    * `add_rms_norm(hidden_TH, residual_TH, weight_H, eps)` → the norm of their sum, and the sum;
    * `rotate_and_store(qkv_TX, cos_TD, sin_TD, key_cache, value_cache, slot_mapping_T=…,
      norms=…)` → rotated q [T, H, D] and k, v [T, K, D]; k and v are in the cache then;
    * `gated_silu(gate_up_TX)` → silu(first half) * second half: [T, X / 2];
    * `linear(hidden_TH, weight_OH, bias_O)` → [T, O];
    * `linear_int8(rows_TI, weight_OI, scale_O, bias_O)` → [T, O], of a weight in int8 with a
      float32 scale for each output channel;
    * `linear_fp8(rows_TI, weight_OI, scale_O, bias_O)` → [T, O], of a weight in float8_e4m3fn,
      with rows that are brought to that type, each with its own scale (the Triton form leaves them
      as they are where that is faster);
    * `advance_rows(kv_len_B, active_B, pages_BP, request_rows_B, last_token_N, page_size=…)` adds a
      token to every active row: positions, cache slots and input tokens, int64 [B] each;
    * `greedy_ids(logits_SV)` → the lowest id of each row's largest logit, -1 where that is not
      finite: int64 [S].
    """

    name: str
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    add_rms_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], _Two]
    rotate_and_store: Callable[..., _Three]
    gated_silu: Callable[[torch.Tensor], torch.Tensor]
    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    linear_int8: QuantizedProduct
    linear_fp8: QuantizedProduct
    advance_rows: Callable[..., _Three]
    greedy_ids: Callable[[torch.Tensor], torch.Tensor]

    def quantized_product(self, dtype: torch.dtype) -> QuantizedProduct:
        """The product for weights in `dtype`, which has 8 bits."""
        return self.linear_int8 if dtype == torch.int8 else self.linear_fp8


def choose_operations(device: torch.device) -> tuple[Operations, str]:
    """The faster form that works on `device`, and the reason for the choice."""
    if device.type != "cuda":
        operations = replace(torch_operations(), linear_int8=linear_int8_blocked)
        return operations, "Triton kernels need a GPU"
    from mpipipe.models.kernels.probe import available

    works, problem = available()
    if works:
        return triton_operations(), "Triton compiles and runs here"
    return torch_operations(), problem


def triton_operations() -> Operations:
    """The kernels of `models/kernels`; importing them needs Triton."""
    from mpipipe.models.kernels import decode_rows, quantized_linear, rotary, rowwise

    return Operations(
        name="triton",
        rms_norm=rowwise.rms_norm,
        add_rms_norm=rowwise.add_rms_norm,
        rotate_and_store=rotary.rotate_and_store,
        gated_silu=rowwise.gated_silu,
        linear=_rows_linear,
        linear_int8=quantized_linear.linear_int8,
        linear_fp8=quantized_linear.linear_fp8,
        advance_rows=decode_rows.advance_rows,
        greedy_ids=decode_rows.greedy_ids,
    )


def _rows_linear(
    hidden_TH: torch.Tensor, weight_OH: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    from mpipipe.models.kernels.linear import prefers_small_linear, small_linear

    num_out, num_in = weight_OH.shape
    # Its tiles are made for 2-byte weights: in float32 they exceed the shared memory.
    if weight_OH.dtype.itemsize == 2 and prefers_small_linear(
        hidden_TH.shape[0], num_out, num_in, hidden_TH.device
    ):
        return small_linear(hidden_TH, weight_OH, bias_O)
    return linear(hidden_TH, weight_OH, bias_O)


def torch_operations() -> Operations:
    """Plain torch, on any device."""
    return Operations(
        name="torch",
        rms_norm=_rms_norm,
        add_rms_norm=_add_rms_norm,
        rotate_and_store=_rotate_and_store,
        gated_silu=_gated_silu,
        linear=linear,
        linear_int8=linear_int8,
        linear_fp8=linear_fp8,
        advance_rows=_advance_rows,
        greedy_ids=_greedy_ids,
    )


def _rms_norm(hidden_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    exact_TH = hidden_TH.float()
    exact_TH = exact_TH * torch.rsqrt(exact_TH.square().mean(-1, keepdim=True) + eps)
    return weight_H * exact_TH.to(hidden_TH.dtype)


def _add_rms_norm(
    hidden_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> _Two:
    sum_TH = hidden_TH + residual_TH
    return _rms_norm(sum_TH, weight_H, eps), sum_TH


def _rotate_and_store(
    qkv_TX: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    slot_mapping_T: torch.Tensor,
    norms: HeadNorms | None = None,
) -> _Three:
    num_kv_heads, head_dim = key_cache.shape[2:]
    heads_TND = qkv_TX.unflatten(-1, (-1, head_dim))
    num_heads = heads_TND.shape[1] - 2 * num_kv_heads
    query_THD, key_TKD, value_TKD = heads_TND.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None:
        query_THD = _rms_norm(query_THD, norms.query_D, norms.eps)
        key_TKD = _rms_norm(key_TKD, norms.key_D, norms.eps)
    turned_TND = torch.cat((query_THD, key_TKD), dim=1)
    half = head_dim // 2
    swapped_TND = torch.cat((-turned_TND[..., half:], turned_TND[..., :half]), dim=-1)
    turned_TND = turned_TND * cos_TD[:, None] + swapped_TND * sin_TD[:, None]
    query_THD, key_TKD = turned_TND.split((num_heads, num_kv_heads), dim=1)
    store_rows(key_cache, slot_mapping_T, key_TKD)
    store_rows(value_cache, slot_mapping_T, value_TKD)
    return query_THD, key_TKD, value_TKD


def _gated_silu(gate_up_TX: torch.Tensor) -> torch.Tensor:
    gate_TI, up_TI = gate_up_TX.chunk(2, dim=-1)
    return silu(gate_TI) * up_TI


def _advance_rows(
    kv_len_B: torch.Tensor,
    active_B: torch.Tensor,
    pages_BP: torch.Tensor,
    request_rows_B: torch.Tensor,
    last_token_N: torch.Tensor,
    *,
    page_size: int,
) -> _Three:
    kv_len_B.add_(active_B)
    positions_B, slot_mapping_B = place_rows(pages_BP, kv_len_B, page_size)
    return positions_B, slot_mapping_B, last_token_N.index_select(0, request_rows_B).clamp_(min=0)


def _greedy_ids(logits_SV: torch.Tensor) -> torch.Tensor:
    # Of equals the first, as torch documents for max: one pass over the logits as they are.
    largest_S, ids_S = logits_SV.max(dim=-1)
    return ids_S.masked_fill(~largest_S.isfinite(), -1)
