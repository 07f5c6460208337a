"""How attention that gathers keys pads a decode step of sequences of unlike lengths. Pure.

`models/attention/sdpa.py` gathers by these groups, and forecasts count what it reads.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "MIN_SPARED_TOKENS",
    "MIN_SPARED_TOKENS_GPU",
    "joined_tokens",
    "padded_groups",
    "padded_tokens",
]

# A sequence shares a gather with one up to twice as long, or up to this many tokens longer: the
# fixed cost of one more group (about 60 µs a layer) buys the gather of about 200 tokens.
_MAX_PADDING_TOKENS = 128
_GROUP_TOKENS = 200
# Sequences that begin with the same pages read these once for all where it spares so many tokens:
# joining the two parts costs about 60 µs a layer, as a gather of so many tokens does. Each group of
# `kv_cache.common_pages` spares at least so many.
MIN_SPARED_TOKENS = 512
# On a GPU that costs a launch more, about 3 µs a layer: the time in which an H100 reads so many
# tokens of Llama-3-8B. By estimate: not measured yet.
MIN_SPARED_TOKENS_GPU = 2048


def padded_groups(lengths: Sequence[float]) -> list[list[int]]:
    """The sequences that are gathered together, by their places in `lengths`, longest first."""
    groups: list[list[int]] = []
    longest = 0.0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if not groups or _is_apart(length, longest):
            groups.append([])
            longest = length
        groups[-1].append(index)
    return groups


def padded_tokens(lengths: Sequence[float]) -> float:
    """Tokens that a step reads: each sequence as many as the longest of its group.

    A further group counts as the tokens that take as long.
    """
    read, longest, num_groups = 0.0, 0.0, 0
    for length in sorted(lengths, reverse=True):
        if not num_groups or _is_apart(length, longest):
            longest, num_groups = length, num_groups + 1
        read += longest
    return read + _GROUP_TOKENS * max(0, num_groups - 1)


def joined_tokens(
    lengths: Sequence[float], shared: Sequence[float], *, padded: bool = True
) -> float:
    """Tokens that a step reads of sequences that begin alike: what they share once for all.

    Args:
        lengths: tokens of each sequence.
        shared: of these, those that it shares. Where they are not equally many, the mean is read.
        padded: as `padded_tokens` on CPUs; on a GPU each sequence is read as long as it is.
    """
    least = MIN_SPARED_TOKENS if padded else MIN_SPARED_TOKENS_GPU
    read = padded_tokens if padded else sum
    common = sum(shared) / len(shared)
    if (len(shared) - 1) * common < least:
        return read(lengths)
    own = [length - part for length, part in zip(lengths, shared, strict=True)]
    return read(own) + common


def _is_apart(length: float, longest: float) -> bool:
    """Whether a sequence is too short for the group of the longest one."""
    return 2 * length < longest and length + _MAX_PADDING_TOKENS < longest
