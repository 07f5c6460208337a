"""The planner's predictor as a simulation asks for it: one answer for all stages, kept by work."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

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
        """A mixed step reads the weights once: chunks cost what they add to a step of the rows.

        Beside that it costs what a step of prompts does more than one of decodes, however small:
        no graph replays it, and its launches take the host's time.
        """
        rows, tokens, context = work.rows, work.chunk_tokens, work.chunk_context_tokens
        if not rows:
            return self._times.prefill_s(stage, tokens, context)
        decode_s = self._times.decode_s(stage, rows, work.context_tokens)
        if not tokens:
            return decode_s
        both_s = self._times.prefill_s(stage, rows + tokens, context)
        added_s = max(0.0, both_s - self._times.prefill_s(stage, rows, context))
        started_s = self._times.prefill_s(stage, 1, 0.5) - self._times.decode_s(stage, 1, 1)
        return decode_s + added_s + max(0.0, started_s)

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
