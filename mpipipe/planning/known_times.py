"""The best step times that are known of a plan: measured where all of its ranks were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.profile import (
    Profile,
    ProfileKey,
    profile_path,
    read_profile,
    unused_profile,
)
from mpipipe.planning.profile_times import profile_times
from mpipipe.planning.rate_times import RateTimes, rate_times
from mpipipe.planning.resources import RankResources
from mpipipe.planning.startup import Startup, startup_by_rates, startup_of_parts
from mpipipe.planning.step_times import StepTimes

__all__ = ["KnownTimes", "known_times"]


@dataclass(frozen=True, slots=True)
class KnownTimes:
    """Step times of a plan's stages, and what is known of its start."""

    steps: StepTimes
    files: tuple[str, ...] = ()  # of the profiles; empty: from rates
    profiles: tuple[tuple[int, Profile], ...] = ()  # by rank
    start_s: float | None = None  # of an earlier run; None: no run was asked
    load_s: float | None = None  # likewise

    def start(self, spec: ModelSpec, plan: PipelinePlan, *, is_compiled: bool = False) -> Startup:
        """From the start of the processes to the first step.

        As measured, where all ranks were; the slowest rank counts, as all begin together.
        `is_compiled`: the kernels of `plan` are; an earlier run's start has what it waited for.
        """
        if self.start_s is not None and self.load_s is not None:
            return Startup(self.start_s, self.load_s)
        if not self.profiles:
            return startup_by_rates(spec, plan, is_compiled=is_compiled)
        stages = {stage.rank: stage for stage in plan.stages}
        starts = [
            startup_of_parts(
                plan,
                profile.start_s,
                _weights_s(profile, plan, stages[rank]),
                is_compiled=is_compiled,
            )
            for rank, profile in self.profiles
        ]
        slowest = max(starts, key=lambda each: each.start_s)
        return replace(slowest, load_s=max(each.load_s for each in starts))


def _weights_s(profile: Profile, plan: PipelinePlan, stage: StagePlan) -> float:
    """Of weights, and on a CPU of what a load takes beside: all that it takes."""
    beside_s = 0.0 if plan.device == "cuda" else profile.load_fixed_s
    if not profile.load_bytes_per_s:
        return beside_s
    return beside_s + stage.weight_bytes / profile.load_bytes_per_s


def known_times(
    spec: ModelSpec,
    plan: PipelinePlan,
    ranks: Sequence[RankResources],
    rates: RateTimes | None = None,
    *,
    folder: Path | None = None,
) -> KnownTimes:
    """The times of `plan` on the ranks that it was made for.

    Args:
        spec: of the model.
        plan: for these ranks.
        ranks: of all replicas, by rank.
        rates: for what was not measured; None: those of the known GPUs and links.
        folder: of profiles; None: the cache's.
    """
    rates = rates or rate_times(spec, plan, [r for r in ranks if r.rank in plan.ranks])
    shape = ProfileKey.shape_of(spec)
    keys = {stage.rank: ProfileKey.of(plan, shape, ranks, stage.rank) for stage in plan.stages}
    found = {key: read_profile(key, folder) for key in dict.fromkeys(keys.values())}
    profiles = {rank: profile for rank, key in keys.items() if (profile := found[key])}
    if len(profiles) < len(keys):
        missing = next(key for key in keys.values() if found[key] is None)
        hint = unused_profile(missing, folder)
        return KnownTimes(replace(rates, source=f"{rates.source}; {hint}") if hint else rates)
    files = tuple(str(profile_path(key, folder)) for key in found)
    return KnownTimes(profile_times(plan, profiles, rates), files, tuple(profiles.items()))
