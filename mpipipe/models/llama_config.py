"""The configuration of Llama-like models, read from `config.json` without transformers.

For the families whose modules are ours too (`llama_modules`). A file that asks for anything else
than what is read here gives None: transformers builds such a model, and says what is wrong with it.
Defaults are those of transformers' configuration classes (5.17 to 5.23).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LlamaConfig", "RotarySettings", "llama_config"]

_ROWS, _COLUMNS = "colwise", "rowwise"


@dataclass(frozen=True, slots=True)
class RotarySettings:
    """How the inverse frequencies of the rotary embedding come about."""

    theta: float
    kind: str = "default"  # | "linear" | "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_tokens: int = 0  # the context before it was stretched


@dataclass
class LlamaConfig:
    """What the modules are made from, under transformers' names. Not frozen: a stage cuts it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rotary: RotarySettings
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False  # RMS norms over each head of query and key
    sliding_window: int | None = None
    base_model_tp_plan: dict[str, str] = field(
        default_factory=lambda: {
            "layers.*.self_attn.q_proj": _ROWS,
            "layers.*.self_attn.k_proj": _ROWS,
            "layers.*.self_attn.v_proj": _ROWS,
            "layers.*.self_attn.o_proj": _COLUMNS,
            "layers.*.mlp.gate_proj": _ROWS,
            "layers.*.mlp.up_proj": _ROWS,
            "layers.*.mlp.down_proj": _COLUMNS,
        }
    )
    base_model_pp_plan: tuple[str, ...] = ("embed_tokens", "layers", "norm")


@dataclass(frozen=True, slots=True)
class _Family:
    """What a family computes without being told."""

    qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    head_norms: bool = False
    has_window: bool = False  # `sliding_window` holds for all layers
    may_have_window: bool = False  # `use_sliding_window` says whether some layers have one


_FAMILIES = {
    "llama": _Family(reads_attention_bias=True, reads_mlp_bias=True),
    "mistral": _Family(has_window=True),
    "qwen2": _Family(qkv_bias=True, may_have_window=True),
    "qwen3": _Family(reads_attention_bias=True, head_norms=True, may_have_window=True),
}
# Settings of any model that change what is computed, or whose code computes it.
_CHANGES_MODEL = (
    "is_encoder_decoder",
    "add_cross_attention",
    "text_config",
    "auto_map",
    "use_bidirectional_attention",
    "hidden_size_per_layer_input",
    "num_kv_shared_layers",
    "attention_chunk_size",
    "per_layer_config",
    "original_max_position_embeddings",  # moves into the rotary settings
)
# What else than these changes it: `is_causal` even as null.
_ONLY_AS: dict[str, set[object]] = {"is_causal": {True}, "partial_rotary_factor": {None, 1}}


class _UnreadError(Exception):
    """The file asks for something that is not read here."""


def llama_config(config: Mapping[str, Any]) -> LlamaConfig | None:
    """The configuration in a `config.json`; None: transformers must read it."""
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or any(config.get(name) for name in _CHANGES_MODEL):
        return None
    try:
        _require(all(config[name] in known for name, known in _ONLY_AS.items() if name in config))
        return _read(config, family)
    except (_UnreadError, TypeError, ValueError, OverflowError):  # of values that are no settings
        return None


def _read(config: Mapping[str, Any], family: _Family) -> LlamaConfig:
    hidden_size, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    vocab_size, pad = _size(config, "vocab_size"), config.get("pad_token_id")
    _require(hidden_size % num_heads == 0)
    _require(config.get("hidden_act", "silu") == "silu")
    _require(pad is None or (type(pad) is int and -vocab_size <= pad < vocab_size))
    num_kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
    if num_kv_heads is None:
        _require(config["model_type"] == "llama")  # others have a default that follows from nothing
        num_kv_heads = num_heads
    if head_dim is None:
        _require(not family.head_norms)  # Qwen 3 has a default that follows from nothing
        head_dim = hidden_size // num_heads
    _require(_is_size(num_kv_heads) and _is_size(head_dim))
    _require(num_heads % num_kv_heads == 0 and head_dim % 2 == 0)
    attention_bias = family.reads_attention_bias and _flag(config, "attention_bias")
    return LlamaConfig(
        model_type=str(config["model_type"]),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_hidden_layers=_size(config, "num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(config, "rms_norm_eps"),
        rotary=_rotary(config),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and _flag(config, "mlp_bias"),
        head_norms=family.head_norms,
        sliding_window=_window(config, family),
    )


def _window(config: Mapping[str, Any], family: _Family) -> int | None:
    types = config.get("layer_types")
    if types is not None:
        _require(set(types) == {"full_attention"} and len(types) == config["num_hidden_layers"])
    if family.may_have_window:
        _require(not _flag(config, "use_sliding_window"))
        return None
    if not family.has_window:
        _require(config.get("sliding_window") is None)  # transformers caches no more than that
        return None
    _require(types is None and "sliding_window" in config)  # silent, it has 4,096
    window = config["sliding_window"]
    _require(window is None or _is_size(window))
    return window if window is None else int(window)


def _rotary(config: Mapping[str, Any]) -> RotarySettings:
    """`rope_scaling` and `rope_parameters` are the old and the new name of the same settings."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    _require(not (old and new))
    settings = old or new or {}
    _require(isinstance(settings, Mapping))
    _require(not any(isinstance(value, Mapping) for value in settings.values()))  # by layer type
    kind = settings.get("rope_type", settings.get("type", "default"))
    default = 10000.0 if config["model_type"] == "llama" else None
    theta = settings.get("rope_theta", config.get("rope_theta", default))
    _require(_is_number(theta) and settings.get("partial_rotary_factor", 1) == 1)
    if kind == "default":
        return RotarySettings(float(theta))
    factor = _number(settings, "factor")
    if kind == "linear":
        return RotarySettings(float(theta), "linear", factor)
    _require(kind == "llama3")
    return RotarySettings(
        float(theta),
        "llama3",
        factor,
        _number(settings, "low_freq_factor"),
        _number(settings, "high_freq_factor"),
        _size(settings, "original_max_position_embeddings"),
    )


def _require(holds: bool) -> None:
    if not holds:
        raise _UnreadError


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: object) -> bool:
    return type(value) in {int, float} and math.isfinite(float(value)) and float(value) > 0  # type: ignore[arg-type]  # is one of them


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    _require(_is_size(value))
    return int(value)  # type: ignore[arg-type]  # is an int


def _number(config: Mapping[str, Any], name: str) -> float:
    value = config.get(name)
    _require(_is_number(value))
    return float(value)  # type: ignore[arg-type]  # is a number


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, False)
    _require(type(value) is bool)
    return bool(value)
