"""The records of an experiment: what is written is what is read, and nothing else is."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mpipipe.experiments.record import SCHEMA, Case, Ceiling, ProgressSample, Record

CASE = Case("fixed-total_2", "fixed-total", 2, 1, 1, 4, 8, ("pipeline.num_slots=2",))


def a_record(**changes: object) -> Record:
    record = Record(
        schema=SCHEMA,
        experiment="strong",
        case=CASE,
        repeat=3,
        order=7,
        seed=0,
        command=("mpirun", "-n", "2", "mpipipe", "run", "c.toml"),
        config_hash="0123456789ab",
        commit=None,
        versions={"torch": "2.13"},
        hosts=("a", "a"),
        gpus=(),
        started="2026-01-01T00:00:00+00:00",
        outcome="ok",
        reason="",
        exit_code=0,
        wall_s=12.5,
        metrics={"output_tokens_per_s": 30.0, "ranks": [{"rank": 0}]},
        samples=(ProgressSample(0.0, 0), ProgressSample(5.0, 150)),
        tokens_hash="ab",
        flags=("throttled",),
        energy_j=None,
        ceiling=Ceiling(None, 40.0, "two stages"),
        num_places=4,
        sm_clock_mhz=None,
        cpu_percent=99.5,
        gpu_percent=None,
        run_folder="runs/fixed-total_2_r3",
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def test_a_record_comes_back_as_it_was_written() -> None:
    record = a_record()
    assert Record.from_json(record.to_json()) == record
    assert record.name == "fixed-total_2_r3"


def test_only_a_run_that_succeeded_has_a_throughput() -> None:
    assert a_record().tokens_per_s == 30.0
    assert a_record(outcome="timeout").tokens_per_s is None
    assert a_record(metrics=None).tokens_per_s is None


@pytest.mark.parametrize(
    ("field", "value"), [("outcome", "fine"), ("flags", ["slow"]), ("wall_s", "long"), ("new", 1)]
)
def test_what_is_no_record_is_refused_by_name(field: str, value: object) -> None:
    plain = json.loads(a_record().to_json())
    with pytest.raises(ValueError, match=r"fine|slow|long|Record cannot be made"):
        Record.from_json(json.dumps({**plain, field: value}))
