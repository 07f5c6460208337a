"""Prompts of an exact length, made of random tokens: the same seed, the same prompts. Pure.

Prompt i is the same however many there are, so a longer experiment begins with those of a shorter.
"""

from __future__ import annotations

import json
import random

from mpipipe.checkpoint.vocabulary import Vocabulary

__all__ = ["prompt_file"]


def prompt_file(vocabulary: Vocabulary, *, num_prompts: int, num_tokens: int, seed: int) -> bytes:
    """The content of a prompt file: token ids, `num_tokens` a line."""
    lines = []
    for index in range(num_prompts):
        generator = random.Random(f"prompt {seed} {index}")
        ids = list(vocabulary.draw(generator, num_tokens))
        lines.append(json.dumps({"id": f"p{index}", "prompt": ids}) + "\n")
    return "".join(lines).encode()
