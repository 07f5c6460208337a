"""The split by which a job is predicted to end first, and the plan that takes it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from mpipipe.config.schema import Config, MemoryConfig, ModelConfig, PipelineConfig
from mpipipe.planning.job_plan import plan_job
from mpipipe.planning.known_times import KnownTimes
from mpipipe.planning.offload_advice import offload_cost
from mpipipe.planning.plan import PipelinePlan, Resolved, StagePlan
from mpipipe.planning.rate_times import with_offload
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.split_search import search_split, split_by_speed
from mpipipe.planning.workload import Workload
from mpipipe.topology.gpu import GpuFacts
from tests.unit.model_specs import OPENLLAMA_7B, SMOL
from tests.unit.planned_rank import GIB, make_rank

KIND = ["same"] * 8


def test_the_search_finds_the_best_of_small_splits() -> None:
    """A head of 2.4 layers, as in decode steps of Llama-3-8B."""

    def slowest(split: tuple[int, ...]) -> float:
        return max(*split[:-1], split[-1] + 2.4)

    assert search_split((8, 8, 8, 8), slowest, KIND) == (8, 9, 9, 6)
    assert search_split((13, 13), slowest, KIND) == (14, 12)
    assert search_split((5,), lambda split: 1.0, KIND) == (5,)


def test_a_gain_within_the_error_of_a_prediction_moves_no_layer() -> None:
    assert search_split((4, 4), lambda split: 1 - split[0] * 1e-4, KIND) == (4, 4)


def test_splits_that_do_not_fit_are_not_taken() -> None:
    tried = []

    def job_s(split: tuple[int, ...]) -> float:
        tried.append(split)
        return math.inf if max(split) > 9 else 100.0 - split[0]

    assert search_split((8, 8), job_s, KIND) == (9, 7)
    assert (10, 6) in tried
    assert len(tried) == len(set(tried))


def test_stages_of_one_kind_are_tried_once_and_others_each() -> None:
    def tried(kinds: list[str]) -> set[tuple[int, ...]]:
        splits: set[tuple[int, ...]] = set()

        def job_s(split: tuple[int, ...]) -> float:
            splits.add(split)
            return 1.0

        search_split((4, 4, 4, 4), job_s, kinds)
        return splits

    assert len(tried(KIND)) < len(tried(["a", "b", "c", "d"]))
    assert (4, 5, 3, 4) in tried(["a", "b", "c", "d"])
    assert (4, 3, 5, 4) in tried(["a", "b", "c", "d"])


# ---- the plan ------------------------------------------------------------------------------------


class LayerTimes:
    """Steps whose times are plain: a second a layer, and a head in decode steps."""

    source = "measured 2026-11-27 on a test"

    def __init__(self, head_layers: float) -> None:
        self.head_layers = head_layers

    def decode_s(self, stage: StagePlan, rows: float, context_tokens: float) -> float:
        return stage.num_layers + self.head_layers * stage.has_head

    def prefill_s(self, stage: StagePlan, tokens: int, context_tokens: float) -> float:
        return float(stage.num_layers)

    def hop_s(self, rows_or_tokens: int, crosses_hosts: bool) -> float:
        return 0.0


def known(head_layers: float, *files: str) -> Any:
    return lambda *_: KnownTimes(LayerTimes(head_layers), files)


def workload(num_requests: int, prompt: int, output: int) -> Workload:
    return Workload(
        num_requests=num_requests,
        longest_request_tokens=prompt + output,
        num_prompt_tokens=num_requests * prompt,
        num_output_tokens=num_requests * output,
        lengths=((prompt, output),) * num_requests,
    )


RANKS = [make_rank(rank) for rank in range(3)]
CONFIG = Config(model=ModelConfig(dtype="float32"))
DECODING, PROMPTS = workload(96, 16, 200), workload(96, 400, 2)


def planned(head_layers: float, work: Workload, config: Config = CONFIG) -> PipelinePlan:
    (plan,) = plan_job(config, SMOL, RANKS, "/m", work, times=known(head_layers, "/cache/p.json"))
    return plan


def split_of(plan: PipelinePlan) -> list[int]:
    return [stage.num_layers for stage in plan.stages]


def note_of(plan: PipelinePlan, setting: str) -> Resolved:
    (found,) = [note for note in plan.resolved if note.setting == setting]
    return found


def test_the_jobs_own_prompts_and_tokens_decide() -> None:
    assert split_of(planned(6.0, DECODING)) == [12, 12, 6]
    assert split_of(planned(6.0, PROMPTS)) == [10, 10, 10]
    assert split_of(planned(0.0, DECODING)) == [10, 10, 10]


def test_the_plan_says_by_which_prediction_and_by_which_times() -> None:
    plan = planned(9.0, DECODING)
    balanced = make_plan(CONFIG, SMOL, RANKS, "/m", DECODING)
    assert split_of(balanced) != [13, 13, 4]
    split, times = note_of(plan, "pipeline.split"), note_of(plan, "forecast.times")
    assert split.value == "[13, 13, 4]"
    assert "the job is predicted to take" in split.reason
    assert str(split_of(balanced)) in split.reason
    assert (times.value, times.reason) == (LayerTimes.source, "/cache/p.json")
    assert [stage.cost_share for stage in plan.stages] == pytest.approx([1 / 3] * 3, abs=0.01)
    assert not [
        note
        for note in plan_job(CONFIG, SMOL, RANKS, "/m", DECODING, times=known(6.0))[0].resolved
        if note.setting == "forecast.times"
    ], "rates are no measurement"


def test_a_split_that_is_asked_for_and_unknown_lengths_are_left_alone() -> None:
    asked = replace(CONFIG, pipeline=PipelineConfig(split=(20, 5, 5)))
    assert split_of(planned(6.0, DECODING, asked)) == [20, 5, 5]
    unknown = replace(DECODING, lengths=())
    plain = replace(CONFIG, pipeline=PipelineConfig(num_speculative_tokens=0))
    assert planned(6.0, unknown, plain) == make_plan(plain, SMOL, RANKS, "/m", unknown)


def test_what_is_said_of_offload_goes_by_measured_times_too() -> None:
    memory = MemoryConfig(device_bytes=150 * 2**20, offload_dir="/scratch/o")
    config = replace(CONFIG, memory=memory)
    (by_rates,) = plan_job(config, SMOL, RANKS, "/m", DECODING, times=known(9.0))
    plan = planned(9.0, DECODING, config)
    steps = known(9.0)(SMOL, plan, RANKS).steps
    for stage, reckoned in zip(plan.stages, by_rates.stages, strict=True):
        assert stage.offload is not None
        assert reckoned.offload is not None
        forecast = stage.offload.forecast
        alone = replace(stage, offload=None)
        assert forecast.compute_s == steps.decode_s(alone, forecast.rows, 116.5)
        assert forecast.compute_s != reckoned.offload.forecast.compute_s
        assert forecast.disk_s == reckoned.offload.forecast.disk_s > 0
        step_s = with_offload(stage.offload, forecast.compute_s, forecast.rows)
        assert step_s == pytest.approx(forecast.step_s)
    cost = note_of(plan, "memory.offload")
    assert cost.value == offload_cost([s.offload.forecast for s in plan.stages if s.offload])
    assert cost.reason == note_of(by_rates, "memory.offload").reason
    assert "tokens/s" not in cost.reason, "the forecast says so, by measured times"


@pytest.mark.parametrize(("gib", "fewest", "most"), [(80, 19, 19), (15, 16, 18)])
def test_kv_pages_count_as_much_as_time(gib: int, fewest: int, most: int) -> None:
    """Pages are the same on all stages: with most layers on one of them, few sequences run."""
    size = gib * GIB
    gpu = GpuFacts(name="Tesla T4", capability=75, memory_bytes=size, free_bytes=size)
    ranks = [make_rank(rank, gpu=replace(gpu, index=rank, uuid=f"g{rank}")) for rank in range(2)]
    config = Config(model=ModelConfig(dtype="float16"))
    work = workload(512, 500, 500)
    (plan,) = plan_job(config, OPENLLAMA_7B, ranks, "/m", work, times=known(8.0))
    assert fewest <= plan.stages[0].num_layers <= most


def test_replicas_that_are_alike_take_one_split() -> None:
    ranks = [make_rank(rank) for rank in range(6)]
    config = replace(CONFIG, pipeline=PipelineConfig(replicas=2))
    plans = plan_job(config, SMOL, ranks, "/m", workload(192, 16, 200), times=known(9.0))
    assert [split_of(plan) for plan in plans] == [[13, 13, 4]] * 2
    for plan in plans:
        assert sum(stage.cost_share for stage in plan.stages) == pytest.approx(1.0, abs=1e-4)


def test_unlike_devices_get_layers_by_their_speed() -> None:
    assert split_by_speed(10, (4.0, 1.0)) == (8, 2)
    assert split_by_speed(3, (100.0, 1.0, 1.0)) == (1, 1, 1)


def test_the_search_looks_near_the_starts_that_it_is_given() -> None:
    """One layer after the other it would not come so far: every step costs."""

    def job_s(split: tuple[int, ...]) -> float:
        return 1.0 if split == (9, 1) else 2.0 + 0.0001 * split[0]

    assert search_split((5, 5), job_s, ["a", "b"]) == (5, 5)
    assert search_split((5, 5), job_s, ["a", "b"], [(8, 2)]) == (5, 5)
    assert search_split((5, 5), job_s, ["a", "b"], [(9, 1)]) == (9, 1)
