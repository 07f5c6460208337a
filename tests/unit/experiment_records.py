"""Matrices and records as an experiment would leave them, for tests that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mpipipe.experiments.matrix import ExperimentOptions, launch_order, make_cases
from mpipipe.experiments.record import (
    SCHEMA,
    Case,
    Ceiling,
    ExperimentName,
    Matrix,
    ProgressSample,
    Record,
)

__all__ = ["a_matrix", "a_record", "an_experiment", "options_of"]


def options_of(experiment: ExperimentName, **changes: Any) -> ExperimentOptions:
    stages = changes.pop("stages", (1,) if experiment == "batch" else (1, 2))
    nodes = changes.pop("nodes", (1,) * len(stages))
    return ExperimentOptions(experiment, stages, nodes, **changes)


def a_matrix(experiment: ExperimentName, num_prompts: int = 8, **changes: Any) -> Matrix:
    options = options_of(experiment, **changes)
    cases = make_cases(options, num_prompts, ("log.progress=none",))
    return Matrix(
        schema=SCHEMA,
        experiment=experiment,
        config="c.toml",
        words=("generation.max_new_tokens=16",),
        settings={"generation.max_new_tokens": 16, "model.path": "m"},
        config_hash="0123456789ab",
        prompts_hash="f" * 64,
        cases=cases,
        repeat=options.repeat,
        seed=options.seed,
        order=launch_order(cases, options.repeat, options.seed),
        timeout_s=options.timeout_s,
        command=("mpipipe", "bench", experiment),
        version="0",
    )


def a_record(matrix: Matrix, case: Case, repeat: int, speed: float, **changes: Any) -> Record:
    (order,) = (
        place
        for place, slot in enumerate(matrix.order)
        if (slot.case, slot.repeat) == (case.name, repeat)
    )
    record = Record(
        schema=SCHEMA,
        experiment=matrix.experiment,
        case=case,
        repeat=repeat,
        order=order,
        seed=matrix.seed,
        command=("mpirun", "-n", str(case.num_stages), "mpipipe", "run", "c.toml"),
        config_hash=matrix.config_hash,
        commit=None,
        versions={"torch": "2.13"},
        hosts=("a",) * case.num_stages,
        gpus=(),
        started="2026-01-01T00:00:00+00:00",
        outcome="ok",
        reason="",
        exit_code=0,
        wall_s=12.5,
        metrics={
            "output_tokens_per_s": speed,
            "requests": {"num_output_tokens": 128},
            "phases": {"generate_s": 128 / speed},
        },
        samples=(ProgressSample(0.0, 0), ProgressSample(5.0, 150)),
        tokens_hash="same",
        flags=(),
        energy_j=None,
        ceiling=Ceiling(None, 40.0 * case.num_stages, "stages"),
        num_places=case.batch,
        sm_clock_mhz=None,
        cpu_percent=99.5,
        gpu_percent=None,
        run_folder=f"runs/{case.name}_r{repeat}",
    )
    return dataclasses.replace(record, **changes)


def an_experiment(matrix: Matrix, speeds: Mapping[str, Sequence[float]]) -> list[Record]:
    """All records of the cases in `speeds`, a speed for each repeat."""
    of_name = {case.name: case for case in matrix.cases}
    return [
        a_record(matrix, of_name[name], repeat, speed)
        for name, values in speeds.items()
        for repeat, speed in enumerate(values, 1)
    ]
