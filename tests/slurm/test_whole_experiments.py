"""Experiments as Slurm jobs: arrays of cases over one and two nodes, and the job that sums up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mpipipe.experiments.folder import ExperimentFolder
from tests.slurm.scenarios import experiment, tiny_alone
from tests.slurm.site import JobEnd, read_jsonl

story = pytest.mark.story.with_args  # a marker with one function would decorate it


@pytest.mark.parametrize(
    ("cases", "arrays", "flag"),
    [
        pytest.param(
            {"memory-filling_n1": 1, "memory-filling_n2": 2, "fixed-total_n1": 1,
             "fixed-total_n2": 2}, 2, "pmi2", marks=story(experiment, "strong", "mpich"),
        ),
        pytest.param(
            {"batch_2": 2, "batch_8": 2}, 1, "pmix", marks=story(experiment, "batch", "openmpi")
        ),
    ],
    ids=["strong-mpich", "batch-openmpi"],
)  # fmt: skip
def test_an_experiment_is_submitted_as_arrays_and_summed_up_by_the_last_job(
    cases: dict[str, int], arrays: int, flag: str, end: JobEnd, told: Callable[..., Any]
) -> None:
    assert end.state == "COMPLETED", end.log
    assert f"{len(cases)} tasks in the arrays" in end.observed["said"]
    assert len(list(end.folder.glob("*_nodes.sbatch"))) == arrays
    records = ExperimentFolder(end.folder).records()
    assert {record.case.name: len(set(record.hosts)) for record in records} == cases
    alone = told(tiny_alone)
    for record in records:
        assert (record.outcome, record.reason) == ("ok", ""), end.log
        assert record.command[0] == "srun"
        assert f"--mpi={flag}" in record.command
        lines = read_jsonl(end.folder / record.run_folder / "completions.jsonl")
        assert {line["id"]: line["token_ids"] for line in lines} == {
            name: alone[name] for name in list(alone)[:8]
        }
    for name in cases:
        assert f" {name} " in end.observed["last"]  # the table
    assert (end.folder / "best.toml").exists() == ("batch_2" in cases)
    assert (end.folder / "report.md").exists()
