"""Simulated jobs beside measured ones (DESIGN section 9, BENCHMARKS.md), and beside forecasts.

The rates of a step were fitted to jobs of the first kind, so they say little of the schedule.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from mpipipe.bench.workloads import BenchWork
from mpipipe.config.load import load_config
from mpipipe.planning.gpu_table import known_gpus
from mpipipe.planning.machine import DescribedMachine, described_ranks, parse_gpus
from mpipipe.planning.model_facts import read_model
from mpipipe.planning.planned_job import Outlook, PlannedJob
from mpipipe.planning.prompt_lengths import PromptLengths
from mpipipe.simulation.planned_times import PlannedTimes
from mpipipe.simulation.result import SimulationResult
from mpipipe.simulation.simulate import (
    ReplicaPlan,
    SimulationOptions,
    num_representatives,
    simulate_job,
)
from mpipipe.simulation.simulated_requests import RequestLengths
from mpipipe.simulation.stage_times import HeadTimes

SHAPES = Path(__file__).resolve().parents[2] / "configs" / "shapes"
OPTIONS = SimulationOptions(HeadTimes(90e-6, 20e-6, 20e-6), launch_s=200e-6)


def planned(shape: str, gpus: str, work: str, *words: str, nodes: int = 1) -> Outlook:
    loaded = load_config(SHAPES / shape, words)
    model = read_model(loaded, needs_weights=False)
    machine = DescribedMachine(parse_gpus(gpus, known_gpus()), num_nodes=nodes)
    job = PlannedJob(
        config=model.loaded.config,
        spec=model.spec,
        ranks=tuple(described_ranks(machine)),
        model_path=str(model.folder),
        prompts=PromptLengths(tuple(BenchWork.parse(work).lengths(0)), work),
    )
    return job.outlook()


def requests(outlook: Outlook) -> list[RequestLengths]:
    lengths = outlook.job.prompts.lengths
    return [RequestLengths(i, prompt, output, output) for i, (prompt, output) in enumerate(lengths)]


def replica(outlook: Outlook) -> ReplicaPlan:
    return ReplicaPlan(outlook.plan, PlannedTimes(outlook.plan, outlook.times[0]))


def simulated(outlook: Outlook) -> SimulationResult:
    return simulate_job([replica(outlook)], requests(outlook), OPTIONS).result


@pytest.mark.parametrize(
    ("shape", "gpus", "work", "measured"),
    [
        ("openllama_3b", "2 x h100", "512x512x128", 14_657),
        ("openllama_3b", "2 x h100", "128x1024x256", 8_139),
        ("openllama_3b", "2 x h100", "1x512x128", 319),
        ("openllama_3b", "2 x h100", "512xmixed", 13_078),
        ("llama3_8b", "2 x h100", "512x512x128", 12_775),
        ("llama3_8b", "2 x h100", "64x512x128", 6_122),
        ("llama3_8b", "2 x h100", "512xmixed", 11_367),
        ("openllama_3b", "4 x h100", "256x512x128", 20_920),
        ("llama3_8b", "4 x h100", "256x512x128", 15_778),
    ],
)
def test_jobs_on_h100_are_as_fast_as_measured(
    shape: str, gpus: str, work: str, measured: float
) -> None:
    assert simulated(planned(shape, gpus, work)).tokens_per_s == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize(
    ("shape", "gpus", "work"),
    [
        ("openllama_3b", "2 x h100", "512x512x128"),
        ("llama3_8b", "4 x h100", "256x512x128"),
        ("llama3_8b", "2 x h100", "512xmixed"),
    ],
)
def test_the_forecast_says_what_the_scheduler_does(shape: str, gpus: str, work: str) -> None:
    """From the same step times: a closed form against every single step.

    To the forecast a stage whose tensors pass its edges is busy.
    """
    outlook = planned(shape, gpus, work)
    found = simulated(outlook)
    assert outlook.forecast.tokens_per_s == pytest.approx(found.tokens_per_s, rel=0.01)
    unused_s = fmean([stage.wait_s + stage.idle_s for stage in found.stages])
    assert outlook.forecast.bubble == pytest.approx(unused_s / found.elapsed_s, abs=0.01)


def test_of_many_alike_replicas_some_stand_for_all() -> None:
    outlook = planned("openllama_7b", "2 x t4", "128xmixed", nodes=2)
    few, many = requests(outlook), requests(outlook) * 100
    assert num_representatives([replica(outlook)] * 2, few) == 2
    assert 16 <= num_representatives([replica(outlook)] * 1000, many * 10) < 200
    assert num_representatives([replica(outlook)] * 1000, many, asked=7) == 7
    other = planned("openllama_7b", "2 x l4", "128xmixed", nodes=2)
    unlike = [*[replica(outlook)] * 999, replica(other)]
    assert num_representatives(unlike, many * 10) == 1000


def test_those_that_stand_for_all_tell_of_all() -> None:
    outlook = planned("openllama_7b", "2 x t4", "1024x128x32", nodes=2)
    replicas = [replica(outlook)] * 32
    asked = [
        simulate_job(
            replicas,
            requests(outlook),
            SimulationOptions(OPTIONS.head, num_simulated_replicas=number),
        ).result
        for number in (8, 32)
    ]
    assert asked[0].num_completed == asked[1].num_completed == 1024
    assert asked[0].tokens_per_s == pytest.approx(asked[1].tokens_per_s, rel=0.05)
    loads = [result.dispatch for result in asked]
    assert loads[0] is not None and loads[1] is not None  # noqa: PT018 - for the type checker
    assert loads[0].num_bytes == pytest.approx(loads[1].num_bytes, rel=0.05)
