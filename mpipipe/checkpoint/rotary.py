"""What `config.json` says of rotary embeddings, as far as the scheduler must know it.

Phi-3's `generate` drops its cache when a sequence outgrows the original context, and computes all
of it again with the long factors of `longrope`. Other families with such factors go on with the
keys they have, and need nothing here: what each token sees is `models.rotary`'s affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["RESTARTING", "RotaryFacts", "read_rotary"]

# model_type → original context of a file that does not state it, as in transformers' configuration.
RESTARTING = {"phi3": 4096}
_LONG = frozenset({"longrope", "su", "yarn"})  # Phi-3 reads the older two names as the first


@dataclass(frozen=True, slots=True)
class RotaryFacts:
    """How a model's rotary embedding depends on the length of a sequence."""

    kind: str = "default"
    restart_tokens: int = 0  # with so many known tokens `generate` starts over; 0: never


def read_rotary(config: Mapping[str, object]) -> RotaryFacts:
    """The facts of a model's `config.json`."""
    kind = "default"
    for name in ("rope_scaling", "rope_parameters"):  # transformers lets the former win
        parameters = config.get(name)
        if isinstance(parameters, Mapping) and parameters:
            kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
            break
    original = RESTARTING.get(str(config.get("model_type")))
    if original is None or kind not in _LONG:
        return RotaryFacts(kind)
    stated = config.get("original_max_position_embeddings")
    if isinstance(stated, int) and not isinstance(stated, bool) and stated > 0:
        original = stated
    return RotaryFacts("longrope", original + 1)
