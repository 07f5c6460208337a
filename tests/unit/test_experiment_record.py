"""The records of an experiment: what is written is what is read, and nothing else is."""

from __future__ import annotations

import json

import pytest

from mpipipe.experiments.record import Matrix, Record
from mpipipe.plain_values import from_json, to_json
from tests.unit.experiment_records import a_matrix, a_record

MATRIX = a_matrix("strong", batches=(4,))
RECORD = a_record(MATRIX, MATRIX.cases[0], 3, 30.0)


def test_a_record_and_a_matrix_come_back_as_they_were_written() -> None:
    assert Record.from_json(RECORD.to_json()) == RECORD
    assert RECORD.name == "memory-filling_n1_r3"
    assert from_json(Matrix, to_json(MATRIX)) == MATRIX


def test_only_a_run_that_succeeded_has_a_throughput() -> None:
    assert RECORD.tokens_per_s == 30.0
    for without in ({"outcome": "timeout"}, {"metrics": None}):
        assert a_record(MATRIX, MATRIX.cases[0], 3, 30.0, **without).tokens_per_s is None


@pytest.mark.parametrize(
    ("field", "value"), [("outcome", "fine"), ("flags", ["slow"]), ("wall_s", "long"), ("new", 1)]
)
def test_what_is_no_record_is_refused_by_name(field: str, value: object) -> None:
    plain = json.loads(RECORD.to_json())
    with pytest.raises(ValueError, match=r"fine|slow|long|Record cannot be made"):
        Record.from_json(json.dumps({**plain, field: value}))
