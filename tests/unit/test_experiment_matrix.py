"""Which cases an experiment has, in which order they are launched, and what may not change."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from mpipipe.errors import ConfigError
from mpipipe.experiments.matrix import differences, launch_order, make_cases
from mpipipe.experiments.record import Case
from tests.unit.experiment_records import a_matrix, options_of


def setting(case: Case, name: str) -> str:
    (value,) = (
        word.partition("=")[2] for word in case.words if word.startswith(f"pipeline.{name}=")
    )
    return value


def shape(case: Case) -> tuple[Any, ...]:
    slots, per_slot = setting(case, "num_slots"), setting(case, "max_sequences_per_slot")
    return case.name, case.batch, case.num_prompts, slots, per_slot


def test_strong_scaling_has_two_arms_over_the_same_prompts() -> None:
    cases = make_cases(options_of("strong", stages=(1, 2, 4), batches=(4,)), 16)
    assert [shape(case) for case in cases] == [
        ("memory-filling_n1", 4, 16, "1", "4"),
        ("memory-filling_n2", 8, 16, "2", "4"),
        ("memory-filling_n4", 16, 16, "4", "4"),
        ("fixed-total_n1", 4, 16, "1", "4"),
        ("fixed-total_n2", 4, 16, "2", "2"),
        ("fixed-total_n4", 4, 16, "4", "1"),
    ]
    assert [setting(case, "num_stages") for case in cases] == ["1", "2", "4"] * 2


def test_without_a_batch_the_plan_fills_memory() -> None:
    cases = make_cases(options_of("strong"), 100)
    assert shape(cases[1]) == ("memory-filling_n2", None, 100, "auto", "auto")
    assert shape(cases[3]) == ("fixed-total_n2", 32, 100, "2", "16")


def test_weak_scaling_keeps_the_work_of_a_stage() -> None:
    cases = make_cases(options_of("weak", stages=(1, 2, 4), num_prompts=5, batches=(5,)), 20)
    assert [shape(case) for case in cases] == [
        ("weak_n1", 5, 5, "1", "5"),
        ("weak_n2", 10, 10, "2", "5"),
        ("weak_n4", 20, 20, "4", "5"),
    ]
    of_a_file = make_cases(options_of("weak", stages=(1, 3)), 11)
    assert [(case.num_prompts, case.batch) for case in of_a_file] == [(3, 3), (9, 9)]


def test_the_batch_sweep_varies_the_batch_alone() -> None:
    cases = make_cases(options_of("batch", stages=(2,), batches=(8, 1, 4)), 8)
    assert [shape(case) for case in cases] == [
        ("batch_1", 1, 8, "1", "1"),
        ("batch_4", 4, 8, "2", "2"),
        ("batch_8", 8, 8, "2", "4"),
    ]
    assert [case.batch for case in make_cases(options_of("batch"), 20)] == [1, 2, 4, 8, 16]


def test_the_same_stages_on_other_nodes_are_other_cases() -> None:
    cases = make_cases(options_of("weak", stages=(2, 2), nodes=(1, 2), num_prompts=1), 2)
    assert [(case.name, case.num_nodes) for case in cases] == [
        ("weak_n2_on1", 1),
        ("weak_n2_on2", 2),
    ]


def test_every_case_may_have_replicas_and_lanes() -> None:
    options = options_of("strong", stages=(1, 2), batches=(4,), replicas=2, lanes=3)
    cases = make_cases(options, 32)
    assert [shape(case) for case in cases] == [
        ("memory-filling_n1", 8, 32, "1", "4"),
        ("memory-filling_n2", 16, 32, "2", "4"),
        ("fixed-total_n1", 4, 32, "1", "2"),
        ("fixed-total_n2", 4, 32, "2", "1"),
    ]
    assert [case.num_ranks for case in cases] == [6, 12] * 2
    assert {setting(case, "replicas") for case in cases} == {"2"}
    assert {setting(case, "tensor_parallel") for case in cases} == {"3"}
    weak = make_cases(options_of("weak", replicas=2, num_prompts=3), 12)
    assert [(case.num_prompts, case.batch) for case in weak] == [(6, 6), (12, 12)]
    with pytest.raises(ConfigError, match="needs 12 prompts, and there are 11"):
        make_cases(options_of("weak", replicas=2, num_prompts=3), 11)


def test_arrangements_are_the_same_work_on_the_same_ranks() -> None:
    cuts = ((1, 4, 1), (2, 1, 2), (4, 1, 1))
    options = options_of("arrangements", arrangements=cuts, nodes=(1, 1, 1), batches=(16,))
    cases = make_cases(options, 32)
    assert [shape(case) for case in cases] == [
        ("r1_n4_t1", 16, 32, "4", "4"),
        ("r2_n1_t2", 16, 32, "1", "8"),
        ("r4_n1_t1", 16, 32, "1", "4"),
    ]
    assert [case.num_ranks for case in cases] == [4, 4, 4]
    assert [case.arrangement for case in cases] == ["1 × 4 × 1", "2 × 1 × 2", "4 × 1 × 1"]
    assert [setting(case, "replicas") for case in cases] == ["1", "2", "4"]


def test_all_prompts_at_once_need_not_fill_the_slots_equally() -> None:
    (case,) = make_cases(options_of("batch", stages=(4,), batches=(5,)), 5)
    assert shape(case) == ("batch_5", 5, 5, "4", "2")


@pytest.mark.parametrize(
    ("options", "num_prompts", "words"),
    [
        (options_of("strong", nodes=(1, 1, 1)), 8, "--nodes has 3 numbers and --stages 2"),
        (options_of("strong", nodes=(2, 2)), 8, "1 stages cannot be spread over 2 nodes"),
        (options_of("weak", num_prompts=5), 8, "needs 10 prompts, and there are 8"),
        (options_of("batch", batches=(16,)), 8, "a batch of 16 needs as many prompts"),
        (options_of("strong", batches=(8,)), 8, "a batch of 16 needs as many prompts"),
        (options_of("batch", stages=(3,), batches=(4,)), 8, "choose a multiple of 3"),
        (options_of("batch", stages=(1, 2)), 8, "run it once for each"),
        (
            options_of("batch", stages=(2,), batches=(4,), replicas=3, lanes=2),
            8,
            "one for each of 3 replicas of 2 stages of 2 lanes: choose a multiple of 3",
        ),
        (options_of("weak", batches=(1, 2)), 8, "the batch experiment varies it"),
        (options_of("batch", batches=(2, 2)), 8, "batch_2 is asked for twice"),
        (options_of("weak", stages=(1, 9)), 8, "too few for 9 stages"),
    ],
)
def test_what_cannot_be_compared_is_refused(options: Any, num_prompts: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_cases(options, num_prompts)


def test_every_repeat_has_every_case_once_in_an_order_of_its_own() -> None:
    cases = a_matrix("batch", batches=(1, 2, 4, 8)).cases
    order = launch_order(cases, 5, seed=0)
    blocks = [order[first : first + 4] for first in range(0, 20, 4)]
    for number, block in enumerate(blocks, 1):
        assert {slot.repeat for slot in block} == {number}
        assert Counter(slot.case for slot in block) == Counter(case.name for case in cases)
    assert len({tuple(slot.case for slot in block) for block in blocks}) > 1
    assert launch_order(cases, 5, seed=0) == order
    assert launch_order(cases, 5, seed=1) != order


def test_a_change_is_named() -> None:
    matrix = a_matrix("batch", batches=(1, 2))
    assert differences(matrix, matrix) == []
    assert differences(matrix, a_matrix("batch", batches=(1, 4))) == [
        "cases: batch_1, batch_2 → batch_1, batch_4",
        "batches: 1, 2 → 1, 4",
    ]
    changed = dataclasses.replace(matrix, settings={**matrix.settings, "model.path": "other"})
    assert differences(matrix, changed) == ["model.path: m → other"]
    assert differences(matrix, a_matrix("batch", batches=(1, 2), repeat=3)) == ["repeats: 5 → 3"]
    assert differences(matrix, dataclasses.replace(matrix, command=("elsewhere",))) == []
    case = dataclasses.replace(matrix.cases[0], words=("log.progress=bar",))
    assert differences(matrix, dataclasses.replace(matrix, cases=(case, matrix.cases[1]))) == [
        "the case batch_1"
    ]
