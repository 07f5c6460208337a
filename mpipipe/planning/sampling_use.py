"""Which of the sampler's operations a run uses: decides what is made ready, and its memory. Pure.

`stage.device_sampler` has the operations, `gpu_limits` their memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mpipipe.types import SamplingParams

__all__ = ["SamplingNeeds", "SamplingUse"]


@dataclass(frozen=True, slots=True)
class SamplingNeeds:
    """The operations that some row of a step uses; without any, the likeliest tokens are taken."""

    draw: bool = False  # a temperature
    filters: bool = False  # top-k, top-p or min-p
    penalty: bool = False  # a repetition penalty

    def __or__(self, other: SamplingNeeds) -> SamplingNeeds:
        """What rows of both need."""
        return SamplingNeeds(
            self.draw or other.draw, self.filters or other.filters, self.penalty or other.penalty
        )

    @staticmethod
    def of(sampling: SamplingParams) -> SamplingNeeds:
        """What one sequence needs. Filters of a greedy one change nothing."""
        draw = not sampling.is_greedy
        filters = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        return SamplingNeeds(draw, draw and filters, sampling.repetition_penalty != 1)


@dataclass(frozen=True, slots=True)
class SamplingUse:
    """What the requests of a run use, all together."""

    needs: SamplingNeeds = SamplingNeeds()
    logprobs: bool = False  # of some request
    plain: bool = True  # some request is greedy, without any of these

    @staticmethod
    def of(samplings: Iterable[SamplingParams]) -> SamplingUse:
        """The union over all requests."""
        needs, logprobs, plain = SamplingNeeds(), False, False
        for sampling in samplings:
            own = SamplingNeeds.of(sampling)
            needs |= own
            logprobs |= sampling.num_logprobs >= 0
            plain |= own == SamplingNeeds() and sampling.num_logprobs < 0
        return SamplingUse(needs, logprobs, plain)

    @property
    def is_plain(self) -> bool:
        """Every request takes the likeliest token, and nothing else is asked for."""
        return self == SamplingUse(plain=self.plain)

    @property
    def kinds(self) -> tuple[tuple[SamplingNeeds, bool], ...]:
        """The kinds of decode steps to make ready: operations, and whether logits are kept.

        One that does all serves every step, since more operations than a row uses change no token;
        beside it the cheapest, where the run has requests for it.
        """
        everything = (self.needs, self.logprobs)
        nothing = (SamplingNeeds(), False)
        return (everything, nothing) if self.plain and everything != nothing else (everything,)
