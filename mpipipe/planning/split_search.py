"""The split of layers over stages by which a whole job is predicted to end first. Pure.

A balance of costs (`partition`) suits one kind of step; a job has prompts and tokens, and the
stage with most layers has the fewest KV pages for all. So candidates are judged by what the whole
job takes. From the best of some splits (those that suit a lighter or a heavier LM head, or unlike
devices) one layer at a time moves from a stage to another, as long as that makes the job shorter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from mpipipe.planning.partition import split_layers

__all__ = ["search_split", "split_by_speed"]

_LEAST_GAIN = 0.002  # of the job's time: less is within the error of any prediction
_MOST_TRIALS = 120


def search_split(
    first: tuple[int, ...],
    job_s: Callable[[tuple[int, ...]], float],
    kinds: Sequence[object],
    starts: Sequence[tuple[int, ...]] = (),
) -> tuple[int, ...]:
    """The best split that is found near `first`.

    Args:
        first: layers per stage.
        job_s: what a job takes with a split; infinity where it does not fit.
        kinds: of each stage; inner stages of one kind with as many layers are alike.
        starts: other splits to look near; none: those that suit a lighter or a heavier head.
    """
    known: dict[tuple[int, ...], float] = {first: job_s(first)}  # first, so that it wins ties

    def seconds(split: tuple[int, ...]) -> float:
        if split not in known:
            known[split] = job_s(split) if len(known) < _MOST_TRIALS else math.inf
        return known[split]

    best = first

    def is_better(candidate: tuple[int, ...]) -> bool:
        return seconds(candidate) < seconds(best) * (1 - _LEAST_GAIN)

    for candidates in itertools.chain([starts or _by_head(first)], itertools.repeat(None)):
        found = min(candidates or _neighbours(best, kinds), key=seconds, default=best)
        if is_better(found):
            best = found
        elif candidates is None:
            break
    return best


def split_by_speed(num_layers: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """Layers dealt one by one to the stage that is done first with one more; `speeds`: layers/s."""
    split = [1] * len(speeds)
    for _ in range(num_layers - len(speeds)):
        done_s = [(layers + 1) / speed for layers, speed in zip(split, speeds, strict=True)]
        split[done_s.index(min(done_s))] += 1
    return tuple(split)


def _by_head(split: Sequence[int]) -> list[tuple[int, ...]]:
    """The splits of as many layers that are balanced for a head from no layer up to many."""
    heads = range(2 * max(split) + 1)  # halves of a layer
    return list(
        dict.fromkeys(split_layers(sum(split), len(split), last_extra=head / 2) for head in heads)
    )


def _neighbours(split: Sequence[int], kinds: Sequence[object]) -> Iterator[tuple[int, ...]]:
    """A layer moved from a stage to another one; of stages that are alike only one gives or takes.

    Givers are looked for from the front, takers too, but for the first stage: it schedules as well.
    """
    givers = _unlike(split, kinds, range(len(split)))
    takers = _unlike(split, kinds, [*range(1, len(split)), 0])
    for giver in givers:
        for taker in takers:
            if giver != taker and split[giver] > 1:
                moved = list(split)
                moved[giver] -= 1
                moved[taker] += 1
                yield tuple(moved)


def _unlike(split: Sequence[int], kinds: Sequence[object], order: Sequence[int]) -> list[int]:
    seen: dict[tuple[object, ...], int] = {}
    for stage in order:
        kind = (stage == 0, stage == len(split) - 1, split[stage], kinds[stage])
        seen.setdefault(kind, stage)
    return list(seen.values())
