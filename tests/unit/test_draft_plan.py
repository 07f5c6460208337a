"""Whether a run has drafts, and what they are reckoned to cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpipipe.config.schema import Config, MemoryConfig, PipelineConfig
from mpipipe.planning.job_plan import plan_job
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resources import RankResources
from mpipipe.planning.workload import SamplingUse, Workload
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.topology.gpu import GpuFacts
from mpipipe.types import CacheKind
from tests.unit.model_specs import OPENLLAMA_3B
from tests.unit.planned_rank import GIB, make_rank

ONE = Workload(
    num_requests=1,
    longest_request_tokens=640,
    num_prompt_tokens=512,
    num_output_tokens=128,
    sampling=SamplingUse(),
    lengths=((512, 128),),
)


def h100(num_ranks: int) -> list[RankResources]:
    return [
        make_rank(
            rank,
            memory_available_bytes=64 * GIB,
            gpu=GpuFacts(
                index=rank,
                name="NVIDIA H100 80GB HBM3",
                uuid=f"GPU-{rank}",
                capability=90,
                free_bytes=78 * GIB,
                nccl_version="2.28.9",
            ),
            attention_backends=("triton", "sdpa", "reference"),
        )
        for rank in range(num_ranks)
    ]


def planned(
    asked: int | str = "auto",
    *,
    workload: Workload = ONE,
    ranks: list[RankResources] | None = None,
    experts: int = 0,
    kv_cache: CacheKind = "paged",
) -> PipelinePlan:
    config = Config(
        pipeline=PipelineConfig(num_speculative_tokens=asked),
        memory=MemoryConfig(kv_cache=kv_cache),
    )
    spec = replace(OPENLLAMA_3B, dtype="bfloat16")
    if experts:
        spec = replace(spec, num_experts=experts)
    return plan_job(config, spec, ranks or h100(2), "/model", workload)[0]


def told(plan: PipelinePlan) -> list[tuple[str, str]]:
    return [
        (note.value, note.reason)
        for note in plan.resolved
        if note.setting == "pipeline.num_speculative_tokens"
    ]


def test_one_sequence_on_gpus_may_have_seven_drafted_tokens_beside_its_last() -> None:
    plan = planned()
    assert plan.drafts is not None
    assert (plan.drafts.max_tokens, plan.drafts.rows) == (7, (1, 2, 4, 8))
    assert (plan.max_sequences_per_slot, plan.max_decode_rows) == (1, 8)
    assert list(plan.drafts.step_s) == sorted(plan.drafts.step_s)
    assert plan.drafts.step_s[-1] < 1.2 * plan.drafts.step_s[0]
    assert plan.drafts.awaited_s > 0
    assert plan.drafts.alone, "two slots share the queue of the first stage"
    assert plan.drafts.key_s > 0
    assert PipelinePlan.from_json(plan.to_json()) == plan
    ((value, reason),) = told(plan)
    assert value == "7"
    assert "a step of 8 rows makes up to" in reason
    assert reason.endswith("forecasts do not count that")


def test_of_full_batches_only_few_rows_are_drafted() -> None:
    many = replace(ONE, num_requests=512, num_prompt_tokens=512 * 512, num_output_tokens=512 * 128)
    plan = planned(workload=replace(many, lengths=((512, 128),) * 512))
    assert plan.drafts is not None
    assert plan.drafts.rows[-1] == 64
    assert plan.max_decode_rows == plan.max_sequences_per_slot == 256


def test_none_are_made_where_they_are_not_wanted() -> None:
    plan = planned(0)
    assert plan.drafts is None
    assert told(plan) == []


def test_a_number_is_taken_as_it_is() -> None:
    plan = planned(3)
    assert plan.drafts is not None
    assert (plan.drafts.max_tokens, plan.drafts.rows[-1]) == (3, 4)


@pytest.mark.parametrize("asked", ["auto", 5])
def test_where_no_prompt_is_greedy_the_plan_says_why_there_are_none(asked: int | str) -> None:
    drawing = replace(ONE, sampling=SamplingUse(SamplingNeeds.DRAW, plain=False))
    plan = planned(asked, workload=drawing)
    assert plan.drafts is None
    ((value, reason),) = told(plan)
    assert value == "0"
    assert "every prompt draws its tokens" in reason


def test_a_cache_without_pages_cannot_take_a_draft_back() -> None:
    plan = planned(5, ranks=[make_rank(0)], kv_cache="contiguous")
    assert plan.drafts is None
    assert 'memory.kv_cache = "contiguous"' in told(plan)[0][1]


def test_rows_with_experts_of_their_own_are_drafted_only_if_asked_for() -> None:
    assert planned(experts=8).drafts is None
    assert planned(5, experts=8).drafts is not None


def test_on_a_cpu_nothing_is_awaited_that_was_sent_ahead() -> None:
    plan = planned(5, ranks=[make_rank(0), make_rank(1)])
    assert plan.lookahead == 0
    assert plan.drafts is not None
    assert plan.drafts.awaited_s == 0.0
    assert not plan.drafts.alone
