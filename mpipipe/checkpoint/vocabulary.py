"""Which token ids of a model are ordinary text, as far as `config.json` tells: for benchmarks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from mpipipe.checkpoint.jsonfile import read_json_object
from mpipipe.checkpoint.spec import ModelSpec

__all__ = ["Vocabulary"]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids that are ordinary text."""

    first: int
    last: int  # inclusive
    special: frozenset[int]

    @staticmethod
    def of(folder: Path, spec: ModelSpec) -> Vocabulary:
        """Without the special ids, as far as can be told without a tokenizer.

        `config.json` names some; families keep the rest at either end of the vocabulary, so the
        first hundredth and the last fiftieth are left out (Llama 3: the last 256 of 128,256).
        """
        config = read_json_object(folder / "config.json")
        named = {
            token_id
            for key, value in config.items()
            if key.endswith("_token_id")
            for token_id in (value if isinstance(value, list) else [value])
            if isinstance(token_id, int)
        }
        size = spec.vocab_size
        return Vocabulary(
            size // 100, size - 1 - size // 50, frozenset(named | set(spec.eos_token_ids))
        )

    def draw(self, generator: random.Random, count: int) -> tuple[int, ...]:
        """`count` ids, each as likely as any other."""
        ids: list[int] = []
        while len(ids) < count:
            drawn = generator.choices(range(self.first, self.last + 1), k=count - len(ids))
            ids += [token_id for token_id in drawn if token_id not in self.special]
        return tuple(ids)
