"""The sampling options in one table: name, type, default, allowed values, what they need.

Whatever takes options takes them from here: the settings of a run (`config.schema`), of a prompt
(`config.prompt_fields`), of a request (`types.SamplingParams`, and with it the messages), and what
is made ready on the last stage (`planning.workload`). `stage.device_sampler` says how the
device holds an option and what it does to the logits.

The default of an option that changes the logits is its neutral value: it changes nothing.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["OPTIONS", "OPTION_NAMES", "SamplingNeeds", "SamplingOption", "SamplingOptions"]

# Tables of the stages hold counts in 32 bits.
_MAX_COUNT = 2**31 - 1


class SamplingNeeds(enum.Flag):
    """Operations of the sampler; without any, the likeliest tokens are taken."""

    NOTHING = 0
    DRAW = 1  # a temperature
    FILTERS = 2  # top-k, top-p or min-p; only rows that draw need them
    SEEN = 4  # which tokens the prompt and the completion have: a repetition penalty
    COUNTS = 8  # how often the completion has each token: a frequency or presence penalty
    DRAWING = DRAW | FILTERS
    HISTORY = SEEN | COUNTS


@dataclass(frozen=True, slots=True)
class SamplingOption:
    """One option, as far as values of its type differ in what they mean."""

    default: Any
    allows: Callable[[Any], bool]
    allowed: str  # in words, after "it must be"
    needs: SamplingNeeds  # for any value but the default


def _option(
    default: float,
    allows: Callable[[Any], bool],
    allowed: str,
    needs: SamplingNeeds = SamplingNeeds.NOTHING,
) -> Any:
    option = SamplingOption(default, allows, allowed, needs)
    return field(default=default, metadata={"option": option})


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is chosen. Defaults are greedy decoding; nothing is checked here."""

    max_new_tokens: int = _option(128, lambda v: 1 <= v <= _MAX_COUNT, f"from 1 to {_MAX_COUNT}")
    """At most this many tokens per prompt."""
    temperature: float = _option(0.0, lambda v: v >= 0, "0 (greedy) or more", SamplingNeeds.DRAW)
    """0: greedy: the most likely token, ties to the lowest id."""
    top_k: int = _option(
        0, lambda v: 0 <= v <= _MAX_COUNT, f"from 0 (off) to {_MAX_COUNT}", SamplingNeeds.FILTERS
    )
    """Keep the k likeliest tokens; 0: off."""
    top_p: float = _option(
        1.0, lambda v: 0 < v <= 1, "above 0 and at most 1 (off)", SamplingNeeds.FILTERS
    )
    """Keep the likeliest tokens that hold this probability; 1: off."""
    min_p: float = _option(
        0.0, lambda v: 0 <= v < 1, "0 (off) or more, and below 1", SamplingNeeds.FILTERS
    )
    """Drop tokens below this share of the likeliest one's probability; 0: off."""
    repetition_penalty: float = _option(1.0, lambda v: v > 0, "above 0", SamplingNeeds.SEEN)
    """Divide the logits of tokens already seen, in the prompt or the completion; 1: off."""
    frequency_penalty: float = _option(
        0.0, lambda v: -2 <= v <= 2, "from -2 to 2", SamplingNeeds.COUNTS
    )
    """Subtract this from a token's logit for each time that the completion has it; 0: off."""
    presence_penalty: float = _option(
        0.0, lambda v: -2 <= v <= 2, "from -2 to 2", SamplingNeeds.COUNTS
    )
    """Subtract this from the logits of all tokens that the completion has; 0: off."""
    seed: int = _option(0, lambda _: True, "", SamplingNeeds.DRAW)
    """Seed of the run; each prompt's own seed derives from it and the prompt's id. With a token's
    position it decides the draw, whatever the batches and stages are."""
    stop: tuple[str, ...] = ()
    """End the text before any of these."""
    stop_token_ids: tuple[int, ...] = ()
    """End at any of these token ids, beside the model's end-of-sequence ids."""
    ignore_eos: bool = False
    """Go on past the end-of-sequence token (benchmarks)."""
    num_logprobs: int = _option(
        -1, lambda v: -1 <= v <= _MAX_COUNT, f"from -1 (none) to {_MAX_COUNT}"
    )
    """-1: none; k: log-probabilities of the chosen and the k likeliest tokens."""


_FIELDS = dataclasses.fields(SamplingOptions)
OPTION_NAMES = tuple(entry.name for entry in _FIELDS)
# Those with a range or an operation.
OPTIONS: Mapping[str, SamplingOption] = {
    entry.name: entry.metadata["option"] for entry in _FIELDS if entry.metadata
}
