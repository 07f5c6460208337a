"""The run folder of `mpipipe plan --from RUN`: what was measured, and under which plan."""

from __future__ import annotations

import json
from pathlib import Path

from mpipipe.errors import MpipipeError, OutputError
from mpipipe.logs.reading import Line, RunFiles, find_run, number, rows, whole
from mpipipe.plain_values import from_plain
from mpipipe.planning.learnt import PastRun
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resources import RankResources

__all__ = ["read_past_run"]


def read_past_run(place: Path) -> PastRun:
    """The last attempt that generated, of the run at `place` or the latest run below it.

    Of several replicas the first one stands for all.

    Raises:
        OutputError: there is no run, or it has not ended, or an older version wrote it.
    """
    files = find_run(place)
    metrics = files.document("metrics.json")
    attempt = whole(metrics, "attempt", 1)
    try:
        run = PastRun(
            name=files.folder.name,
            plan=PipelinePlan.from_json(json.dumps(files.document("manifest.json").get("plan"))),
            ranks=_ranks(files, attempt),
            lengths=_lengths(files, attempt),
            decode_steps_s=_steps_s(metrics, "decode"),
            prefill_steps_s=_steps_s(metrics, "prefill"),
            generate_s=_seconds(metrics, "generate_s"),
            start_s=_seconds(metrics, "boot_s") + _seconds(metrics, "load_s"),
            load_s=max(number(rank, "load_s") or 0.0 for rank in rows(metrics, "ranks")),
            shared_ratio=_shared_ratio(metrics),
        )
    except (MpipipeError, ValueError) as error:
        raise _refused(files, str(error)) from error
    stages = len(run.plan.stages)
    if not run.lengths or len(run.ranks) < stages or len(run.decode_steps_s) != stages:
        raise _refused(files, "prompts, ranks or stages are missing")
    return run


def _shared_ratio(metrics: Line) -> float:
    requests = metrics.get("requests")
    num_tokens = whole(requests, "num_prompt_tokens", 0) if isinstance(requests, dict) else 0
    return min(1.0, whole(metrics, "num_shared_tokens", 0) / num_tokens) if num_tokens else 0.0


def _refused(files: RunFiles, why: str) -> OutputError:
    return OutputError(
        f"nothing can be learnt from {files.folder} ({why}): most likely the run did not end, or "
        "another version of mpipipe wrote it; give a run of this version that has completed its "
        "prompts"
    )


def _ranks(files: RunFiles, attempt: int) -> tuple[RankResources, ...]:
    """What every rank had, as the head's log tells."""
    for line in files.log_lines(0, attempt):
        if line.get("event") == "handshake":
            return from_plain(tuple[RankResources, ...], line.get("resources"))
    raise ValueError("its log does not tell what its ranks had")


def _lengths(files: RunFiles, attempt: int) -> tuple[tuple[int, int], ...]:
    """Of the requests that the first replica ran; the head writes the lines of all replicas."""
    return tuple(
        (prompt, output)
        for line in files.lines("requests.jsonl", attempt)
        if not whole(line, "on_replica")
        and (prompt := whole(line, "num_prompt_tokens"))
        and (output := whole(line, "num_output_tokens"))
    )


def _steps_s(metrics: Line, kind: str) -> tuple[float, ...]:
    """The mean compute of a step of each stage."""
    found = []
    for stage in _first_replica(metrics):
        totals = stage.get(kind, {})
        num_steps = whole(totals, "num_steps")
        found.append((number(totals, "compute_s") or 0.0) / num_steps if num_steps else 0.0)
    return tuple(found)


def _first_replica(metrics: Line) -> list[Line]:
    """The totals of its stages, in their order: the plan in the manifest is this replica's.

    Of a stage with several lanes, which do the same steps, the first one's.
    """
    stages: dict[int, Line] = {}
    for rank in rows(metrics, "ranks"):
        totals = rank.get("stage", {})
        if not whole(rank, "replica"):
            stages.setdefault(whole(totals, "stage"), totals)
    return [stages[stage] for stage in sorted(stages)]


def _seconds(metrics: Line, phase: str) -> float:
    seconds = number(metrics.get("phases", {}), phase)
    if seconds is None:
        raise ValueError(f"metrics.json does not tell {phase}")
    return seconds
