"""What is known of a run's requests before the plan. Pure facts.

`runtime` counts requests and tokens; `resolve` sizes the plan by them. `SamplingUse` says which of
the sampler's operations (`stage.device_sampler`) a run uses: it decides what is made ready, and its
memory (`step_limits`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter

from mpipipe.sampling_options import OPTIONS, SamplingNeeds
from mpipipe.types import SamplingParams

__all__ = ["SamplingUse", "Workload"]

# Only a prompt with a temperature draws, whatever its seed is.
_what_counts = attrgetter(*sorted(OPTIONS.keys() - {"seed", "max_new_tokens"}))


@dataclass(frozen=True, slots=True)
class SamplingUse:
    """What the requests of a run use, all together."""

    needs: SamplingNeeds = SamplingNeeds.NOTHING
    logprobs: bool = False  # of some request
    plain: bool = True  # some request is greedy, without any of these

    @staticmethod
    def of(samplings: Iterable[SamplingParams]) -> SamplingUse:
        """The union over all requests."""
        needs, logprobs, plain = SamplingNeeds.NOTHING, False, False
        # Each prompt has a seed of its own, and most have all else in common.
        kinds = {_what_counts(sampling): sampling for sampling in samplings}
        for sampling in kinds.values():
            own = sampling.needs
            needs |= own
            logprobs |= sampling.num_logprobs >= 0
            plain |= not own and sampling.num_logprobs < 0
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
        nothing = (SamplingNeeds.NOTHING, False)
        return (everything, nothing) if self.plain and everything != nothing else (everything,)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is known of the requests before the plan: lets `auto` sizes fit them. None: unknown."""

    num_requests: int | None = None
    longest_request_tokens: int | None = None  # prompt + max_new_tokens
    num_prompt_tokens: int | None = None  # of all requests together
    num_output_tokens: int | None = None  # that they may generate
    sampling: SamplingUse | None = None
    lengths: tuple[tuple[int, int], ...] = ()  # prompt and output tokens of each; empty: unknown
    shared_ratio: float = 0.0  # of the prompt tokens, with which prompts begin as others do

    def share_of(self, num_replicas: int) -> Workload:
        """What one of `num_replicas` replicas gets of it."""
        counts = (self.num_requests, self.num_prompt_tokens, self.num_output_tokens)
        shares = (None if count is None else -(-count // num_replicas) for count in counts)
        num_requests, num_prompt_tokens, num_output_tokens = shares
        return replace(
            self,
            num_requests=num_requests,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
        )
