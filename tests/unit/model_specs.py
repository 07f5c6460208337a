"""Shapes of public models, as their `config.json` gives them, for tests that plan."""

from __future__ import annotations

from dataclasses import replace

from mpipipe.checkpoint.spec import ModelSpec

__all__ = ["OPENLLAMA_3B", "OPENLLAMA_7B", "SMOL"]

SMOL = ModelSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_context_tokens=8192,
    tied_embeddings=True,
    gated_mlp=True,
    dtype="bfloat16",
    eos_token_ids=(2,),
)
OPENLLAMA_3B = replace(
    SMOL,
    num_layers=26,
    hidden_size=3200,
    intermediate_size=8640,
    num_heads=32,
    num_kv_heads=32,
    head_dim=100,
    vocab_size=32000,
    max_context_tokens=2048,
    tied_embeddings=False,
    dtype="float16",
)
OPENLLAMA_7B = replace(
    OPENLLAMA_3B, num_layers=32, hidden_size=4096, intermediate_size=11008, head_dim=128
)
