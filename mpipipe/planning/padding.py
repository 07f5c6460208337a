"""How attention that gathers keys pads a decode step of sequences of unlike lengths. Pure.

`models/attention/sdpa.py` gathers by these groups, and forecasts count what it reads.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["padded_groups", "padded_tokens"]

# A sequence shares a gather with one up to twice as long, or up to this many tokens longer: the
# fixed cost of one more group (about 60 µs a layer) buys the gather of about 200 tokens.
_MAX_PADDING_TOKENS = 128
_GROUP_TOKENS = 200


def padded_groups(lengths: Sequence[float]) -> list[list[int]]:
    """The sequences that are gathered together, by their places in `lengths`, longest first."""
    groups: list[list[int]] = []
    longest = 0.0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if not groups or (2 * length < longest and length + _MAX_PADDING_TOKENS < longest):
            groups.append([])
            longest = length
        groups[-1].append(index)
    return groups


def padded_tokens(lengths: Sequence[float]) -> float:
    """Tokens that a step reads: each sequence as many as the longest of its group.

    A further group counts as the tokens that take as long.
    """
    groups = padded_groups(lengths)
    read = sum(len(group) * lengths[group[0]] for group in groups)
    return read + _GROUP_TOKENS * max(0, len(groups) - 1)
