"""Stages, lanes and replicas compared: each way to use all ranks, planned and forecast. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mpipipe.config.schema import AUTO
from mpipipe.errors import ConfigError, EnvironmentSetupError, UnsupportedModelError
from mpipipe.planning.planned_job import PlannedJob
from mpipipe.planning.prompt_lengths import PromptLengths

__all__ = ["Arrangement", "compare_arrangements", "cuts_of", "fastest", "quickest"]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Ranks as `replicas` pipelines of `stages` stages of `lanes` ranks each."""

    replicas: int
    stages: int
    lanes: int
    tokens_per_s: float = 0.0  # output tokens, of the whole job
    wall_clock_s: float = 0.0
    request_s: float = 0.0  # a prompt of the middle length, alone
    token_s: float = 0.0  # each of its tokens
    problem: str = ""  # why it cannot be; the figures are 0 then

    @property
    def words(self) -> str:
        """The settings that ask for it."""
        return (
            f"pipeline.replicas={self.replicas} pipeline.num_stages={self.stages} "
            f"pipeline.tensor_parallel={self.lanes}"
        )


def compare_arrangements(job: PlannedJob) -> tuple[Arrangement, ...]:
    """Every way to use all ranks of `job`, the most tokens per second first.

    Those that cannot be planned come last, with the reason.
    """
    found = [_forecast(job, *shape) for shape in cuts_of(len(job.ranks))]
    return tuple(sorted(found, key=lambda way: (way.problem != "", -way.tokens_per_s)))


def fastest(ways: Sequence[Arrangement]) -> Arrangement | None:
    """The one with the most tokens per second; None: none can be."""
    able = [way for way in ways if not way.problem]
    return max(able, key=lambda way: way.tokens_per_s, default=None)


def quickest(ways: Sequence[Arrangement]) -> Arrangement | None:
    """The one that completes a single request soonest; of equals that with the most tokens/s."""
    able = [way for way in ways if not way.problem]
    return min(able, key=lambda way: (way.request_s, -way.tokens_per_s), default=None)


def cuts_of(num_ranks: int) -> Iterator[tuple[int, int, int]]:
    """Replicas, stages and lanes whose product is `num_ranks`."""
    for replicas in _divisors(num_ranks):
        each = num_ranks // replicas
        for lanes in _divisors(each):
            yield replicas, each // lanes, lanes


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _forecast(job: PlannedJob, replicas: int, stages: int, lanes: int) -> Arrangement:
    arrangement = Arrangement(replicas, stages, lanes)
    # A split, slots and stages that were set are for another number of stages.
    arranged = job.having(
        "pipeline",
        replicas=replicas,
        num_stages=stages,
        tensor_parallel=lanes,
        split=AUTO,
        num_slots=AUTO,
    )
    try:
        outlook = arranged.outlook()
        alone = replace(arranged, prompts=_middle(job)).outlook()
    except (ConfigError, EnvironmentSetupError, UnsupportedModelError) as error:
        return replace(arrangement, problem=str(error))
    return replace(
        arrangement,
        tokens_per_s=outlook.forecast.tokens_per_s,
        wall_clock_s=outlook.forecast.wall_clock_s,
        request_s=alone.forecast.generating_s,
        token_s=alone.forecast.decode_round_s,
    )


def _middle(job: PlannedJob) -> PromptLengths:
    """One prompt, of the middle length and output of all."""
    prompt = statistics.median_low(prompt for prompt, _ in job.prompts.lengths)
    output = statistics.median_low(output for _, output in job.prompts.lengths)
    return replace(job.prompts, lengths=((prompt, output),))
