"""Llama-like models in modules of our own, with the names and the arithmetic of transformers'.

Why: transformers' modelling code takes seconds to import (7 s beside torch on a machine with GPUs),
and of these families a fast run uses names and shapes only: the fused forms compute. Loading,
quantisation, the split over lanes and the trial steps see what they see of transformers' modules.

transformers' own modules are the oracle (`tests/contract/test_llama_modules.py`): same names, same
bits. Shape letters as in `kv_cache.layout`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mpipipe.models.attention_bridge import attend_in_context

if TYPE_CHECKING:
    from mpipipe.models.llama_config import LlamaConfig, RotarySettings

__all__ = ["LlamaLayer", "LlamaModel", "empty_llama", "inverse_frequencies"]

_Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Output:
    """Under transformers' names."""

    last_hidden_state: torch.Tensor  # [1, T, hidden]
    logits: torch.Tensor  # [1, rows, vocabulary]; of the base model: none


def empty_llama(config: LlamaConfig, dtype: torch.dtype) -> LlamaModel:
    """The full model on the meta device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = LlamaModel(config)
    finally:
        torch.set_default_dtype(before)
    model.eval()
    model.requires_grad_(False)
    return model


class LlamaModel(nn.Module):
    """Base model and LM head; in transformers LlamaForCausalLM, Qwen3ForCausalLM and others."""

    base_model_prefix = "model"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Base(config)
        self.lm_head = _linear(config.hidden_size, config.vocab_size, bias=False)
        self.all_tied_weights_keys: dict[str, str] = {}
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
            self.all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def get_input_embeddings(self) -> nn.Module:
        """None on later stages."""
        return self.model.embed_tokens

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        """Look ids up in `embedding` from now on."""
        self.model.embed_tokens = embedding  # type: ignore[assignment]  # or one that streams

    def get_output_embeddings(self) -> nn.Module:
        """The LM head; None where it is on another stage."""
        return self.lm_head

    def set_output_embeddings(self, head: nn.Module) -> None:
        """Compute logits with `head` from now on."""
        self.lm_head = head  # type: ignore[assignment]  # or one that streams

    def forward(
        self, *, logits_to_keep: int | torch.Tensor = 0, **inputs: torch.Tensor | bool
    ) -> _Output:
        """Logits of the rows `logits_to_keep`, or of all for 0; `inputs` as of the base model."""
        hidden_1TH = self.model(**inputs).last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            hidden_1TH = hidden_1TH[:, logits_to_keep]
        return _Output(hidden_1TH, self.lm_head(hidden_1TH))


class _Base(nn.Module):
    base_model_prefix = "model"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        vocab_size, hidden_size = config.vocab_size, config.hidden_size
        rows_VH = torch.empty(vocab_size, hidden_size)
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size, _weight=rows_VH)
        self.layers = nn.ModuleList(
            LlamaLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.norm = _RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = _RotaryEmbedding(config)

    def forward(
        self,
        *,
        position_ids: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> _Output:
        """Ids [1, T] or hidden states [1, T, hidden] through all layers and the norm."""
        assert not use_cache, "the cache is the stage's"
        hidden_1TH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = self.rotary_emb(hidden_1TH, position_ids)
        for layer in self.layers:
            hidden_1TH = layer(hidden_1TH, position_embeddings=rotary)
        hidden_1TH = self.norm(hidden_1TH)
        return _Output(hidden_1TH, hidden_1TH[:, :0])

    def _init_weights(self, module: nn.Module) -> None:
        """Give the buffers of `module` their values."""
        if isinstance(module, _RotaryEmbedding):
            frequencies_F = inverse_frequencies(self.config.rotary, self.config.head_dim)
            module.get_buffer("inv_freq").copy_(frequencies_F)


class LlamaLayer(nn.Module):
    """A decoder layer: attention and gated MLP, each behind an RMS norm."""

    def __init__(self, config: LlamaConfig, number: int) -> None:
        super().__init__()
        self.self_attn = _Attention(config, number)
        self.mlp = _Mlp(config)
        self.input_layernorm = _RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = _RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_1TH: torch.Tensor, position_embeddings: _Rotary) -> torch.Tensor:
        """[1, T, hidden] → [1, T, hidden]."""
        attended_1TH = self.self_attn(self.input_layernorm(hidden_1TH), position_embeddings)
        hidden_1TH = hidden_1TH + attended_1TH
        sum_1TH: torch.Tensor = hidden_1TH + self.mlp(self.post_attention_layernorm(hidden_1TH))
        return sum_1TH


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig, number: int) -> None:
        super().__init__()
        self.layer_idx = number
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.sliding_window = config.sliding_window
        width, kv_width = (
            heads * self.head_dim
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = _linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = _linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = _linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = _linear(width, config.hidden_size, bias=config.output_bias)
        if config.head_norms:
            self.q_norm = _RmsNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = _RmsNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, hidden_1TH: torch.Tensor, rotary: _Rotary) -> torch.Tensor:
        query, key, value = (
            product(hidden_1TH).unflatten(-1, (-1, self.head_dim))
            for product in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = (part[:, None] for part in rotary)
        query, key = (
            heads * cos + _half_turned(heads) * sin
            for heads in (query.transpose(1, 2), key.transpose(1, 2))
        )
        attended_1THD = attend_in_context(
            self,
            query,
            key,
            value.transpose(1, 2),
            scaling=self.scaling,
            sliding_window=self.sliding_window,
        )
        output_1TH: torch.Tensor = self.o_proj(attended_1THD.flatten(2))
        return output_1TH


def _linear(num_in: int, num_out: int, *, bias: bool) -> nn.Linear:
    """Without the random start of `nn.Linear`: weights are loaded in any case.

    On the meta device torch imports its compiler for that start, which takes two seconds.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = num_in, num_out
    linear.weight = nn.Parameter(torch.empty(num_out, num_in))
    linear.register_parameter("bias", nn.Parameter(torch.empty(num_out)) if bias else None)
    return linear


def _half_turned(heads: torch.Tensor) -> torch.Tensor:
    low, high = heads.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


class _Mlp(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = _linear(hidden, inner, bias=bias)
        self.up_proj = _linear(hidden, inner, bias=bias)
        self.down_proj = _linear(inner, hidden, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(rows)) * self.up_proj(rows))
        return gated


class _RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.variance_epsilon = eps

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        exact = rows.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * exact.to(rows.dtype)


class _RotaryEmbedding(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        frequencies_F = torch.empty(config.head_dim // 2, dtype=torch.float32)
        self.register_buffer("inv_freq", frequencies_F, persistent=False)

    def forward(self, like: torch.Tensor, position_ids: torch.Tensor) -> _Rotary:
        """Cosine and sine of positions [1, T], in the dtype of `like`: two [1, T, D]."""
        angles_1TF = position_ids[..., None].float() * self.get_buffer("inv_freq")
        angles_1TD = torch.cat((angles_1TF, angles_1TF), dim=-1)
        return angles_1TD.cos().to(like.dtype), angles_1TD.sin().to(like.dtype)


def inverse_frequencies(rotary: RotarySettings, head_dim: int) -> torch.Tensor:
    """Radians a position of each pair of elements, float32 [D / 2], by transformers' formulas."""
    exponents_F = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain_F = 1.0 / (rotary.theta**exponents_F)
    if rotary.kind == "default":
        return plain_F
    if rotary.kind == "linear":
        return plain_F / rotary.factor
    assert rotary.kind == "llama3", rotary.kind
    # Llama 3.1: long waves are stretched, short ones stay, those between are mixed.
    low, high, context = rotary.low_freq_factor, rotary.high_freq_factor, rotary.original_tokens
    lengths_F = 2 * math.pi / plain_F
    stretched_F = torch.where(lengths_F > context / low, plain_F / rotary.factor, plain_F)
    share_F = (context / lengths_F - low) / (high - low)
    mixed_F = (1 - share_F) * stretched_F / rotary.factor + share_F * stretched_F
    between_F = ~(lengths_F < context / high) * ~(lengths_F > context / low)
    return torch.where(between_F, mixed_F, stretched_F)
