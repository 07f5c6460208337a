"""How model families name their sizes in `config.json`, and what they leave unsaid there.

The facts a new family may add to. Seen in transformers 5.23's configuration classes.
"""

from __future__ import annotations

__all__ = ["ALIASES", "PLAIN_MLP", "TIED_BY_DEFAULT"]

# Our name -> the names that families give it, most common first.
ALIASES = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "expert_size": ("moe_intermediate_size",),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "vocab_size": ("vocab_size",),
    "max_context_tokens": (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "seq_length",
    ),
}

# Families whose feed-forward is one up and one down matrix.
PLAIN_MLP = frozenset(
    {
        "bloom",
        "codegen",
        "falcon",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gpt_neox_japanese",
        "gptj",
        "mpt",
        "nemotron",
        "opt",
        "persimmon",
        "phi",
        "starcoder2",
        "xglm",
    }
)

# Families that tie the LM head to the embedding when config.json is silent.
TIED_BY_DEFAULT = frozenset(
    {
        "bloom",
        "cohere",
        "cohere2",
        "ernie4_5",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox_japanese",
        "mpt",
        "opt",
        "recurrent_gemma",
        "smollm3",
        "starcoder2",
        "xglm",
    }
)
