"""Experiments as Slurm jobs: arrays of cases over one and two nodes, and the job that sums up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mpipipe.experiments.folder import ExperimentFolder
from tests.slurm.scenarios import experiment, tiny_alone
from tests.slurm.site import JobEnd, read_jsonl

story = pytest.mark.story.with_args  # a marker with one function would decorate it


CASES = {"memory-filling_n1": 1, "memory-filling_n2": 2, "fixed-total_n1": 1, "fixed-total_n2": 2}


@story(experiment)
def test_an_experiment_is_submitted_as_arrays_and_summed_up_by_the_last_job(
    end: JobEnd, told: Callable[..., Any]
) -> None:
    assert end.state == "COMPLETED", end.log
    assert f"{len(CASES)} tasks in the arrays" in end.observed["said"]
    assert len(list(end.folder.glob("*_nodes.sbatch"))) == 2
    records = ExperimentFolder(end.folder).records()
    assert {record.case.name: len(set(record.hosts)) for record in records} == CASES
    alone = told(tiny_alone)
    for record in records:
        assert (record.outcome, record.reason) == ("ok", ""), end.log
        assert record.command[0] == "srun"
        assert "--mpi=pmi2" in record.command
        lines = read_jsonl(end.folder / record.run_folder / "completions.jsonl")
        assert {line["id"]: line["token_ids"] for line in lines} == {
            name: alone[name] for name in list(alone)[:8]
        }
    for name in CASES:
        assert f" {name} " in end.observed["last"]  # the table
    assert (end.folder / "report.md").exists()
    assert not (end.folder / "best.toml").exists()  # of the batch experiment: tests/e2e
