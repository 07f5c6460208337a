"""What a run's requests ask of the sampler, all together."""

from __future__ import annotations

from mpipipe.planning.sampling_use import SamplingNeeds, SamplingUse
from mpipipe.types import SamplingParams

GREEDY = SamplingParams()
DRAWN = SamplingParams(temperature=1.0)
FILTERED = SamplingParams(temperature=1.0, top_p=0.5)
PENALISED = SamplingParams(repetition_penalty=1.1)
LISTED = SamplingParams(num_logprobs=0)

NOTHING = (SamplingNeeds(), False)


def test_the_use_of_a_run_is_the_union_over_its_requests() -> None:
    assert SamplingUse.of([GREEDY, GREEDY]) == SamplingUse()
    assert SamplingUse.of([DRAWN, GREEDY]) == SamplingUse(SamplingNeeds(draw=True))
    assert SamplingUse.of([FILTERED, PENALISED, LISTED]) == SamplingUse(
        SamplingNeeds(True, True, True), logprobs=True, plain=False
    )
    assert SamplingUse.of([GREEDY.replace(top_k=4)]) == SamplingUse()  # a filter of a greedy one


def test_one_kind_of_step_serves_all_and_a_second_one_the_plain_requests() -> None:
    assert SamplingUse.of([GREEDY]).kinds == (NOTHING,)
    drawn = (SamplingNeeds(draw=True), False)
    assert SamplingUse.of([DRAWN]).kinds == (drawn,)
    assert SamplingUse.of([GREEDY, DRAWN]).kinds == (drawn, NOTHING)
    assert SamplingUse.of([LISTED, DRAWN]).kinds == ((SamplingNeeds(draw=True), True),)
    assert SamplingUse.of([LISTED, GREEDY]).kinds == ((SamplingNeeds(), True), NOTHING)


def test_only_plain_requests_need_nothing() -> None:
    assert SamplingUse.of([GREEDY]).is_plain
    for sampling in (DRAWN, PENALISED, LISTED):
        assert not SamplingUse.of([sampling, GREEDY]).is_plain
