"""Requests as far as a simulation looks at them: how long they are.

A simulated model knows how many tokens it is going to make: the request's seed says it. Greedy
sampling has no other use for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mpipipe.types import Request, SamplingParams

__all__ = ["FILLER_ID", "STOP_ID", "RequestLengths", "scripted_stop"]

STOP_ID = 0
FILLER_ID = 1000  # three bytes on the wire, as most ids of a vocabulary
_OWN_ID, _COMMON_ID, _NUM_IDS = 2_000, 32_000, 30_000


@dataclass(frozen=True, slots=True)
class RequestLengths:
    """One request. Counts of tokens."""

    index: int
    num_prompt_tokens: int
    max_new_tokens: int
    num_output_tokens: int  # that it makes: fewer than `max_new_tokens` where the model stops
    group: int = -1  # of prompts that begin alike; -1: of none
    num_common_tokens: int = 0  # with which all of its group begin

    @property
    def stops(self) -> bool:
        """Whether it ends before its limit."""
        return self.num_output_tokens < self.max_new_tokens

    def request(self) -> Request:
        """As the scheduler takes it."""
        sampling = _sampling(self.max_new_tokens, self.num_output_tokens)
        num_common = min(self.num_common_tokens, self.num_prompt_tokens)
        common = _ids(_COMMON_ID, self.group, num_common) if num_common else ()
        own = _ids(_OWN_ID, self.index, self.num_prompt_tokens - num_common)
        return Request(str(self.index), self.index, (*common, *own), sampling)


def scripted_stop(sampling: SamplingParams) -> int | None:
    """After how many tokens a request with these options stops; None: at its limit."""
    return sampling.seed if sampling.seed < sampling.max_new_tokens else None


def _ids(base: int, number: int, count: int) -> tuple[int, ...]:
    """So many ids, of which the first two tell `number`."""
    begin = (base + number % _NUM_IDS, base + number // _NUM_IDS)[:count]
    return begin + _filler(count - len(begin))


@lru_cache(maxsize=4096)
def _filler(num_tokens: int) -> tuple[int, ...]:
    return (FILLER_ID,) * num_tokens


@lru_cache(maxsize=4096)
def _sampling(max_new_tokens: int, num_output_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, seed=num_output_tokens)
