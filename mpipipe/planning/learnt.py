"""What an earlier run teaches about the next: by how much it missed its forecast.

The run is forecast again, as it was planned, on its own ranks and with the tokens that it made.
How much longer its steps took than that forecast, by kind, is taken over to other plans; and what
the whole took beyond its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.forecast import forecast_job
from mpipipe.planning.known_times import KnownTimes
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.resources import RankResources
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.step_times import StepTimes

__all__ = ["Learnt", "LearntTimes", "PastRun", "learn"]


@dataclass(frozen=True, slots=True)
class PastRun:
    """A run that ended: what it was planned as, and what was measured. Seconds."""

    name: str  # of its folder
    plan: PipelinePlan
    ranks: tuple[RankResources, ...]  # by rank
    lengths: tuple[tuple[int, int], ...]  # prompt and output tokens of every sequence
    decode_steps_s: tuple[float, ...]  # compute of a step, by stage; 0: it had none of the kind
    prefill_steps_s: tuple[float, ...]
    generate_s: float
    start_s: float  # boot and load
    load_s: float  # of the slowest rank
    shared_ratio: float = 0.0  # of the prompt tokens, that were not computed


@dataclass(frozen=True, slots=True)
class LearntTimes:
    """`StepTimes` that were found to be too short, or too long, by these factors."""

    steps: StepTimes
    decode: float
    prefill: float
    source: str

    def decode_s(self, stage: StagePlan, rows: float, context_tokens: float) -> float:
        """See `StepTimes`."""
        return self.decode * self.steps.decode_s(stage, rows, context_tokens)

    def prefill_s(self, stage: StagePlan, tokens: int, context_tokens: float) -> float:
        """See `StepTimes`."""
        return self.prefill * self.steps.prefill_s(stage, tokens, context_tokens)

    def hop_s(self, rows_or_tokens: int, crosses_hosts: bool) -> float:
        """See `StepTimes`."""
        return self.steps.hop_s(rows_or_tokens, crosses_hosts)


@dataclass(frozen=True, slots=True)
class Learnt:
    """The factors, and the start."""

    decode: float
    prefill: float
    start_s: float
    load_s: float
    name: str  # of the run
    has_drafts: bool = False  # the factors have what its drafts gained, or cost

    def applied_to(self, known: KnownTimes) -> KnownTimes:
        """`known`, corrected by the run."""
        source = (
            f"{known.steps.source}; by the run {self.name} decode steps take {self.decode:.2f} "
            f"times, steps of prompts {self.prefill:.2f} times as long"
            f"{', with what its drafts gained' if self.has_drafts else ''}"
        )
        steps = LearntTimes(known.steps, self.decode, self.prefill, source)
        return replace(known, steps=steps, start_s=self.start_s, load_s=self.load_s)


def learn(spec: ModelSpec, run: PastRun, known: KnownTimes) -> Learnt:
    """The factors by which `run` missed the forecast that `known`, the times of its plan, give.

    A kind of step that the run did not have alone takes the factor of the other kind; where it had
    neither (on CPUs most steps have both), all of them take that of the whole.
    """
    shape = JobShape.of(run.lengths, run.shared_ratio)
    forecast = forecast_job(spec, run.plan, shape, known.steps)
    decode = _factor(run.decode_steps_s, [stage.decode_step_s for stage in forecast.stages])
    prefill = _factor(run.prefill_steps_s, [stage.prefill_step_s for stage in forecast.stages])
    decode, prefill = decode or prefill or 1.0, prefill or decode or 1.0
    steps = LearntTimes(known.steps, decode, prefill, "")
    whole = run.generate_s / forecast_job(spec, run.plan, shape, steps).generating_s
    return Learnt(
        decode=decode * whole,
        prefill=prefill * whole,
        start_s=run.start_s,
        load_s=run.load_s,
        name=run.name,
        has_drafts=run.plan.drafts is not None,
    )


def _factor(measured_s: Sequence[float], predicted_s: Sequence[float]) -> float:
    """Of all stages together; 0 where nothing was measured."""
    pairs = [pair for pair in zip(measured_s, predicted_s, strict=True) if min(pair) > 0]
    predicted = sum(predicted for _, predicted in pairs)
    return sum(measured for measured, _ in pairs) / predicted if predicted else 0.0
