"""Small random models in the very files in which OpenLLaMA and OPT are published.

Names of files and tensors, keys and values of `config.json`, the type of the weights and the ratios
of the sizes are as published; there are fewer heads, layers and tokens. `configs/shapes/` has the
full sizes. What these files have that no library writes today: `.bin` shards, rotary frequencies
among the weights, names without the prefix of the model, a head stored beside its embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.contract.published_tokenizers import (
    OPENLLAMA,
    OPT_SETTINGS,
    flat,
    save_opt_tokenizer,
    save_sentencepiece,
    train_bpe,
    train_sentencepiece,
    write,
)

__all__ = ["NUM_LAYERS", "PUBLISHED", "PublishedModel", "save_published"]

NUM_LAYERS = 4
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": NUM_LAYERS,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.30.0.dev0",
    "use_cache": True,
    "vocab_size": 400,
}
_OPT: dict[str, Any] = {
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 2,
    "num_hidden_layers": NUM_LAYERS,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 420,
}

State = dict[str, torch.Tensor]


def _with_frequencies(state: State) -> State:
    """What OpenLLaMA's converter stored besides, in float32."""
    weight = state["model.layers.0.self_attn.q_proj.weight"]
    head_dim = weight.shape[0] // _LLAMA["num_attention_heads"]
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    return state | {name.format(layer): frequencies.clone() for layer in range(NUM_LAYERS)}


def _without_prefix(state: State) -> State:
    """As saved from the model without its head: `decoder.layers…`."""
    del state["lm_head.weight"]
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """What sets one published model apart."""

    config: Mapping[str, Any]
    num_shards: int  # 1: one pytorch_model.bin, without an index
    state: Callable[[State], State]  # as transformers has it today → as it is published
    special_files: frozenset[str]  # of the tokenizer


_OF_OPENLLAMA = frozenset({"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"})
_OF_OPT = frozenset(
    {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
)

PUBLISHED = {
    # 32 heads of 100; 8640 is 2.7 × 3200.
    "openllama-3b": PublishedModel(
        _LLAMA | {"hidden_size": 200, "intermediate_size": 540}, 1, _with_frequencies, _OF_OPENLLAMA
    ),
    # 32 heads of 128; 11008 is 2.6875 × 4096.
    "openllama-7b": PublishedModel(
        _LLAMA | {"hidden_size": 256, "intermediate_size": 688}, 2, _with_frequencies, _OF_OPENLLAMA
    ),
    # 12 heads of 64; the head is stored beside the embedding that it is.
    "opt-125m": PublishedModel(
        _OPT | {"hidden_size": 128, "ffn_dim": 512, "word_embed_proj_dim": 128}, 1, dict, _OF_OPT
    ),
    # 32 heads of 128.
    "opt-6.7b": PublishedModel(
        _OPT
        | {
            "_remove_final_layer_norm": False,
            "hidden_size": 256,
            "ffn_dim": 1024,
            "word_embed_proj_dim": 256,
        },
        2,
        _without_prefix,
        _OF_OPT,
    ),
}


def save_published(name: str, folder: Path) -> Path:
    """Write the model `name` of `PUBLISHED` into the empty `folder`, each time the same."""
    published = PUBLISHED[name]
    write(folder / "config.json", published.config)
    if published.special_files is _OF_OPENLLAMA:
        save_sentencepiece(folder, train_sentencepiece(folder), config=OPENLLAMA)
        (folder / "tokenizer.vocab").unlink()  # a list for people
    else:
        save_opt_tokenizer(folder, train_bpe(), config=OPT_SETTINGS)
        roles = {role: flat("</s>") for role in ("bos_token", "eos_token", "unk_token")}
        write(folder / "special_tokens_map.json", roles | {"pad_token": "<pad>"})
    state = published.state(dict(_random(folder).state_dict()))
    _save_weights(state, folder, published.num_shards)
    return folder


def _random(folder: Path) -> PreTrainedModel:
    """Weights in float16 under which tokens depend on the prompt and on each layer."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases are zero and norms one at birth
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
        if config.tie_word_embeddings:  # else its last token is repeated, whatever the layers do
            model.get_input_embeddings().weight.mul_(0.1)
    return model.half()


def _save_weights(state: State, folder: Path, num_shards: int) -> None:
    """One file, or shards of neighbouring tensors with their index."""
    if num_shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        file = f"pytorch_model-{number + 1:05d}-of-{num_shards:05d}.bin"
        part = names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
        torch.save({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in state.values())
    listing = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write(folder / "pytorch_model.bin.index.json", listing)
