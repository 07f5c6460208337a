"""Writes tiny models as GGUF files, in the order and under the names that llama.cpp gives them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

__all__ = [
    "GGUF_NAMES",
    "MODELS",
    "Vocabulary",
    "byte_vocabulary",
    "gguf_name",
    "in_pairs",
    "random_model",
    "sentencepiece_vocabulary",
    "write_gguf",
]

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, LAYERS, CONTEXT = 64, 4, 2, 96, 2, 128
CONTROL = ["<unk>", "<s>", "</s>"]
_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
}
# name → (architecture of the file, configuration of a model with so many tokens)
MODELS: dict[str, tuple[str, Callable[[int], LlamaConfig | Qwen2Config | Qwen3Config]]] = {
    "llama": ("llama", lambda vocab: LlamaConfig(vocab_size=vocab, **_SIZES)),
    "llama-tied": (
        "llama",
        lambda vocab: LlamaConfig(vocab_size=vocab, tie_word_embeddings=True, **_SIZES),
    ),
    "qwen2": ("qwen2", lambda vocab: Qwen2Config(vocab_size=vocab, **_SIZES)),
    "qwen3": ("qwen3", lambda vocab: Qwen3Config(vocab_size=vocab, head_dim=32, **_SIZES)),
}


class Vocabulary:
    """A tokenizer as a GGUF file lists it; `add` writes it."""

    def __init__(
        self, tokens: Sequence[str], types: Sequence[int], add: Callable[[gguf.GGUFWriter], None]
    ) -> None:
        self.tokens = list(tokens)
        self.types = list(types)
        self._add = add

    def add(self, writer: gguf.GGUFWriter) -> None:
        """Write it."""
        writer.add_token_list([token.encode() for token in self.tokens])
        writer.add_token_types(self.types)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        self._add(writer)


def byte_vocabulary(rule: str = "llama-bpe") -> Vocabulary:
    """Byte-level BPE that splits text by `rule`, with merges for "the" and " the"."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule)
        writer.add_token_merges(["t h", "th e", "Ġ the"])

    tokens = [*CONTROL, *alphabet, "th", "the", "Ġthe"]
    return Vocabulary(tokens, [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)), add)


def sentencepiece_vocabulary(
    lines: Sequence[str],
) -> tuple[Vocabulary, sentencepiece.SentencePieceProcessor]:
    """BPE of sentencepiece, trained on `lines`, and the reference that encodes with it."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=content,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    size = reference.get_piece_size()

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([reference.get_score(number) for number in range(size)])

    def kind(number: int) -> int:
        if reference.is_unknown(number):
            return 2
        return 3 if reference.is_control(number) else 6 if reference.is_byte(number) else 1

    tokens = [reference.id_to_piece(number) for number in range(size)]
    return Vocabulary(tokens, [kind(number) for number in range(size)], add), reference


def random_model(name: str, vocab: int) -> PreTrainedModel:
    """A model of `MODELS` whose norms and biases are no ones and zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name][1](vocab), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order for q and k: (i, i + half) become neighbours."""
    out, *inner = weight.shape
    halves = weight.reshape(heads, 2, out // heads // 2, *inner)
    return halves.swapaxes(1, 2).reshape(out, *inner)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: gguf.GGMLQuantizationType,
    vocabulary: Vocabulary,
    *,
    architecture: str = "llama",
    change: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    without: str = "",
) -> dict[str, torch.Tensor]:
    """Write `model`; returns its weights as the file holds them, under transformers' names.

    Args:
        path: the file.
        model: of `MODELS`.
        kind: of the matrices; vectors are float32, as llama.cpp keeps them.
        vocabulary: its tokenizer.
        architecture: that the file names.
        change: adds more to the file.
        without: name of a tensor that is left out.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or HIDDEN // HEADS
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    if architecture == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    vocabulary.add(writer)
    change(writer)
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if (name == "lm_head.weight" and config.tie_word_embeddings) or name == without:
            continue
        expected[name] = _add_tensor(writer, name, tensor.numpy(), kind, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    values: np.ndarray,
    kind: gguf.GGMLQuantizationType,
    architecture: str,
) -> torch.Tensor:
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0)
    stored = in_pairs(values, heads) if heads and architecture == "llama" else values
    if values.ndim == 1:
        kind = gguf.GGMLQuantizationType.F32
    writer.add_tensor(gguf_name(name), gguf.quantize(stored, kind), raw_dtype=kind)
    decoded = gguf.dequantize(gguf.quantize(values, kind), kind)
    return torch.from_numpy(np.array(decoded))
