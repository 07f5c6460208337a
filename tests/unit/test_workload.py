"""What a run's requests ask of the sampler, all together."""

from __future__ import annotations

from mpipipe.planning.workload import SamplingUse
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.types import SamplingParams

GREEDY = SamplingParams()
DRAWN = SamplingParams(temperature=1.0)
FILTERED = SamplingParams(temperature=1.0, top_p=0.5)
PENALISED = SamplingParams(repetition_penalty=1.1)
COUNTED = SamplingParams(presence_penalty=-0.5)
LISTED = SamplingParams(num_logprobs=0)

NOTHING = (SamplingNeeds.NOTHING, False)


def test_the_use_of_a_run_is_the_union_over_its_requests() -> None:
    assert SamplingUse.of([GREEDY, GREEDY]) == SamplingUse()
    assert SamplingUse.of([DRAWN, GREEDY]) == SamplingUse(SamplingNeeds.DRAW)
    assert SamplingUse.of([FILTERED, PENALISED, LISTED]) == SamplingUse(
        SamplingNeeds.DRAWING | SamplingNeeds.SEEN, logprobs=True, plain=False
    )
    assert SamplingUse.of([COUNTED]) == SamplingUse(SamplingNeeds.COUNTS, plain=False)
    assert SamplingUse.of([GREEDY.replace(top_k=4)]) == SamplingUse()  # a filter of a greedy one


def test_a_seed_of_its_own_makes_no_prompt_another_kind() -> None:
    seeded = [kind.replace(seed=seed) for seed in range(9) for kind in (GREEDY, DRAWN)]
    assert SamplingUse.of(seeded) == SamplingUse(SamplingNeeds.DRAW)
    assert SamplingUse.of([GREEDY.replace(seed=7)]) == SamplingUse()


def test_one_kind_of_step_serves_all_and_a_second_one_the_plain_requests() -> None:
    assert SamplingUse.of([GREEDY]).kinds == (NOTHING,)
    drawn = (SamplingNeeds.DRAW, False)
    assert SamplingUse.of([DRAWN]).kinds == (drawn,)
    assert SamplingUse.of([GREEDY, DRAWN]).kinds == (drawn, NOTHING)
    assert SamplingUse.of([LISTED, DRAWN]).kinds == ((SamplingNeeds.DRAW, True),)
    assert SamplingUse.of([LISTED, GREEDY]).kinds == ((SamplingNeeds.NOTHING, True), NOTHING)


def test_only_plain_requests_need_nothing() -> None:
    assert SamplingUse.of([GREEDY]).is_plain
    for sampling in (DRAWN, PENALISED, COUNTED, LISTED):
        assert not SamplingUse.of([sampling, GREEDY]).is_plain
