from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpipipe.errors import PlanError
from mpipipe.planning.partition import check_split, split_layers, stage_costs


def every_split(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    borders = combinations(range(1, num_layers), num_stages - 1)
    edges = [(0, *inner, num_layers) for inner in borders]
    return [tuple(b - a for a, b in pairwise(e)) for e in edges]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    num_layers=st.integers(1, 10),
    num_stages=st.integers(1, 5),
    last_extra=st.floats(0, 12),
)
def test_no_split_has_a_faster_slowest_stage(
    num_layers: int, num_stages: int, last_extra: float
) -> None:
    num_stages = min(num_stages, num_layers)
    split = split_layers(num_layers, num_stages, last_extra=last_extra)
    assert check_split(split, num_layers=num_layers, num_stages=num_stages) == split
    splits = every_split(num_layers, num_stages)
    best = min(max(stage_costs(s, last_extra=last_extra)) for s in splits)
    assert max(stage_costs(split, last_extra=last_extra)) == pytest.approx(best)


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "last_extra", "split"),
    [
        (30, 1, 6.0, (30,)),
        (30, 2, 0.0, (15, 15)),
        (30, 2, 6.0, (18, 12)),
        (30, 3, 6.0, (12, 12, 6)),
        (10, 4, 0.0, (2, 3, 3, 2)),  # what is left over goes to inner stages first
        (7, 2, 0.0, (3, 4)),  # the first stage also schedules
        (4, 4, 50.0, (1, 1, 1, 1)),
        (1, 1, 0.0, (1,)),
    ],
)
def test_splits_of_known_cases(
    num_layers: int, num_stages: int, last_extra: float, split: tuple[int, ...]
) -> None:
    assert split_layers(num_layers, num_stages, last_extra=last_extra) == split


def test_costs_count_the_extra_of_the_last_stage() -> None:
    assert stage_costs((2, 3), last_extra=5.0) == [2.0, 8.0]
    assert stage_costs((4,), last_extra=5.0) == [9.0]


def test_more_stages_than_layers_is_one_sentence_with_both_numbers() -> None:
    with pytest.raises(PlanError, match=r"5 stages .* more than the 4 layers.*at most 4 ranks"):
        split_layers(4, 5)


def test_a_model_without_layers_and_a_pipeline_without_stages_are_refused() -> None:
    with pytest.raises(PlanError, match="the model has 0 layers"):
        split_layers(0, 1)
    with pytest.raises(PlanError, match="0 stages"):
        split_layers(4, 0)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((14, 15), r"\[14, 15\] adds up to 29 layers, but the model has 30"),
        ((10, 10, 10), r"has 3 entries for 2 stages.*start 3 ranks"),
        ((30, 0), r"\[30, 0\] leaves a stage without layers"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(split: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_split(split, num_layers=30, num_stages=2)
