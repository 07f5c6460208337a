"""What unlike outputs cost: the same tokens at fixed lengths beside them, simulated."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from mpipipe.bench.workloads import BenchWork
from mpipipe.config.load import load_config
from mpipipe.planning.gpu_table import known_gpus
from mpipipe.planning.link_table import link_named
from mpipipe.planning.machine import DescribedMachine, described_ranks, parse_gpus
from mpipipe.planning.model_facts import read_model
from mpipipe.planning.planned_job import PlannedJob
from mpipipe.planning.prompt_lengths import PromptLengths
from mpipipe.simulation.planned_times import PlannedTimes
from mpipipe.simulation.simulate import ReplicaPlan, SimulationOptions, simulate_job
from mpipipe.simulation.simulated_requests import RequestLengths
from mpipipe.simulation.stage_times import HeadTimes, StepWork

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"
HEAD = HeadTimes(step_s=90e-6, message_s=20e-6, notice_s=20e-6)


def replica(shape: str, gpus: str, work: str, *words: str) -> ReplicaPlan:
    model = read_model(load_config(SHAPES / shape, words), needs_weights=False)
    outlook = PlannedJob(
        config=model.loaded.config,
        spec=model.spec,
        ranks=tuple(described_ranks(DescribedMachine(parse_gpus(gpus, known_gpus())))),
        model_path=str(model.folder),
        prompts=PromptLengths(tuple(BenchWork.parse(work).lengths(0)), work),
        far=link_named("10GbE"),
    ).outlook()
    return ReplicaPlan(outlook.plans[0], PlannedTimes(outlook.plans[0], outlook.times[0]))


@functools.cache
def even_s(shape: str, gpus: str, work: str) -> float:
    """Of the same tokens at fixed lengths, prompts first."""
    return elapsed_s(replica(shape, gpus, work), f"{work}xeven")


def elapsed_s(planned: ReplicaPlan, work: str) -> float:
    lengths = BenchWork.parse(work).lengths(0)
    requests = [RequestLengths(i, tokens, out, out) for i, (tokens, out) in enumerate(lengths)]
    result = simulate_job([planned], requests, SimulationOptions(HEAD, launch_s=200e-6)).result
    assert not result.deadlocks
    return result.elapsed_s


def share_of_even(shape: str, gpus: str, work: str, *words: str) -> float:
    """Throughput beside that of the same tokens at fixed lengths, prompts first."""
    return even_s(shape, gpus, work) / elapsed_s(replica(shape, gpus, work, *words), work)


@pytest.mark.parametrize("shape", ["openllama_3b", "llama3_8b"])
@pytest.mark.parametrize(
    ("gpus", "share"), [("h100", 0.97), ("2 x h100", 0.96), ("4 x h100", 0.96)]
)
def test_with_more_prompts_than_places_unlike_outputs_cost_little(
    shape: str, gpus: str, share: float
) -> None:
    assert share_of_even(shape, gpus, "2000xmixed") > share


@pytest.mark.parametrize(
    ("work", "tokens", "least", "most"),
    [("512xmixed", 1024, 0.7, 0.9), ("2000x512x64xtail", 2048, 0.95, 1.05)],
)
def test_prompts_in_decode_steps_gain_nothing_as_was_measured(
    work: str, tokens: int, least: float, most: float
) -> None:
    """Two H200, beside prompts first: 11,286 : 15,243 and 10,014 : 10,064 tokens/s."""
    words = ("pipeline.prefill=mixed", f"pipeline.max_tokens_per_step={tokens}")
    phases, mixed = (share_of_even("openllama_3b", "2 x h200", work, *more) for more in ((), words))
    assert least < mixed / phases < most


def test_a_mixed_step_takes_as_long_as_its_launches_at_least() -> None:
    times = replica("llama3_8b", "2 x h100", "512xmixed").times
    (decode_s, _), (both_s, _) = (
        times.compute_s(StepWork(rows=64, context_tokens=512, chunk_tokens=tokens), 0)
        for tokens in (0, 1)
    )
    (chunk_s, _) = times.compute_s(StepWork(chunk_tokens=2048, chunk_context_tokens=256), 0)
    launched_s = 16 * 0.6e-3  # no graph replays it
    assert launched_s < both_s < decode_s + launched_s
    (filled_s, _) = times.compute_s(
        StepWork(rows=64, context_tokens=512, chunk_tokens=1984, chunk_context_tokens=256), 0
    )
    assert filled_s < 0.97 * (decode_s + chunk_s)
