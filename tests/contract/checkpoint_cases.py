"""Tiny random models on disk in every form, and stages of them on the meta device."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

NUM_LAYERS = 3
_SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
_EXPERTS = {"num_key_value_heads": 1, "intermediate_size": 24, "num_experts_per_tok": 2}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES, intermediate_size=24, num_key_value_heads=1),
    "llama-tied": lambda: LlamaConfig(**_SIZES, intermediate_size=24, tie_word_embeddings=True),
    "opt": lambda: OPTConfig(**_SIZES, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, intermediate_size=24),
    "mixtral": lambda: MixtralConfig(**_SIZES, **_EXPERTS, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_SIZES,
        **_EXPERTS,
        num_experts=4,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    ),
}


@dataclass(frozen=True)
class Stage:
    """What the models package hands to the loader."""

    module: Any
    wanted: dict[str, str]
    all_names: frozenset[str]
    tied: dict[str, str]


def make_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as zeros and ones
            parameter.copy_(torch.randn(parameter.shape))
    return model


def make_stage(
    config: PretrainedConfig, first: int, last: int, dtype: torch.dtype = torch.float32
) -> Stage:
    """Layers [first, last); the embedding with the first, norm and head with the last."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    all_names, tied = frozenset(model.state_dict()), dict(model.all_tied_weights_keys)
    decoder = model.base_model
    decoder = getattr(decoder, "decoder", decoder)
    prefix = next(name for name, module in model.named_modules() if module is decoder) + ".layers."
    decoder.layers = decoder.layers[first:last]
    for owner, outermost in ((decoder, model), (model, None)):
        for name, child in list(owner.named_children()):
            is_body = child in (decoder, decoder.layers) or child is model.base_model
            is_input = "embed" in name and outermost is not None
            belongs = first == 0 if is_input else last == NUM_LAYERS
            if not is_body and not belongs:
                setattr(owner, name, None)
    wanted = {name: _canonical(name, prefix, first) for name in model.state_dict()}
    return Stage(model, wanted, all_names, tied)


def _canonical(name: str, prefix: str, first: int) -> str:
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{int(number) + first}.{rest}"


def save_safetensors(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def save_sharded_safetensors(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def save_bin(model: PreTrainedModel, folder: Path) -> Path:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def save_sharded_bin(model: PreTrainedModel, folder: Path) -> Path:
    model.config.save_pretrained(folder)
    state = list(model.state_dict().items())
    weight_map: dict[str, str] = {}
    for number in range(3):
        name = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        part = dict(state[number::3])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    listing = folder / "pytorch_model.bin.index.json"
    listing.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


FORMS: dict[str, Callable[[PreTrainedModel, Path], Path]] = {
    "safetensors": save_safetensors,
    "sharded safetensors": save_sharded_safetensors,
    "bin": save_bin,
    "sharded bin": save_sharded_bin,
}


def rewrite_bin(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, object]]
) -> None:
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save(change(dict(state)), path)
