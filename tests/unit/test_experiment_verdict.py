"""What records say: speedups and knees beyond the noise only, and validity before speed."""

from __future__ import annotations

import dataclasses

import pytest

from mpipipe.experiments.record import Record
from mpipipe.experiments.verdict import judge, with_token_flags
from tests.unit.experiment_records import a_matrix, an_experiment

STRONG = a_matrix("strong", batches=(4,))
BATCH = a_matrix("batch", batches=(1, 2, 4, 8))
SAME = [10.0, 10.1, 9.9, 10.0, 10.2]


def scaled(factor: float) -> list[float]:
    return [factor * speed for speed in SAME]


def strong(filling: list[float], total: list[float]) -> list[Record]:
    speeds = {"memory-filling_n1": SAME, "fixed-total_n1": SAME}
    return an_experiment(STRONG, {**speeds, "memory-filling_n2": filling, "fixed-total_n2": total})


def test_each_arm_is_compared_with_its_own_smallest_case() -> None:
    verdict = judge(STRONG, strong(scaled(1.8), [10.0, 10.3, 9.6, 10.1, 9.9]))
    base, filling, _, total = verdict.cases
    assert base.speedup is None
    assert base.speed is not None
    assert base.speed.median == 10.0
    assert filling.speedup is not None
    assert filling.speedup.median == pytest.approx(1.8)
    assert filling.efficiency == pytest.approx(0.9)
    assert filling.ceiling_speedup == pytest.approx(2.0)
    assert total.speedup is not None
    assert verdict.is_sound
    assert any("memory-filling_n2: 1.80×" in note and "faster" in note for note in verdict.notes)
    assert any("fixed-total_n2" in note and "no difference" in note for note in verdict.notes)


def test_arrangements_are_compared_with_the_plain_pipeline_and_the_fastest_is_named() -> None:
    cuts = ((1, 2, 1), (1, 1, 2), (2, 1, 1))
    matrix = a_matrix("arrangements", arrangements=cuts, nodes=(1, 1, 1))
    speeds = {"r1_n2_t1": SAME, "r1_n1_t2": scaled(0.5), "r2_n1_t1": scaled(1.5)}
    verdict = judge(matrix, an_experiment(matrix, speeds))
    assert [case.base for case in verdict.cases] == [None, "r1_n2_t1", "r1_n2_t1"]
    assert verdict.best is not None
    assert verdict.best.case.name == "r2_n1_t1"
    assert verdict.cases[2].efficiency == pytest.approx(1.5)
    assert any("r1_n1_t2: 0.50× r1_n2_t1" in note and "slower" in note for note in verdict.notes)
    assert verdict.notes[-1] == (
        "r2_n1_t1 (replicas × stages × lanes: 2 × 1 × 1) had the highest throughput: 15.0 tokens/s."
    )
    partly = judge(matrix, an_experiment(matrix, speeds)[:-1])
    assert not any("highest" in note for note in partly.notes)


def test_replicas_and_lanes_are_ranks_that_a_speedup_is_measured_by() -> None:
    matrix = a_matrix("weak", stages=(1, 2), replicas=2, lanes=2)
    records = an_experiment(matrix, {"weak_n1": SAME, "weak_n2": scaled(1.8)})
    assert judge(matrix, records).cases[1].efficiency == pytest.approx(0.9)


def test_two_repeats_are_no_verdict() -> None:
    matrix = a_matrix("strong", batches=(4,), repeat=2)
    speeds = {case.name: [10.0 * case.num_stages] * 2 for case in matrix.cases}
    verdict = judge(matrix, an_experiment(matrix, speeds))
    assert any("no verdict: 2 repeats are too few" in note for note in verdict.notes)
    assert not any("faster" in note for note in verdict.notes)


def test_other_tokens_come_before_speed() -> None:
    records = strong(scaled(2), SAME)
    place = next(i for i, record in enumerate(records) if record.name == "memory-filling_n2_r4")
    records[place] = dataclasses.replace(records[place], tokens_hash="different")
    flags = with_token_flags(records)
    assert [name for name, found in flags.items() if found] == ["memory-filling_n2_r4"]
    verdict = judge(STRONG, records)
    assert not verdict.is_sound
    assert verdict.cases[1].flags == ("other tokens",)
    assert not verdict.cases[1].is_valid
    assert any("different tokens" in note for note in verdict.notes)
    assert not any("memory-filling_n2" in note and "faster" in note for note in verdict.notes)


def test_cases_that_differ_in_their_tokens_are_told() -> None:
    records = [
        dataclasses.replace(record, tokens_hash=record.case.arm) for record in strong(SAME, SAME)
    ]
    verdict = judge(STRONG, records)
    assert verdict.is_sound
    assert any("other tokens than others" in note for note in verdict.notes)


def test_code_that_changed_between_the_runs_is_told() -> None:
    records = strong(SAME, SAME)
    assert not any("commits" in note for note in judge(STRONG, records).notes)
    records = [dataclasses.replace(record, commit=record.name[-1] * 40) for record in records]
    (told,) = (note for note in judge(STRONG, records).notes if "commits" in note)
    assert "(commits 1111111111, 2222222222, 3333333333" in told


def test_a_cell_without_a_result_is_not_sound() -> None:
    records = strong(SAME, SAME)
    verdict = judge(STRONG, records[:-1])
    assert verdict.num_missing == 1
    assert not verdict.is_sound
    last = verdict.cases[-1]
    assert (last.outcome, last.num_ok) == (None, 4)
    failed = dataclasses.replace(records[-1], outcome="timeout", reason="600 s", tokens_hash=None)
    verdict = judge(STRONG, [*records[:-1], failed])
    assert (verdict.num_missing, verdict.is_sound) == (0, False)
    assert (verdict.cases[-1].outcome, verdict.cases[-1].reason) == ("timeout", "600 s")
    assert verdict.cases[-1].speed is not None
    assert verdict.cases[-1].speed.num == 4


def test_a_base_without_valid_runs_gives_no_verdict_on_the_others() -> None:
    records = strong(scaled(2), scaled(2))
    base = [record.name for record in records].index("fixed-total_n1_r3")
    others = dataclasses.replace(records[base], tokens_hash="different")
    for changed in ([*records[:base], others, *records[base + 1 :]], records[:base]):
        kept = [*changed, *(record for record in records if record.case.name == "fixed-total_n2")]
        verdict = judge(STRONG, list({record.name: record for record in kept}.values()))
        small, total = verdict.cases[2:]
        assert (small.base, total.base) == (None, "fixed-total_n1")
        assert (small.is_comparable, total.is_valid, total.is_comparable) == (False, True, False)
        (note,) = (note for note in verdict.notes if note.startswith("fixed-total_n2"))
        assert "no verdict: fixed-total_n1" in note
    assert all(case.is_comparable for case in judge(STRONG, records).cases)


def sweep(*factors: float) -> list[Record]:
    speeds = {case.name: scaled(factor) for case, factor in zip(BATCH.cases, factors, strict=False)}
    return an_experiment(BATCH, speeds)


def test_the_knee_is_where_a_doubling_gains_little() -> None:
    verdict = judge(BATCH, sweep(1, 1.8, 3.0, 3.1))
    assert (verdict.knee, verdict.largest_safe_batch) == (4, 8)
    assert verdict.best is not None
    assert verdict.best.case.batch == 4
    assert verdict.notes[-1].startswith("The knee is at batch 4")
    assert verdict.cases[2].efficiency == pytest.approx(3 / 4)  # over the ratio of batches


def test_a_sweep_that_still_grows_has_no_knee() -> None:
    verdict = judge(BATCH, sweep(1, 1.9, 3.6, 6.5))
    assert verdict.knee is None
    assert verdict.best is not None
    assert verdict.best.case.batch == 8
    assert "still grows at batch 8" in verdict.notes[-1]


def test_a_gain_after_a_flat_doubling_moves_the_knee_behind_it() -> None:
    assert judge(BATCH, sweep(1, 1.05, 4, 8)).knee is None
    verdict = judge(BATCH, sweep(1, 1.05, 4, 4.1))
    assert (verdict.knee, verdict.best and verdict.best.case.batch) == (4, 4)
    assert judge(BATCH, sweep(1, 1.05, 1.06, 1.07)).knee == 1


def without(records: list[Record], batch: int, **changes: str | None) -> list[Record]:
    return [
        dataclasses.replace(record, **changes) if record.case.batch == batch else record  # type: ignore[arg-type]
        for record in records
    ]


def test_a_batch_above_one_that_failed_is_neither_knee_nor_best() -> None:
    failure = {"outcome": "out_of_memory", "reason": "CUDA", "tokens_hash": None}
    verdict = judge(BATCH, without(sweep(1, 1.9, 3, 9), 4, **failure))
    assert (verdict.knee, verdict.largest_safe_batch) == (None, 2)
    assert verdict.best is not None
    assert verdict.best.case.batch == 2
    assert "still grows at batch 2, the largest that is safe" in verdict.notes[-1]
    assert judge(BATCH, without(sweep(1, 1.9, 2, 9), 1, **failure)).best is None


def test_a_batch_without_valid_runs_hides_its_gains() -> None:
    records = sweep(1, 1.02, 1.03, 1.04)
    (odd,) = (record for record in records if record.name == "batch_4_r2")
    records[records.index(odd)] = dataclasses.replace(odd, tokens_hash="different")
    verdict = judge(BATCH, records)
    assert verdict.knee is None
    assert "No knee is shown" in verdict.notes[-1]


def test_a_sweep_that_has_not_ended_has_no_knee_yet() -> None:
    verdict = judge(BATCH, sweep(1, 1.02, 1.03))
    assert verdict.knee is None
    assert verdict.notes[-1].startswith("No knee yet")


def test_noise_shows_no_knee() -> None:
    noisy = [9.0, 13.0, 10.0, 12.0, 11.0]
    speeds = {case.name: scaled(2**place) for place, case in enumerate(BATCH.cases[:3])}
    records = an_experiment(BATCH, {**speeds, "batch_8": [4 * value for value in noisy]})
    verdict = judge(BATCH, records)
    assert verdict.knee is None
    assert "beyond the noise" in verdict.notes[-1]


def test_a_gain_is_judged_per_doubling() -> None:
    matrix = a_matrix("batch", batches=(1, 8))
    records = an_experiment(matrix, {"batch_1": SAME, "batch_8": scaled(1.2)})
    verdict = judge(matrix, records)
    assert verdict.knee == 1
    assert "gives 1.06×" in verdict.notes[-1]  # the third root of 1.2


def test_the_largest_safe_batch_is_below_the_first_that_failed() -> None:
    records = [
        dataclasses.replace(
            record, outcome="out_of_memory", reason="CUDA out of memory", tokens_hash=None
        )
        if record.case.batch == 4
        else record
        for record in sweep(1, 1.9, 3.6, 6.5)
    ]
    verdict = judge(BATCH, records)
    assert verdict.largest_safe_batch == 2
    assert not verdict.is_sound
    assert any("batch_4: out_of_memory: CUDA out of memory" in note for note in verdict.notes)


def test_joules_per_token_where_the_card_tells() -> None:
    records = [dataclasses.replace(record, energy_j=256.0) for record in sweep(1, 2, 3, 4)]
    assert judge(BATCH, records).cases[0].joules_per_token == 2.0
    assert judge(BATCH, sweep(1, 2, 3, 4)).cases[0].joules_per_token is None


def test_memory_that_is_not_filled_is_told() -> None:
    matrix = a_matrix("strong", num_prompts=8)
    speeds = {case.name: SAME for case in matrix.cases}
    records = [
        dataclasses.replace(record, num_places=32 * record.case.num_stages)
        for record in an_experiment(matrix, speeds)
    ]
    notes = judge(matrix, records).notes
    assert any("memory holds 64 prompts at once, and there are 8" in note for note in notes)
