"""`Workload`: what is known of a run's requests before the plan. Pure facts.

`runtime` counts them; `resolve` sizes the plan by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpipipe.planning.sampling_use import SamplingUse

__all__ = ["Workload"]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is known of the requests before the plan: lets `auto` sizes fit them. None: unknown."""

    num_requests: int | None = None
    longest_request_tokens: int | None = None  # prompt + max_new_tokens
    num_prompt_tokens: int | None = None  # of all requests together
    num_output_tokens: int | None = None  # that they may generate
    sampling: SamplingUse | None = None
