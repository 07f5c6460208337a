"""The tensors of a fused stage, merged from transformers' modules: `fast_stack` computes with them.

q, k and v become one weight, gate and up another. A part that is merged with nothing keeps the
model's own tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpipipe.models.operations import HeadNorms

if TYPE_CHECKING:
    from mpipipe.models.attention.base import AttentionOptions
    from mpipipe.models.operations import Operations

__all__ = [
    "FastLayer",
    "FastLinear",
    "FastNorm",
    "merge_layer",
    "merged",
    "norm_of",
]


@dataclass(frozen=True, slots=True, eq=False)
class FastLinear:
    """A weight [O, I] and perhaps a bias [O]; one or several of the model's, merged."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None
    operations: Operations

    def __call__(self, rows_TI: torch.Tensor) -> torch.Tensor:
        """[T, I] → [T, O]."""
        return self.operations.linear(rows_TI, self.weight_OI, self.bias_O)


@dataclass(frozen=True, slots=True, eq=False)
class FastNorm:
    """An RMS norm."""

    weight_H: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class FastLayer:
    """The tensors of one decoder layer."""

    input_norm: FastNorm
    qkv: FastLinear
    head_norms: HeadNorms | None
    output: FastLinear
    post_norm: FastNorm
    gate_up: FastLinear
    down: FastLinear
    options: AttentionOptions


def merge_layer(layer: Any, operations: Operations, options: AttentionOptions) -> FastLayer:
    """The tensors of transformers' `layer`; `options`: what it asks of attention."""
    attention, mlp = layer.self_attn, layer.mlp
    head_norms = None
    if hasattr(attention, "q_norm"):
        eps = float(attention.q_norm.variance_epsilon)
        head_norms = HeadNorms(attention.q_norm.weight, attention.k_norm.weight, eps)
    return FastLayer(
        input_norm=norm_of(layer.input_layernorm),
        qkv=merged(operations, attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=head_norms,
        output=merged(operations, attention.o_proj),
        post_norm=norm_of(layer.post_attention_layernorm),
        gate_up=merged(operations, mlp.gate_proj, mlp.up_proj),
        down=merged(operations, mlp.down_proj),
        options=options,
    )


def merged(operations: Operations, *parts: nn.Linear) -> FastLinear:
    """One linear whose outputs are those of `parts`, one after the other."""
    if len(parts) == 1:
        return FastLinear(parts[0].weight.detach(), parts[0].bias, operations)
    bias_O = None
    if parts[0].bias is not None:
        bias_O = torch.cat([part.bias.detach() for part in parts])
    return FastLinear(torch.cat([part.weight.detach() for part in parts]), bias_O, operations)


def norm_of(norm: Any) -> FastNorm:
    """The tensors of one of transformers' RMS norms."""
    return FastNorm(norm.weight.detach(), float(norm.variance_epsilon))
