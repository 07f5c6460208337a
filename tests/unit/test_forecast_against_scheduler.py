"""The forecast's strides against the real scheduler, simulated with the same step times."""

from __future__ import annotations

import pytest

from mpipipe.bench.workloads import BenchWork
from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import Config
from mpipipe.planning.gpu_table import known_gpus
from mpipipe.planning.machine import DescribedMachine, described_ranks, parse_gpus
from mpipipe.planning.planned_job import PlannedJob
from mpipipe.planning.prompt_lengths import PromptLengths
from mpipipe.simulation.planned_times import PlannedTimes
from mpipipe.simulation.simulate import ReplicaPlan, SimulationOptions, simulate_job
from mpipipe.simulation.simulated_requests import RequestLengths
from mpipipe.simulation.stage_times import HeadTimes
from tests.unit.model_specs import OPENLLAMA_3B, OPENLLAMA_7B

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
    lengths = tuple(BenchWork.parse(work).lengths(0))
    job = PlannedJob(
        Config(), spec, tuple(described_ranks(machine)), "/m", PromptLengths(lengths, work)
    ).having("pipeline", replicas=replicas)
    outlook = job.outlook()
    pipelines = [
        ReplicaPlan(plan, PlannedTimes(plan, times))
        for plan, times in zip(outlook.plans, outlook.times, strict=True)
    ]
    requests = [RequestLengths(i, *pair, pair[1]) for i, pair in enumerate(lengths)]
    result = simulate_job(pipelines, requests, SimulationOptions(_FREE)).result
    assert outlook.forecast.tokens_per_s == pytest.approx(result.tokens_per_s, rel=within)
