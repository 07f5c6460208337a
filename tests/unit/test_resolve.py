from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from mpipipe.checkpoint.families import RotaryFacts
from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import Config, MemoryConfig, ModelConfig, PipelineConfig
from mpipipe.errors import EnvironmentSetupError, PlanError
from mpipipe.planning.cost import (
    CPU_CORE,
    head_cost_in_layers,
    head_decode_cost,
    kv_page_bytes,
    layer_decode_cost,
    stage_weight_bytes,
)
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.resources import RankResources
from mpipipe.planning.workload import Workload
from mpipipe.types import CacheKind
from tests.unit.model_specs import SMOL
from tests.unit.planned_rank import make_rank

GIB = 2**30

LAYER_BYTES = 3_538_944 * 4
MATRIX_BYTES = 49152 * 576 * 4
PAGE_BYTES_OF_LAYER = 16 * 2 * 3 * 64 * 4


def ranks(*hosts: str, memory: int = 16 * GIB, cores: int = 8) -> list[RankResources]:
    return [
        make_rank(r, host, num_cores=cores, memory_available_bytes=memory)
        for r, host in enumerate(hosts)
    ]


def plan(
    world: list[RankResources],
    *,
    pipeline: PipelineConfig | None = None,
    memory: MemoryConfig | None = None,
    model: ModelConfig | None = None,
    spec: ModelSpec = SMOL,
    longest: int | None = None,
    num_requests: int | None = None,
) -> PipelinePlan:
    config = Config(
        model=model or ModelConfig(),
        pipeline=pipeline or PipelineConfig(),
        memory=memory or MemoryConfig(),
    )
    return make_plan(
        config,
        spec,
        world,
        "/models/smol",
        Workload(num_requests=num_requests, longest_request_tokens=longest),
    )


def reason(made: PipelinePlan, setting: str) -> str:
    (found,) = [entry.reason for entry in made.resolved if entry.setting == setting]
    return found


# ---- costs ---------------------------------------------------------------------------------------


def test_predicted_decode_times_match_the_measured_ones() -> None:
    assert 1.7e-3 <= layer_decode_cost(SMOL, "float32").seconds(CPU_CORE) <= 1.9e-3
    assert head_decode_cost(SMOL, "float32").seconds(CPU_CORE) == pytest.approx(11e-3, rel=0.05)
    assert 5.8 <= head_cost_in_layers(SMOL, "float32") <= 6.5


def test_many_sequences_make_a_step_cost_arithmetic_instead_of_traffic() -> None:
    few = head_decode_cost(SMOL, "float32", num_sequences=1)
    many = head_decode_cost(SMOL, "float32", num_sequences=64)
    assert few.bytes_moved == many.bytes_moved
    assert many.flops == 64 * few.flops
    assert many.seconds(CPU_CORE) > 2 * few.seconds(CPU_CORE)


def test_weights_count_embedding_and_head_and_a_tied_matrix_once_per_stage() -> None:
    def stage(spec: ModelSpec, *, first: bool, last: bool) -> int:
        return stage_weight_bytes(spec, "float32", num_layers=2, has_embedding=first, has_head=last)

    untied = replace(SMOL, tied_embeddings=False)
    assert stage(SMOL, first=False, last=False) == 2 * LAYER_BYTES
    assert stage(SMOL, first=True, last=False) == 2 * LAYER_BYTES + MATRIX_BYTES
    assert stage(SMOL, first=True, last=True) == 2 * LAYER_BYTES + MATRIX_BYTES
    assert stage(untied, first=True, last=True) == 2 * LAYER_BYTES + 2 * MATRIX_BYTES


def test_a_page_costs_what_its_layers_keep() -> None:
    assert (
        kv_page_bytes(SMOL, "float32", num_layers=3, page_size_tokens=16) == 3 * PAGE_BYTES_OF_LAYER
    )
    assert (
        kv_page_bytes(SMOL, "bfloat16", num_layers=3, page_size_tokens=16)
        == 3 * PAGE_BYTES_OF_LAYER // 2
    )


# ---- autos ---------------------------------------------------------------------------------------


def test_every_auto_of_two_ranks_gets_a_value_and_a_reason() -> None:
    made = plan(ranks("a", "b"), longest=200, num_requests=16)
    assert made.num_stages == 2
    assert [stage.num_layers for stage in made.stages] == [18, 12]
    assert [(s.has_embedding, s.has_head) for s in made.stages] == [(True, False), (False, True)]
    assert [s.weight_bytes for s in made.stages] == [
        18 * LAYER_BYTES + MATRIX_BYTES,
        12 * LAYER_BYTES + MATRIX_BYTES,
    ]
    assert sum(s.cost_share for s in made.stages) == pytest.approx(1)
    assert (made.dtype, made.transport, made.device, made.attention) == (
        "float32",
        "mpi",
        "cpu",
        "sdpa",
    )
    assert (made.num_slots, made.max_sequences_per_slot, made.max_tokens_per_step) == (2, 32, 512)
    assert made.max_context_tokens == 8192
    assert (made.lookahead, made.prefill, made.cuda_graphs) == (0, "mixed", False)
    assert (made.weights, made.max_sequence_tokens) == ("checkpoint", 8192)
    assert made.threads_per_rank == 8
    assert {entry.setting for entry in made.resolved} == {
        "model.dtype",
        "pipeline.num_stages",
        "pipeline.layout",
        "pipeline.split",
        "pipeline.num_slots",
        "pipeline.max_sequences_per_slot",
        "pipeline.max_tokens_per_step",
        "pipeline.transport",
        "pipeline.device",
        "pipeline.attention",
        "pipeline.lookahead",
        "pipeline.prefill",
        "pipeline.threads_per_rank",
        "memory.max_context_tokens",
        "memory.num_kv_pages",
    }
    assert all(entry.reason for entry in made.resolved)


def test_the_plan_does_not_depend_on_the_order_of_the_ranks() -> None:
    world = ranks("a", "b", "a")
    plans = {plan(list(order)).to_json() for order in permutations(world)}
    assert len(plans) == 1


def test_one_rank_holds_everything_and_sends_to_no_rank() -> None:
    made = plan(ranks("a"))
    (stage,) = made.stages
    assert (stage.first_layer, stage.last_layer) == (0, 30)
    assert stage.has_embedding
    assert stage.has_head
    assert stage.weight_bytes == 30 * LAYER_BYTES + MATRIX_BYTES
    assert stage.cost_share == 1
    assert made.transport == "loopback"
    assert made.num_slots == 1


def test_asked_for_values_are_taken_and_get_no_reason() -> None:
    pipeline = PipelineConfig(
        num_stages=2,
        split=(10, 20),
        num_slots=1,
        max_sequences_per_slot=600,
        threads_per_rank=3,
        attention="reference",
        transport="mpi",
        device="cpu",
        lookahead=1,
        prefill="mixed",
    )
    memory = MemoryConfig(num_kv_pages=77, max_context_tokens=1024, page_size_tokens=8)
    made = plan(
        ranks("a", "b"), pipeline=pipeline, memory=memory, model=ModelConfig(dtype="bfloat16")
    )
    assert [stage.num_layers for stage in made.stages] == [10, 20]
    assert (made.num_slots, made.max_sequences_per_slot, made.threads_per_rank) == (1, 600, 3)
    assert made.max_tokens_per_step == 600  # a token for every sequence
    assert (made.attention, made.dtype) == ("reference", "bfloat16")
    assert (made.num_kv_pages, made.max_context_tokens, made.page_size_tokens) == (77, 1024, 8)
    assert (made.lookahead, made.prefill, made.max_sequence_tokens) == (1, "mixed", 1024)
    settings = [entry.setting for entry in made.resolved]
    assert settings == ["pipeline.max_tokens_per_step", "pipeline.layout"]


@pytest.mark.parametrize(
    ("hosts", "cores", "threads"),
    [(("a", "b"), 8, 8), (("a", "a"), 8, 4), (("a", "a", "b"), 8, 4), (("a",) * 4, 2, 1)],
)
def test_threads_share_the_cores_of_the_fullest_host(
    hosts: tuple[str, ...], cores: int, threads: int
) -> None:
    made = plan(ranks(*hosts, cores=cores))
    assert made.threads_per_rank == threads
    assert f"for {max(map(hosts.count, hosts))} ranks" in reason(made, "pipeline.threads_per_rank")


# ---- pages ---------------------------------------------------------------------------------------


def test_auto_pages_are_no_more_than_the_run_can_use() -> None:
    made = plan(ranks("a"), longest=100, num_requests=8)
    assert made.num_kv_pages == 8 * 7 + 4  # 7 pages each, and half a page each of headroom
    assert "8 sequences of at most 100 tokens" in reason(made, "memory.num_kv_pages")
    made = plan(ranks("a"), longest=100, num_requests=10_000)
    assert made.num_kv_pages == 32 * 7 + 16
    made = plan(
        ranks("a", memory=64 * GIB), memory=MemoryConfig(max_context_tokens=64), longest=10**9
    )
    assert made.num_kv_pages == 32 * 4 + 16


def test_auto_pages_are_a_quarter_of_what_the_weights_leave_on_the_tightest_rank() -> None:
    world = [make_rank(0, "a"), make_rank(1, "b", memory_available_bytes=2 * GIB)]
    made = plan(world)
    left = 2 * GIB - made.stages[1].weight_bytes
    assert made.num_kv_pages == left // 4 // (12 * PAGE_BYTES_OF_LAYER)
    assert "a quarter of rank 1's share" in reason(made, "memory.num_kv_pages")


def test_ranks_of_one_host_share_its_memory() -> None:
    made = plan(ranks("a", "a", memory=2 * GIB))
    left = 2 * GIB - sum(stage.weight_bytes for stage in made.stages)
    assert made.num_kv_pages == left // 2 // 4 // (18 * PAGE_BYTES_OF_LAYER)


def test_auto_pages_hold_the_longest_request_even_beyond_a_quarter() -> None:
    spec = replace(SMOL, max_context_tokens=100_000)
    made = plan(ranks("a", memory=2 * GIB), spec=spec, longest=16_000)
    assert made.num_kv_pages == 1000
    assert "least that holds the longest request" in reason(made, "memory.num_kv_pages")


def test_bytes_become_pages_of_the_rank_with_the_most_layers() -> None:
    made = plan(ranks("a", "b"), memory=MemoryConfig(kv_cache_bytes=50 * 2**20))
    assert made.num_kv_pages == 50 * 2**20 // (18 * PAGE_BYTES_OF_LAYER)
    assert "kv_cache_bytes" in reason(made, "memory.num_kv_pages")


def test_asked_for_pages_win_over_bytes() -> None:
    made = plan(ranks("a"), memory=MemoryConfig(kv_cache_bytes=50 * 2**20, num_kv_pages=9))
    assert made.num_kv_pages == 9


@pytest.mark.parametrize("kv_cache", ["paged", "contiguous"])
def test_too_few_pages_for_the_longest_request_are_refused(
    kv_cache: CacheKind,
) -> None:
    memory = MemoryConfig(num_kv_pages=6, kv_cache=kv_cache)
    with pytest.raises(PlanError, match=r"6 pages of 16 tokens.*request of 100 tokens needs 7"):
        plan(ranks("a"), memory=memory, longest=100)
    assert plan(ranks("a"), memory=memory, longest=96).num_kv_pages == 6


def test_bytes_below_one_page_are_refused() -> None:
    with pytest.raises(PlanError, match="0 pages of 16 tokens"):
        plan(ranks("a"), memory=MemoryConfig(kv_cache_bytes=1000))


def test_a_request_beyond_the_context_asks_for_no_more_pages_than_the_context() -> None:
    memory = MemoryConfig(num_kv_pages=4, max_context_tokens=64)
    assert plan(ranks("a"), memory=memory, longest=10**9).num_kv_pages == 4


# ---- what cannot be ------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_refused_with_host_and_sizes() -> None:
    with pytest.raises(PlanError, match=r"rank 0 on a would hold 0\.50 GiB of weights, but only"):
        plan(ranks("a", memory=GIB // 4))
    with pytest.raises(PlanError, match=r"ranks 0, 1 together on a would hold 0\.61 GiB"):
        plan(ranks("a", "a", memory=GIB // 2))


def test_a_cache_that_does_not_fit_beside_the_weights_is_refused() -> None:
    memory = MemoryConfig(num_kv_pages=10_000)
    with pytest.raises(PlanError, match=r"of weights and 6\.87 GiB of KV cache.*lower memory\."):
        plan(ranks("a", memory=4 * GIB), memory=memory)


def test_another_number_of_ranks_than_stages_says_how_to_launch() -> None:
    with pytest.raises(EnvironmentSetupError, match=r"num_stages = 3, but there is 1 rank.*-n 3"):
        plan(ranks("a"), pipeline=PipelineConfig(num_stages=3))
    with pytest.raises(EnvironmentSetupError, match=r"num_stages = 1, but there are 2 ranks"):
        plan(ranks("a", "b"), pipeline=PipelineConfig(num_stages=1))


def test_more_ranks_than_layers_or_a_wrong_split_are_refused() -> None:
    with pytest.raises(PlanError, match="3 stages"):
        plan(ranks("a", "b", "c"), spec=replace(SMOL, num_layers=2))
    with pytest.raises(PlanError, match="adds up to 29"):
        plan(ranks("a", "b"), pipeline=PipelineConfig(split=(14, 15)))


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(PlanError, match=r"max_context_tokens = 9000 is more than the 8192"):
        plan(ranks("a"), memory=MemoryConfig(max_context_tokens=9000))


def test_a_stretched_context_is_told_with_its_reason() -> None:
    stretched = replace(SMOL, rotary=RotaryFacts("yarn", stretched_tokens=8192))
    made = plan(ranks("a"), spec=stretched)
    assert reason(made, "memory.max_context_tokens") == (
        "the model's positions, stretched by its rotary embedding (yarn)"
    )


def test_a_small_step_budget_lowers_the_size_of_a_slot_that_is_left_open() -> None:
    made = plan(ranks("a"), pipeline=PipelineConfig(max_tokens_per_step=8))
    assert (made.max_tokens_per_step, made.max_sequences_per_slot) == (8, 8)


def test_a_step_budget_below_the_slot_size_is_refused() -> None:
    pipeline = PipelineConfig(max_tokens_per_step=8, max_sequences_per_slot=9)
    with pytest.raises(PlanError, match=r"max_tokens_per_step = 8 is less than .* = 9"):
        plan(ranks("a"), pipeline=pipeline)
