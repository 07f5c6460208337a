"""Median, interval and ratio of a few repeats."""

from __future__ import annotations

import itertools

import pytest

from mpipipe.experiments.statistics import paired_ratio, spread_of


def test_five_repeats_give_their_range_with_94_percent() -> None:
    spread = spread_of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert spread is not None
    assert (spread.num, spread.median, spread.low, spread.high) == (5, 3.0, 1.0, 5.0)
    assert spread.coverage == pytest.approx(0.9375)
    assert spread.is_sound
    assert spread.cv == pytest.approx(1.5811 / 3, abs=1e-4)


def test_more_repeats_give_a_narrower_interval() -> None:
    spread = spread_of([float(value) for value in range(1, 12)])
    assert spread is not None
    assert (spread.low, spread.high) == (3.0, 9.0)  # a third one would leave 88.2 %
    assert spread.coverage == pytest.approx(1 - 2 * (1 + 11 + 55) / 2**11)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Exactly, for the signs of five draws around the true median."""
    inside = 0
    for signs in itertools.product((-1.0, 1.0), repeat=5):
        spread = spread_of([sign * (1 + place) for place, sign in enumerate(signs)])
        assert spread is not None
        inside += spread.low <= 0 <= spread.high
    assert inside / 2**5 == pytest.approx(0.9375)


def test_too_few_repeats_are_no_ground_for_a_verdict() -> None:
    assert spread_of([]) is None
    single = spread_of([2.0])
    assert single is not None
    assert (single.cv, single.coverage, single.is_sound) == (None, 0.0, False)
    four = spread_of([2.0, 3.0, 4.0, 5.0])
    assert four is not None
    assert not four.is_sound
    assert not four.is_above(1.0)
    assert not four.is_below(9.0)


def test_a_machine_that_slows_down_cancels_out_of_the_paired_ratio() -> None:
    base = {1: 100.0, 2: 50.0, 3: 80.0, 4: 100.0, 5: 60.0}
    ratio = paired_ratio({repeat: 1.5 * speed for repeat, speed in base.items()}, base)
    assert ratio is not None
    assert ratio.low == ratio.high == pytest.approx(1.5)
    assert ratio.is_above(1.4)
    assert not ratio.is_below(1.4)


def test_only_repeats_that_both_have_are_compared() -> None:
    assert paired_ratio({1: 1.0}, {2: 1.0}) is None
    ratio = paired_ratio({1: 2.0, 2: 9.0}, {1: 1.0, 2: 0.0})
    assert ratio is not None
    assert (ratio.num, ratio.median) == (1, 2.0)
