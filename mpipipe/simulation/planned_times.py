"""The planner's predictor as a simulation asks for it: one answer for all stages, kept by work."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from mpipipe.planning.step_times import mixed_s
from mpipipe.simulation.stage_times import StepWork

if TYPE_CHECKING:
    from mpipipe.planning.plan import PipelinePlan, StagePlan
    from mpipipe.planning.step_times import StepTimes

__all__ = ["PlannedTimes"]


class PlannedTimes:
    """`StageTimes` of the stages of a plan.

    Args:
        plan: of the replica.
        times: of its stages and links.
    """

    def __init__(self, plan: PipelinePlan, times: StepTimes) -> None:
        self._stages = plan.stages
        self._times = times
        self._crosses = [before.host != after.host for before, after in pairwise(plan.stages)]
        self._compute_s: dict[StepWork, tuple[float, ...]] = {}
        self._hops_s: dict[int, tuple[float, ...]] = {}

    def compute_s(self, work: StepWork, step: int) -> tuple[float, ...]:  # noqa: ARG002 - of any
        """As `StageTimes`."""
        known = self._compute_s.get(work)
        if known is None:
            known = self._compute_s[work] = tuple([self._step_s(s, work) for s in self._stages])
        return known

    def _step_s(self, stage: StagePlan, work: StepWork) -> float:
        chunks = (work.chunk_tokens, work.chunk_context_tokens)
        if not work.rows:
            return self._times.prefill_s(stage, *chunks)
        if not work.chunk_tokens:
            return self._times.decode_s(stage, work.rows, work.context_tokens)
        return mixed_s(self._times, stage, (work.rows, work.context_tokens), chunks)

    def hops_s(self, num_tokens: int) -> tuple[float, ...]:
        """As `StageTimes`."""
        known = self._hops_s.get(num_tokens)
        if known is None:
            hops_s = [self._times.hop_s(num_tokens, crosses) for crosses in self._crosses]
            known = self._hops_s[num_tokens] = tuple(hops_s)
        return known

    @property
    def ids_s(self) -> float:
        """As `StageTimes`: eight bytes a row take no longer than nothing."""
        if len(self._stages) == 1:
            return 0.0
        return self._times.hop_s(0, self._stages[0].host != self._stages[-1].host)
