"""The steps of a run: how long they take per rank and phase, and where they stalled. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from mpipipe.logs.facts import RunFacts
from mpipipe.logs.stalls import Stall, find_stalls
from mpipipe.metrics.summary import percentile

__all__ = ["PhaseRow", "StepReport", "report_steps"]


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """The steps of one phase on one rank; seconds of one step."""

    rank: int
    replica: int
    stage: int | None
    phase: str
    num_steps: int  # that were kept
    num_tokens: int
    p50_s: float
    p95_s: float
    max_s: float
    compute_p50_s: float
    transfer_p50_s: float
    bytes_in_per_step: float


@dataclass(frozen=True, slots=True)
class StepReport:
    """What `mpipipe logs steps` tells."""

    phases: tuple[PhaseRow, ...]
    stalls: tuple[Stall, ...]
    num_steps: int  # that the run did, on the first stages of its replicas
    num_steps_kept: int  # of which lines are left


def report_steps(run: RunFacts, least_s: float) -> StepReport:
    """The report; a stall is a step of `least_s` and of ten times the usual."""
    phases = []
    for rank in run.ranks:
        for name, steps in sorted(rank.steps.phases.items()):
            phases.append(
                PhaseRow(
                    rank=rank.rank,
                    replica=rank.replica,
                    stage=rank.stage,
                    phase=name,
                    num_steps=steps.num_steps,
                    num_tokens=steps.num_tokens,
                    p50_s=median(steps.seconds),
                    p95_s=percentile(steps.seconds, 95) or 0.0,
                    max_s=max(steps.seconds),
                    compute_p50_s=median(steps.compute_s),
                    transfer_p50_s=median(steps.transfer_s),
                    bytes_in_per_step=steps.bytes_in / steps.num_steps,
                )
            )
    first_of = {rank.replica: rank for rank in reversed(run.ranks)}
    return StepReport(
        tuple(phases),
        tuple(find_stalls(run, least_s=least_s)),
        sum(rank.num_steps for rank in first_of.values()),
        sum(rank.steps.num_steps for rank in first_of.values()),
    )
