"""The forecast's strides against the real scheduler, simulated with the same step times."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mpipipe.bench.workloads import BenchWork
from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import Config, ModelConfig, PipelineConfig
from mpipipe.planning.gpu_table import known_gpus
from mpipipe.planning.machine import DescribedMachine, described_ranks, parse_gpus
from mpipipe.planning.planned_job import PlannedJob
from mpipipe.planning.prompt_lengths import PromptLengths
from mpipipe.planning.resources import RankResources
from mpipipe.simulation.planned_times import PlannedTimes
from mpipipe.simulation.simulate import ReplicaPlan, SimulationOptions, simulate_job
from mpipipe.simulation.simulated_requests import RequestLengths
from mpipipe.simulation.stage_times import HeadTimes
from tests.unit.model_specs import OPENLLAMA_3B, OPENLLAMA_7B, SMOL
from tests.unit.planned_rank import make_rank

_FREE = HeadTimes(0.0, 0.0, 0.0, 0.0, 0.0)  # the forecast leaves the head's work out


@pytest.mark.parametrize(
    ("spec", "gpus", "nodes", "work", "replicas", "within"),
    [
        (OPENLLAMA_3B, "h100", 1, "64x512x64", 1, 0.01),
        (OPENLLAMA_3B, "2 x h100", 1, "64x512x64", 1, 0.02),
        (OPENLLAMA_3B, "4 x h100", 1, "3x512x64", 1, 0.04),  # fewer than slots
        (OPENLLAMA_3B, "2 x h100", 1, "128xmixed", 1, 0.03),
        (OPENLLAMA_7B, "2 x t4", 2, "96xmixed", 1, 0.08),  # few pages: prompts wait
        (OPENLLAMA_3B, "2 x h100", 1, "128xmixed", 2, 0.08),  # the last sequences of each
    ],
)
def test_a_forecast_is_what_the_scheduler_does(
    spec: ModelSpec, gpus: str, nodes: int, work: str, replicas: int, within: float
) -> None:
    machine = DescribedMachine(parse_gpus(gpus, known_gpus()), num_nodes=nodes)
    config = Config(pipeline=PipelineConfig(replicas=replicas))
    forecast, simulated = both(config, spec, described_ranks(machine), work)
    assert forecast == pytest.approx(simulated, rel=within)


@pytest.mark.parametrize(("num_ranks", "within"), [(1, 0.03), (2, 0.08)])
def test_unlike_lengths_are_padded_on_cpus_in_both(num_ranks: int, within: float) -> None:
    config = Config(model=ModelConfig(dtype="float32"))
    ranks = [make_rank(rank) for rank in range(num_ranks)]
    forecast, simulated = both(config, SMOL, ranks, "24xmixed")
    assert forecast == pytest.approx(simulated, rel=within)
    unpadded = Config(
        model=ModelConfig(dtype="float32"), pipeline=PipelineConfig(attention="reference")
    )
    for padded, other in zip(
        (forecast, simulated), both(unpadded, SMOL, ranks, "24xmixed"), strict=True
    ):
        assert padded < 0.98 * other


def both(
    config: Config, spec: ModelSpec, ranks: Sequence[RankResources], work: str
) -> tuple[float, float]:
    """Tokens per second, forecast and simulated."""
    lengths = tuple(BenchWork.parse(work).lengths(0))
    outlook = PlannedJob(config, spec, tuple(ranks), "/m", PromptLengths(lengths, work)).outlook()
    pipelines = [
        ReplicaPlan(plan, PlannedTimes(plan, times))
        for plan, times in zip(outlook.plans, outlook.times, strict=True)
    ]
    requests = [RequestLengths(i, *pair, pair[1]) for i, pair in enumerate(lengths)]
    result = simulate_job(pipelines, requests, SimulationOptions(_FREE)).result
    return outlook.forecast.tokens_per_s, result.tokens_per_s
