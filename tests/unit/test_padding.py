"""Which sequences of a decode step are gathered together, and what that reads."""

from __future__ import annotations

from mpipipe.planning.padding import padded_groups, padded_tokens


def test_sequences_up_to_twice_as_long_share_a_gather() -> None:
    assert padded_groups([982, 364, 130, 700, 556, 502]) == [[0, 3, 4, 5], [1], [2]]
    assert padded_groups([100, 200, 150]) == [[1, 2, 0]]
    assert padded_groups([5]) == [[0]]


def test_short_ones_share_it_with_those_little_longer() -> None:
    assert padded_groups([4, 132]) == [[1, 0]]
    assert padded_groups([4, 133]) == [[1], [0]]


def test_each_is_read_as_far_as_the_longest_and_a_group_more_costs_a_gather() -> None:
    assert padded_tokens([100, 100]) == 200
    assert padded_tokens([982, 364, 130, 700, 556, 502]) == 4 * 982 + 364 + 130 + 2 * 200
