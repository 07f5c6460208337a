"""The table of sampling options: ranges, defaults, and which operations a request needs."""

from __future__ import annotations

import math

import pytest

from mpipipe.config.schema import GenerationConfig
from mpipipe.sampling_options import OPTION_NAMES, OPTIONS, SamplingNeeds
from mpipipe.types import SamplingParams


def test_a_run_and_a_request_have_the_same_options_and_defaults() -> None:
    run, request = GenerationConfig(), SamplingParams()
    for name in OPTION_NAMES:
        assert getattr(run, name) == getattr(request, name), name


def test_defaults_are_allowed_and_need_no_operation() -> None:
    for name, option in OPTIONS.items():
        assert option.allows(option.default), name
    assert SamplingParams().needs == SamplingNeeds.NOTHING


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
@pytest.mark.parametrize("value", [-2, -0.5, 0.0, 2.0])
def test_penalties_on_counts_reach_from_minus_two_to_two(name: str, value: float) -> None:
    needs = SamplingParams().replace(**{name: value}).needs
    assert needs == (SamplingNeeds.COUNTS if value else SamplingNeeds.NOTHING)


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
@pytest.mark.parametrize("value", [-2.0001, 2.0001, math.inf, math.nan])
def test_beyond_that_the_error_names_option_value_and_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} = .* it must be from -2 to 2$"):
        SamplingParams().replace(**{name: value})


def test_every_option_that_needs_an_operation_says_so() -> None:
    drawing = SamplingParams(temperature=1.0)
    for change, wanted in (
        ({"temperature": 0.5}, SamplingNeeds.DRAW),
        ({"top_k": 3}, SamplingNeeds.DRAWING),
        ({"top_p": 0.5}, SamplingNeeds.DRAWING),
        ({"min_p": 0.1}, SamplingNeeds.DRAWING),
        ({"repetition_penalty": 1.1}, SamplingNeeds.DRAW | SamplingNeeds.SEEN),
        ({"frequency_penalty": 0.1}, SamplingNeeds.DRAW | SamplingNeeds.COUNTS),
        ({"presence_penalty": 0.1}, SamplingNeeds.DRAW | SamplingNeeds.COUNTS),
        ({"num_logprobs": 3}, SamplingNeeds.DRAW),
    ):
        assert drawing.replace(**change).needs == wanted
        greedy = drawing.replace(**(change | {"temperature": 1e-9}))
        assert greedy.needs == wanted & SamplingNeeds.HISTORY
