"""What an experiment is (`experiment.json`) and what each of its runs came to (`records/*.json`).

Both are written once and never changed. Everything that is said of an experiment follows from
them: a report needs no run folder, no model and no GPU. Fields are only ever added; a reader
ignores none, so a file of a newer version is refused with the name of what is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mpipipe.plain_values import from_json, to_json

__all__ = [
    "SCHEMA",
    "Arm",
    "Case",
    "Ceiling",
    "ExperimentName",
    "Flag",
    "Matrix",
    "Outcome",
    "ProgressSample",
    "Record",
    "RunSlot",
    "record_name",
    "tokens_per_s_of",
]

SCHEMA = 1

ExperimentName = Literal["strong", "weak", "batch", "arrangements"]
Arm = Literal["memory-filling", "fixed-total", "weak", "batch", "arrangements"]
Outcome = Literal["ok", "out_of_memory", "timeout", "infeasible", "failed"]
Flag = Literal["throttled", "foreign load", "too short", "other tokens"]


@dataclass(frozen=True, slots=True)
class Case:
    """One point of an experiment; every repeat of it is a launch of its own."""

    name: str  # e.g. "fixed-total_2"; part of file names
    arm: Arm
    num_stages: int
    num_nodes: int
    num_replicas: int
    # Prompts in flight at most; None: as many as the plan's memory holds (`Record.num_places`).
    batch: int | None
    num_prompts: int
    # What the case adds to the configuration, `section.key=value` each.
    words: tuple[str, ...] = ()
    num_lanes: int = 1  # ranks of each stage

    @property
    def num_ranks(self) -> int:
        """Of all replicas."""
        return self.num_replicas * self.num_stages * self.num_lanes

    @property
    def arrangement(self) -> str:
        """Replicas × stages × lanes."""
        return f"{self.num_replicas} × {self.num_stages} × {self.num_lanes}"


@dataclass(frozen=True, slots=True)
class RunSlot:
    """A place in the order of launches."""

    case: str
    repeat: int  # from 1; 0: the warm-up launch, which is not measured


@dataclass(frozen=True, slots=True)
class Matrix:
    """`experiment.json`: all that is to be run, in order. The same command gives the same."""

    schema: int
    experiment: ExperimentName
    config: str  # configuration file or model, as given
    words: tuple[str, ...]  # that were given beside it; those of the cases come after them
    # Every setting of the configuration under the words, but for output and log: what may not
    # change between the runs of an experiment. "section.key" → value.
    settings: Mapping[str, Any]
    config_hash: str  # of `settings`
    prompts_hash: str  # of the content of the prompt file
    cases: tuple[Case, ...]
    repeat: int
    seed: int
    order: tuple[RunSlot, ...]  # of the measured launches: arms and cases interleaved
    timeout_s: float
    command: tuple[str, ...]  # that makes or continues it
    version: str  # of mpipipe


@dataclass(frozen=True, slots=True)
class ProgressSample:
    """How far a run was."""

    t_s: float  # seconds since generating began
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What memory and arithmetic allow at best, by `planning.roofline` and the run's own plan."""

    # None: nothing says what the device can do (a CPU, an unknown GPU), so only ratios are known.
    tokens_per_s: float | None
    # The same in the cost model's own units. Over that of the arm's smallest case it is the
    # speedup that the cost model allows at best, on every device.
    model_tokens_per_s: float
    reason: str  # the formula, with its values


@dataclass(frozen=True, slots=True)
class Record:
    """`records/<case>_r<repeat>.json`: one launch and what it came to."""

    schema: int
    experiment: ExperimentName
    case: Case
    repeat: int
    order: int  # place among all launches of the experiment, from 0
    seed: int
    command: tuple[str, ...]  # of the launch, mpirun or srun included
    config_hash: str
    commit: str | None
    versions: Mapping[str, str]  # package → version, from the manifest
    hosts: tuple[str, ...]  # one per rank
    gpus: tuple[str, ...]  # one per rank that has one
    started: str  # ISO 8601, UTC
    outcome: Outcome
    reason: str  # one sentence; empty when ok
    exit_code: int | None  # None: killed at the time limit
    wall_s: float  # of the launch: boot and shutdown included
    metrics: Mapping[str, Any] | None  # the run's metrics.json
    samples: tuple[ProgressSample, ...]
    tokens_hash: str | None  # of all prompts' ids and token ids; None: not all were completed
    flags: tuple[Flag, ...]  # "other tokens" is told by comparing records, not in one
    energy_j: float | None  # all ranks' GPUs while generating
    ceiling: Ceiling | None
    num_places: int | None  # sequences that the plan lets run at once
    sm_clock_mhz: float | None  # median of the GPUs' clocks while generating
    cpu_percent: float | None  # of one core, mean over ranks and time while generating
    gpu_percent: float | None  # mean over GPUs and time while generating
    run_folder: str  # below the experiment's folder; may have been removed

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens per second while generating; None: the run came to no result."""
        return tokens_per_s_of(self.metrics) if self.outcome == "ok" else None

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        return record_name(self.case.name, self.repeat)

    def to_json(self) -> str:
        """Text of the file."""
        return to_json(self, indent=2) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> Record:
        """The inverse of `to_json`.

        Raises:
            ValueError: not such a record; says why.
        """
        return from_json(Record, text)


def tokens_per_s_of(metrics: Mapping[str, Any] | None) -> float | None:
    """Output tokens per second while generating; None: no number above 0 is told."""
    value = (metrics or {}).get("output_tokens_per_s")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < math.inf else None


def record_name(case: str, repeat: int) -> str:
    """`<case>_r<repeat>`: of a record's file and of its run folder."""
    return f"{case}_r{repeat}"
