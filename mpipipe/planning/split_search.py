"""The split of layers over stages by which a whole job is predicted to end first. Pure.

A balance of costs (`partition`) suits one kind of step; a job has prompts and tokens, and the
stage with most layers has the fewest KV pages for all. So candidates are judged by what the whole
job takes. From the first split one layer at a time moves from a stage to another, as long as that
makes the job shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

__all__ = ["search_split"]

_LEAST_GAIN = 0.002  # of the job's time: less is within the error of any prediction
_MOST_TRIALS = 120


def search_split(
    first: tuple[int, ...], job_s: Callable[[tuple[int, ...]], float]
) -> tuple[int, ...]:
    """The best split that is found near `first`.

    Args:
        first: layers per stage.
        job_s: what a job takes with a split; infinity where it does not fit.
    """
    known: dict[tuple[int, ...], float] = {first: job_s(first)}

    def seconds(split: tuple[int, ...]) -> float:
        if split not in known:
            known[split] = job_s(split) if len(known) < _MOST_TRIALS else math.inf
        return known[split]

    best = first
    while True:
        found = min(_neighbours(best), key=seconds, default=best)
        if not seconds(found) < seconds(best) * (1 - _LEAST_GAIN):
            return best
        best = found


def _neighbours(split: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """A layer moved from a stage to another one.

    Inner stages with as many layers are alike: of these only the first gives, the last takes.
    """
    last = len(split) - 1
    givers = _unlike(split, range(len(split)))
    takers = _unlike(split, range(last, -1, -1))
    for giver in givers:
        for taker in takers:
            if giver != taker and split[giver] > 1:
                moved = list(split)
                moved[giver] -= 1
                moved[taker] += 1
                yield tuple(moved)


def _unlike(split: Sequence[int], order: Sequence[int]) -> list[int]:
    seen: dict[tuple[bool, bool, int], int] = {}
    for stage in order:
        kind = (stage == 0, stage == len(split) - 1, split[stage])
        seen.setdefault(kind, stage)
    return list(seen.values())
