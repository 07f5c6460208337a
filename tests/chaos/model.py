"""A tiny random model and its prompts: one that loads in no time and is busy for some seconds."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

__all__ = ["write_model", "write_prompts"]

_NUM_LAYERS = 6  # for up to three ranks, two layers each
_WORDS = ("river", "stone", "über", "seven", "漢字", "lamp", "😀", "quiet", "north", "bread")


def write_model(folder: Path) -> Path:
    """A Llama with random weights, and a tokenizer with one token a byte."""
    from tests.e2e.conftest import save_random_llama  # late: it takes torch seconds to import

    return save_random_llama(
        folder,
        seed=3,
        vocab_size=260,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=_NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Logits far apart: the greedy choice does not hang on the last bit of a sum.
        initializer_range=0.3,
        eos_token_id=259,
    )


def write_prompts(path: Path, num_prompts: int, seed: int) -> list[str]:
    """Prompts of different lengths; returns their ids."""
    rng = Random(f"prompts:{seed}")
    names = [f"p{number}" for number in range(num_prompts)]
    with path.open("w", encoding="utf-8") as file:
        for name in names:
            text = " ".join(rng.choices(_WORDS, k=rng.randint(1, 8)))
            tokens = rng.randint(20, 120)
            file.write(json.dumps({"id": name, "prompt": text, "max_new_tokens": tokens}) + "\n")
    return names
