"""What stage 0 does for a step, in calls of functions: their number hardly varies, time does."""

from __future__ import annotations

from tests.benchmarks.first_stage import Load, calls_per_step, profiled

_FEW, _MANY = 8, 64  # rows of a slot


def test_one_more_row_costs_a_step_few_calls() -> None:
    few, many = (calls_per_step(Load(rows, input_tokens=32)) for rows in (_FEW, _MANY))
    # 3.5; 5.0 where page tables and the times of tokens were treated row by row.
    assert (many - few) / (_MANY - _FEW) < 4.2


def test_a_step_records_four_events_and_copies_only_page_tables_when_a_page_is_added() -> None:
    stage, stats = profiled(Load(_FEW, input_tokens=32))
    calls = {name: entry[1] for (_, _, name), entry in stats.stats.items()}
    assert calls["record_event"] / stage.num_steps < 4.2
    num_whole = calls["_regroup"]  # of these both arrays are uploaded, of the others one
    assert calls["upload_into"] == 2 * num_whole + calls["_add_pages"]
