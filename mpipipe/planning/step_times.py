"""How long the steps of a stage take: what forecasts and simulations ask for.

`rate_times` answers from rates of devices and links, a measured profile from measurements. All
times are in seconds, and of a step alone: waiting for other stages is for `forecast` to find.
"""

from __future__ import annotations

from typing import Protocol

from mpipipe.planning.plan import StagePlan

__all__ = ["StepTimes"]


class StepTimes(Protocol):
    """What a stage and its edges need for a step. Rows may be means, so they need not be whole."""

    @property
    def source(self) -> str:
        """Where the times come from, in words."""

    def decode_s(self, stage: StagePlan, rows: float, context_tokens: float) -> float:
        """A decode step: `rows` sequences, each with a mean of `context_tokens` in the cache.

        With the LM head and sampling where the stage has them, and what is offloaded.
        """

    def prefill_s(self, stage: StagePlan, tokens: int, context_tokens: float) -> float:
        """A step of `tokens` tokens of prompts, each of which sees `context_tokens` in the mean.

        A prompt that is computed in one go sees half of its length. A step with the last chunk of a
        prompt samples its first token: the LM head is in the time of the stage that has it.
        """

    def hop_s(self, rows_or_tokens: int, crosses_hosts: bool) -> float:
        """Hidden states of so many tokens from a stage to the next, on a host or between two."""
