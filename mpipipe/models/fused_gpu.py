"""A fused form of Llama-like stages for GPUs: embedding, layers, norm and LM head in one loop.

Purpose: fewer and larger launches than transformers' modules make. q, k, v are one product, gate
and up another; every residual addition is part of the norm behind it, so what goes from layer to
layer is the pair (hidden, residual) whose sum is the residual stream; rotary embedding and the
write into the KV cache are one kernel. cos and sin of all positions are computed once, by the
model's own rotary module, and looked up once per step; where they depend on more than positions
(`rotary`), they are computed in each step.

`unsupported_reason` names what a stage has that the fused form does not compute; such a stage keeps
transformers' modules, the oracle of `tests/contract/test_fused_gpu.py`.

Invariants: one tensor [T, hidden] crosses a stage border, the residual sum; a decode step waits for
nothing and has no shape that depends on values, so a CUDA graph may hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.families import (
    LinearTensors,
    can_merge,
    has_silu,
    is_known,
    merge_linears,
    merged_linears,
)
from mpipipe.models.layer_options import HeadNorms
from mpipipe.models.quantized_linear import QuantizedLinear
from mpipipe.models.rotary import LengthRotary
from mpipipe.models.streaming import NO_GATES, StreamedHead
from mpipipe.models.tensor_split import Join, joined_by

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.attention_bridge import ForwardContext
    from mpipipe.models.layer_options import AttentionOptions
    from mpipipe.models.operations import Operations
    from mpipipe.models.streaming import WeightGates

    # positions int64 [T] → cosine and sine, each [T, D]
    _RotaryLookup = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    _Product = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["FusedStack", "MergedLayer", "build_fused_stack", "merge_layer", "unsupported_reason"]

# transformers' classes whose forward was read: pre-norm RMSNorm, rotary embedding, gated SiLU, and
# nothing between the base model's output and the LM head.
_MODELS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
_LAYERS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)


def unsupported_reason(model: Any, layers: Sequence[Any], head_dim: int) -> str:
    """What keeps a stage from this form, as a phrase; empty: nothing.

    Args:
        model: the causal language model of transformers that the stage was cut from.
        layers: the stage's.
        head_dim: of the stage's KV cache.
    """
    if not is_known(model, _MODELS):
        return f"{type(model).__name__} is not one of the fused families"
    for layer in layers:
        if not is_known(layer, _LAYERS):
            return f"{type(layer).__name__} is not one of the fused layers"
        if not has_silu(layer):
            return f"its activation is {type(layer.mlp.act_fn).__name__}"
        if any(not can_merge(*linears) for linears in merged_linears(layer)):
            return "its linear layers are not plain ones, or not all quantised in one way"
        if layer.self_attn.head_dim != head_dim:
            return f"its heads have {layer.self_attn.head_dim} elements, its cache {head_dim}"
    rotary = _rotary_of(model)
    frequencies = next(rotary.buffers())
    position_11 = torch.zeros(1, 1, dtype=torch.int64, device=frequencies.device)
    rotated = rotary(frequencies, position_11)[0].shape[-1]
    return "" if rotated == head_dim else f"it rotates {rotated} of {head_dim} elements of a head"


@dataclass(frozen=True, slots=True, eq=False)
class _MergedLinear:
    """A linear layer of the stage, or several of the model's, merged."""

    tensors: LinearTensors
    operations: Operations
    join: Join | None = None  # what the lanes of the stage make of their results

    def __call__(self, rows_TI: torch.Tensor) -> torch.Tensor:
        """[T, I] → [T, O]."""
        out_TO = self._multiply(rows_TI)
        return out_TO if self.join is None else self.join(out_TO)

    def _multiply(self, rows_TI: torch.Tensor) -> torch.Tensor:
        weight_OI, bias_O, scale_O = self.tensors
        if scale_O is None:
            return self.operations.linear(rows_TI, weight_OI, bias_O)
        multiply = self.operations.quantized_product(weight_OI.dtype)
        return multiply(rows_TI, weight_OI, scale_O, bias_O)


@dataclass(frozen=True, slots=True, eq=False)
class _NormWeight:
    """An RMS norm."""

    weight_H: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class MergedLayer:
    """The tensors of one decoder layer."""

    input_norm: _NormWeight
    qkv: _MergedLinear
    head_norms: HeadNorms | None
    output: _MergedLinear
    post_norm: _NormWeight
    gate_up: _MergedLinear
    down: _MergedLinear
    options: AttentionOptions


def merge_layer(layer: Any, operations: Operations, options: AttentionOptions) -> MergedLayer:
    """The tensors of transformers' `layer`; `options`: what it asks of attention."""
    attention, mlp = layer.self_attn, layer.mlp
    head_norms = None
    if hasattr(attention, "q_norm"):
        eps = float(attention.q_norm.variance_epsilon)
        head_norms = HeadNorms(attention.q_norm.weight, attention.k_norm.weight, eps)
    return MergedLayer(
        input_norm=_norm_of(layer.input_layernorm),
        qkv=_merged(operations, attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=head_norms,
        output=_merged(operations, attention.o_proj),
        post_norm=_norm_of(layer.post_attention_layernorm),
        gate_up=_merged(operations, mlp.gate_proj, mlp.up_proj),
        down=_merged(operations, mlp.down_proj),
        options=options,
    )


def _merged(operations: Operations, *parts: nn.Linear | QuantizedLinear) -> _MergedLinear:
    return _MergedLinear(merge_linears(*parts), operations, joined_by(parts[0]))


def _norm_of(norm: Any) -> _NormWeight:
    """The tensors of one of transformers' RMS norms."""
    return _NormWeight(norm.weight.detach(), float(norm.variance_epsilon))


def build_fused_stack(
    model: Any,
    base: Any,
    context: ForwardContext,
    *,
    options: Mapping[int, AttentionOptions],
    operations: Operations,
    max_positions: int,
    gates: WeightGates = NO_GATES,
) -> FusedStack:
    """The fused form of a stage that has no `unsupported_reason`; empties `base.layers`.

    Memory beyond the stage's own weights stays below two layers': a layer's merged weights are
    made, then its plain ones are freed.

    Args:
        model: the causal language model that the stage was cut from.
        base: its base model, whose `layers` are the stage's.
        context: the stage's cache, backend and current layout.
        options: what each layer, by its number in the stage, asks of attention.
        operations: the kernels to use.
        max_positions: no token of the run has a position beyond; sizes the rotary table.
        gates: told before a layer computes and after.
    """
    layers: list[MergedLayer] = []
    while len(base.layers):
        layers.append(merge_layer(base.layers[0], operations, options[len(layers)]))
        del base.layers[0]
        if layers[-1].input_norm.weight_H.is_cuda:
            # The blocks of its parts are too small for the next merged weights: the allocator would
            # keep them all, 8.4 GiB beside 12.6 GiB of OpenLLaMA-7B.
            torch.cuda.empty_cache()
    return FusedStack(
        layers=layers,
        embedding=base.embed_tokens,
        final_norm=None if model.lm_head is None else _norm_of(base.norm),
        head=_merged_head(operations, model.lm_head),
        rotary=_rotary_lookup(_rotary_of(model), max_positions, layers[0].input_norm.weight_H),
        context=context,
        operations=operations,
        gates=gates,
    )


def _merged_head(
    operations: Operations, head: Any
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """[S, hidden] → [S, vocabulary]; None: the head is on another stage."""
    if isinstance(head, StreamedHead):
        blocks = [_merged(operations, block) for block in head.blocks]
        join, streamed = joined_by(head), StreamedHead(blocks, head.gates, head.first_part)
        return streamed if join is None else lambda rows_SH: join(streamed(rows_SH))
    return None if head is None else _merged(operations, head)


@dataclass(frozen=True, slots=True, eq=False)
class FusedStack:
    """The computation of one stage. `context.layout` is set by each call."""

    layers: Sequence[MergedLayer]
    embedding: _Product | None  # ids [T] → [T, hidden]
    final_norm: _NormWeight | None  # this and the head: on the last stage
    head: _Product | None  # [S, hidden] → [S, vocabulary]
    rotary: _RotaryLookup
    context: ForwardContext
    operations: Operations
    gates: WeightGates = NO_GATES

    def hidden(self, inputs: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """What the stage behind receives: [T, hidden]. `inputs` as in `StageModel.forward`."""
        hidden_TH, residual_TH = self._run_layers(inputs, layout)
        self.gates.end()
        return hidden_TH.add_(residual_TH)

    def logits(
        self, inputs: torch.Tensor, layout: BatchLayout, rows_S: torch.Tensor | None = None
    ) -> torch.Tensor:
        """On the last stage: logits [S, vocabulary] of the rows `rows_S`, of all without it."""
        assert self.head is not None, "only the last stage has logits"
        assert self.final_norm is not None
        hidden_TH, residual_TH = self._run_layers(inputs, layout)
        if rows_S is not None:
            hidden_TH = hidden_TH.index_select(0, rows_S)
            residual_TH = residual_TH.index_select(0, rows_S)
        norm = self.final_norm
        normed_SH, _ = self.operations.add_rms_norm(hidden_TH, residual_TH, norm.weight_H, norm.eps)
        logits_SV = self.head(normed_SH)
        self.gates.end()
        return logits_SV

    def _run_layers(
        self, inputs: torch.Tensor, layout: BatchLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream behind the last layer, as two tensors to be added."""
        self.context.layout = layout
        residual_TH = inputs
        if self.embedding is not None:
            residual_TH = self.embedding(inputs)
        rotary_TD = self.rotary(layout.positions_T)
        operations = self.operations
        hidden_TH: torch.Tensor | None = None
        for number, layer in enumerate(self.layers):
            self.gates.before(number)
            norm = layer.input_norm
            if hidden_TH is None:
                normed_TH = operations.rms_norm(residual_TH, norm.weight_H, norm.eps)
            else:
                normed_TH, residual_TH = operations.add_rms_norm(
                    hidden_TH, residual_TH, norm.weight_H, norm.eps
                )
            attended_TX = self._attend(number, layer, layer.qkv(normed_TH), rotary_TD)
            norm = layer.post_norm
            normed_TH, residual_TH = operations.add_rms_norm(
                layer.output(attended_TX), residual_TH, norm.weight_H, norm.eps
            )
            hidden_TH = layer.down(operations.gated_silu(layer.gate_up(normed_TH)))
            self.gates.after(number)
        assert hidden_TH is not None, "a stage has layers"
        return hidden_TH, residual_TH

    def _attend(
        self,
        number: int,
        layer: MergedLayer,
        qkv_TX: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Rotary embedding, the write into the cache, attention: [T, H * D]."""
        cache, layout = self.context.cache, self.context.layout
        assert isinstance(cache, PagedKVCache), "the fused form writes into pages"
        assert layout is not None
        query_THD, key_TKD, value_TKD = self.operations.rotate_and_store(
            qkv_TX,
            *rotary,
            cache.keys[number],
            cache.values[number],
            slot_mapping_T=layout.slot_mapping_T,
            norms=layer.head_norms,
        )
        attended_THD = self.context.backend.attend(
            layer=number,
            query_THD=query_THD,
            key_TKD=key_TKD,
            value_TKD=value_TKD,
            cache=cache,
            layout=layout,
            options=layer.options,
            stored=True,
        )
        return attended_THD.flatten(1)


def _rotary_lookup(rotary: Any, max_positions: int, like: torch.Tensor) -> _RotaryLookup:
    """What gives cosine and sine of a step's positions in the dtype of `like`: two [T, D]."""

    def compute(positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos_1TD, sin_1TD = rotary(like, positions_T[None])
        return cos_1TD[0].contiguous(), sin_1TD[0].contiguous()

    if isinstance(rotary, LengthRotary):
        return compute
    cos_PD, sin_PD = compute(torch.arange(max_positions, device=like.device))
    return lambda positions_T: (
        cos_PD.index_select(0, positions_T),
        sin_PD.index_select(0, positions_T),
    )


def _rotary_of(model: Any) -> Any:
    return model.model.rotary_emb
