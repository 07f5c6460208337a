"""A job on given ranks: planned and forecast, and planned anew with other settings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import AUTO, Config
from mpipipe.planning.compiled_kernels import are_kernels_compiled
from mpipipe.planning.forecast import JobForecast
from mpipipe.planning.gpu_table import GpuTable, known_gpus
from mpipipe.planning.job_plan import plan_job
from mpipipe.planning.known_times import KnownTimes, known_times
from mpipipe.planning.learnt import Learnt
from mpipipe.planning.link_table import BETWEEN_HOSTS, Link
from mpipipe.planning.plan import PipelinePlan, Resolved
from mpipipe.planning.prompt_lengths import PromptLengths
from mpipipe.planning.rate_times import rate_times
from mpipipe.planning.replica_forecast import forecast_replicas
from mpipipe.planning.resources import RankResources
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.step_times import StepTimes

__all__ = ["FREE_STAGES", "Outlook", "PlannedJob"]

# What goes with a number of stages, for the plan to choose anew.
FREE_STAGES: Final = {"num_stages": AUTO, "num_slots": AUTO, "split": AUTO}


@functools.lru_cache(maxsize=1)
def _shape(lengths: tuple[tuple[int, int], ...], shared_ratio: float) -> JobShape:
    """Of one job again and again: it takes a tenth of a second for 100,000 prompts."""
    return JobShape.of(lengths, shared_ratio)


@dataclass(frozen=True, slots=True)
class Outlook:
    """The plans of a job, and what it will take."""

    job: PlannedJob
    plans: tuple[PipelinePlan, ...]  # of every replica
    times: tuple[StepTimes, ...]  # likewise
    forecast: JobForecast

    @property
    def plan(self) -> PipelinePlan:
        """The first replica's."""
        return self.plans[0]


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """What is planned for: all of it is known before anything starts."""

    config: Config
    spec: ModelSpec
    ranks: tuple[RankResources, ...]
    model_path: str
    prompts: PromptLengths
    notes: tuple[Resolved, ...] = ()
    table: GpuTable | None = None  # None: the known GPUs
    far: Link = BETWEEN_HOSTS  # between hosts
    near: Link | None = None  # between ranks of a host; None: as the devices have it
    is_measured: bool = True  # step times as measured, where all ranks were; False: rates
    learnt: Learnt | None = None  # from an earlier run

    def outlook(self) -> Outlook:
        """The plans and their forecast.

        Raises:
            PlanError, EnvironmentSetupError: as `make_plans`.
        """
        workload = self.prompts.workload(self.spec.max_context_tokens)
        plans = plan_job(
            self.config,
            self.spec,
            self.ranks,
            self.model_path,
            workload,
            notes=self.notes,
            times=self._known,
        )
        known = [self._known(self.spec, plan, self.ranks) for plan in plans]
        times = tuple(each.steps for each in known)
        starts = (
            each.start(self.spec, plan, is_compiled=are_kernels_compiled(plan, self.ranks))
            for each, plan in zip(known, plans, strict=True)
        )
        slowest = max(starts, key=lambda each: each.start_s)
        forecast = replace(
            self.forecast(plans, times), startup_s=slowest.start_s, compile_s=slowest.compile_s
        )
        return Outlook(self, plans, times, forecast)

    def forecast(self, plans: Sequence[PipelinePlan], times: Sequence[StepTimes]) -> JobForecast:
        """What the job takes under the plans of its replicas, each with its times."""
        shape = _shape(self.prompts.lengths, self.prompts.shared_ratio)
        return forecast_replicas(self.spec, plans, shape, times, watts=self._watts(plans))

    def having(self, section: str, **settings: Any) -> PlannedJob:
        """The job with other settings of a section of the configuration."""
        changed = replace(getattr(self.config, section), **settings)
        sections: dict[str, Any] = {section: changed}
        return replace(self, config=replace(self.config, **sections))

    def on_ranks(self, ranks: Sequence[RankResources]) -> PlannedJob:
        """The job on other ranks, numbered anew, with a stage for each."""
        numbered = tuple(replace(rank, rank=number) for number, rank in enumerate(ranks))
        return replace(self.having("pipeline", **FREE_STAGES), ranks=numbered)

    def _known(
        self, spec: ModelSpec, plan: PipelinePlan, ranks: Sequence[RankResources]
    ) -> KnownTimes:
        own = [rank for rank in ranks if rank.rank in plan.ranks]
        rates = rate_times(spec, plan, own, table=self.table, near=self.near, far=self.far)
        known = known_times(spec, plan, ranks, rates) if self.is_measured else KnownTimes(rates)
        return known if self.learnt is None else self.learnt.applied_to(known)

    def _watts(self, plans: Sequence[PipelinePlan]) -> dict[int, float]:
        """The power limit of each stage's GPUs, by its first rank, where all are in the table."""
        if plans[0].device == "cpu":
            return {}
        table = self.table or known_gpus()
        cards = {rank.rank: table.find(rank.gpu.name) for rank in self.ranks}
        limits = {rank: card.watts for rank, card in cards.items() if card is not None}
        stages = [stage for plan in plans for stage in plan.stages]
        return {
            stage.rank: sum(limits[rank] for rank in stage.ranks)
            for stage in stages
            if limits.keys() >= {*stage.ranks}
        }
