"""A launch and what its run left behind → its record. Reads no file and starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpipipe.experiments import series
from mpipipe.experiments.ceiling import ceiling_of_run, plan_of
from mpipipe.experiments.outcome import Ending, judge_ending
from mpipipe.experiments.record import (
    SCHEMA,
    Matrix,
    Record,
    RunSlot,
    record_name,
    tokens_per_s_of,
)
from mpipipe.experiments.run_files import RunFiles

__all__ = ["RUNS_FOLDER", "Launched", "build_record"]

RUNS_FOLDER = "runs"


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch that has ended."""

    command: tuple[str, ...]
    started: str  # ISO 8601, UTC
    exit_code: int | None  # None: ended at the time limit
    wall_s: float
    last_line: str = ""  # that it printed


def build_record(matrix: Matrix, slot: RunSlot, launched: Launched, files: RunFiles) -> Record:
    """The record of `slot`, from its launch and its run folder."""
    outcome, reason = judge_ending(_ending(launched, files, matrix.timeout_s))
    plan = plan_of(files.manifest)
    return Record(
        schema=SCHEMA,
        experiment=matrix.experiment,
        case=next(case for case in matrix.cases if case.name == slot.case),
        repeat=slot.repeat,
        order=matrix.order.index(slot),
        seed=matrix.seed,
        command=launched.command,
        config_hash=matrix.config_hash,
        commit=_commit(files.manifest),
        versions=_versions(files.manifest),
        hosts=files.hosts,
        gpus=files.gpu_names,
        started=launched.started,
        outcome=outcome,
        reason=reason,
        exit_code=launched.exit_code,
        wall_s=round(launched.wall_s, 3),
        metrics=files.metrics,
        samples=series.progress(files),
        tokens_hash=files.tokens_hash if outcome == "ok" else None,
        flags=series.flags_of(files) if outcome == "ok" else (),
        energy_j=series.energy_j(files),
        ceiling=ceiling_of_run(plan, files.lengths, files.gpu_names) if outcome == "ok" else None,
        num_places=None if plan is None else plan.num_replicas * plan.capacity,
        sm_clock_mhz=series.sm_clock_mhz(files),
        cpu_percent=series.cpu_percent(files),
        gpu_percent=series.gpu_percent(files),
        run_folder=f"{RUNS_FOLDER}/{record_name(slot.case, slot.repeat)}",
    )


def _ending(launched: Launched, files: RunFiles, limit_s: float) -> Ending:
    return Ending(
        exit_code=launched.exit_code,
        limit_s=limit_s,
        error=files.error,
        kind=files.error_kind,
        last_line=launched.last_line,
        has_metrics=files.metrics is not None,
        has_tokens=files.tokens_hash is not None,
        has_speed=tokens_per_s_of(files.metrics) is not None,
        num_failed=files.num_failed,
    )


def _versions(manifest: Mapping[str, Any]) -> dict[str, str]:
    versions = manifest.get("versions")
    known = versions.items() if isinstance(versions, dict) else ()
    found = {str(name): str(value) for name, value in known if value}
    return {**found, "mpipipe": str(manifest["mpipipe"])} if "mpipipe" in manifest else found


def _commit(manifest: Mapping[str, Any]) -> str | None:
    git = manifest.get("git")
    return str(git["commit"]) if isinstance(git, dict) and git.get("commit") else None
