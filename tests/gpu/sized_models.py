"""Random models large enough that rounding errors look like those of real ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.02,
}
_GATED = {**_COMMON, "intermediate_size": 1024, "num_key_value_heads": 2}

SIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GATED),
    "llama-head_dim-100": (
        "LlamaConfig",
        {**_GATED, "hidden_size": 800, "num_key_value_heads": 8},
    ),
    "llama-head_dim-128": ("LlamaConfig", {**_GATED, "head_dim": 128}),
    "llama-tied": ("LlamaConfig", {**_GATED, "tie_word_embeddings": True}),
    "mistral-window": ("MistralConfig", {**_GATED, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", _GATED),
    "qwen3": ("Qwen3Config", {**_GATED, "head_dim": 128}),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 1024, "word_embed_proj_dim": 512}),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "intermediate_size": 1024}),
    "gemma2": (
        "Gemma2Config",
        {**_GATED, "head_dim": 64, "sliding_window": 8, "query_pre_attn_scalar": 64},
    ),
}
FUSED = frozenset(name for name in SIZED if name.startswith(("llama", "mistral", "qwen")))


@dataclass(frozen=True)
class SizedModel:
    """A saved model; its weights are exact in `dtype`, so that only arithmetic differs."""

    folder: Path
    dtype: torch.dtype
    config: transformers.PretrainedConfig
    exact: transformers.PreTrainedModel  # float32
    rounded: transformers.PreTrainedModel  # in `dtype`


def save_sized(name: str, folder: Path, dtype: torch.dtype, device: str) -> SizedModel:
    """The model `name`, the same every time, with transformers' own on `device`."""
    config_class, settings = SIZED[name]
    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(0)
    # "eager" is each family's written formula (sdpa of transformers 5.17 forgets Gemma 2's softcap)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    exact, rounded = (
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, attn_implementation="eager"
        )
        .eval()
        .to(device)
        for kind in (torch.float32, dtype)
    )
    return SizedModel(folder, dtype, config, exact, rounded)
