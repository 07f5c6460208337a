"""Lanes in a plan: which ranks share a stage, and what each of them holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mpipipe.checkpoint.spec import read_spec
from mpipipe.config.schema import MemoryConfig, PipelineConfig
from mpipipe.errors import EnvironmentSetupError, PlanError, UnsupportedModelError
from mpipipe.planning.cost import head_weight_bytes, kv_page_bytes, layer_weight_bytes
from mpipipe.planning.explain import plan_lines
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.rate_times import rate_times
from mpipipe.planning.tensor_parallel import lane_spec
from mpipipe.types import Shard
from tests.unit.model_specs import OPENLLAMA_7B, SMOL
from tests.unit.test_gpu_plan import LLAMA_3_8B, h200
from tests.unit.test_gpu_plan import plan as gpu_plan
from tests.unit.test_resolve import GIB, plan, ranks

THREE = PipelineConfig(tensor_parallel=3)
TWO = PipelineConfig(tensor_parallel=2)


def test_consecutive_ranks_of_a_host_share_a_stage() -> None:
    made = plan(ranks("a", "a", "a", "b", "b", "b"), pipeline=THREE)
    assert [stage.ranks for stage in made.stages] == [(0, 1, 2), (3, 4, 5)]
    assert [stage.rank for stage in made.stages] == [0, 3]
    assert (made.num_stages, made.tensor_parallel, made.num_slots) == (2, 3, 2)
    assert [made.stage_of_rank(rank).stage for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [made.lane_of_rank(rank) for rank in range(6)] == [0, 1, 2, 0, 1, 2]
    assert (made.rank_of(1, 2), made.rank_of(-1, 0), made.head_rank) == (5, 3, 0)
    assert made.ranks == (0, 1, 2, 3, 4, 5)
    assert made.transport == "mpi"
    assert PipelinePlan.from_json(made.to_json()) == made


def test_ranks_that_a_launcher_deals_round_the_hosts_share_stages_host_by_host() -> None:
    made = plan(ranks("a", "b", "a", "b", "a", "b"), pipeline=THREE)
    assert [stage.ranks for stage in made.stages] == [(0, 2, 4), (1, 3, 5)]
    assert [stage.host for stage in made.stages] == ["a", "b"]


def test_one_stage_of_several_lanes_sends_over_mpi() -> None:
    made = plan(ranks(*"aaa"), pipeline=THREE)
    assert (made.num_stages, made.transport) == (1, "mpi")


def test_a_lane_holds_its_part_of_layers_and_head_and_the_whole_embedding() -> None:
    spec = lane_spec(SMOL, 3)
    assert layer_weight_bytes(spec, "float32") * 3 == layer_weight_bytes(SMOL, "float32")
    assert head_weight_bytes(spec, "float32") * 3 == head_weight_bytes(SMOL, "float32")
    assert spec.embedding_parameters == SMOL.embedding_parameters
    pages = [
        kv_page_bytes(shapes, "float32", num_layers=2, page_size_tokens=16)
        for shapes in (spec, SMOL)
    ]
    assert pages[0] * 3 == pages[1]
    assert lane_spec(SMOL, 1) is SMOL


def test_a_vocabulary_that_does_not_divide_keeps_the_head_whole() -> None:
    odd = replace(SMOL, vocab_size=49153)
    assert head_weight_bytes(lane_spec(odd, 3), "float32") == head_weight_bytes(odd, "float32")


def test_lanes_leave_room_for_more_pages() -> None:
    memory = MemoryConfig(kv_cache_bytes=GIB)
    few = plan(ranks("a", memory=64 * GIB), spec=OPENLLAMA_7B, memory=memory)
    many = plan(ranks("a", "a", memory=64 * GIB), spec=OPENLLAMA_7B, memory=memory, pipeline=TWO)
    assert many.num_kv_pages == 2 * few.num_kv_pages


def test_weights_of_all_lanes_count_against_their_host() -> None:
    needed = plan(ranks("a", "a", memory=64 * GIB), spec=OPENLLAMA_7B, pipeline=TWO)
    both = 2 * needed.stages[0].weight_bytes
    with pytest.raises(PlanError, match="ranks 0, 1 together on a would hold"):
        plan(
            ranks("a", "a", memory=both - GIB),
            spec=OPENLLAMA_7B,
            pipeline=TWO,
            memory=MemoryConfig(num_kv_pages=1),
        )


def test_the_plan_shows_the_lanes() -> None:
    text = "\n".join(plan_lines(plan(ranks(*"aaa"), pipeline=THREE)))
    assert "ranks 0, 1, 2 on a" in text
    assert "of weights each" in text
    assert "pipeline.tensor_parallel" in text
    assert "tensor_parallel" not in "\n".join(plan_lines(plan(ranks("a"))))


@pytest.mark.parametrize(
    ("num_lanes", "spec", "said"),
    [
        (2, SMOL, "= 2 does not divide the model's 9 attention heads: set it to 1 or 3"),
        (4, replace(OPENLLAMA_7B, num_kv_heads=2), "4 does not divide the model's 2 key/value"),
        (2, replace(OPENLLAMA_7B, intermediate_size=11007), "11007 channels"),
    ],
)
def test_what_the_lanes_do_not_divide_is_refused(num_lanes: int, spec: object, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        lane_spec(spec, num_lanes)  # type: ignore[arg-type]


def test_experts_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"8 experts a layer; set pipeline\.tensor"):
        lane_spec(replace(OPENLLAMA_7B, num_experts=8), 2)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "phi3"}, "query, key and value are one matrix"),
        ({"model_type": "glm4"}, "gate and up are one matrix"),
        ({"model_type": "olmo2"}, "over all heads together"),
        ({"model_type": "cohere", "use_qk_norm": True}, r"each head's own \(use_qk_norm\)"),
        ({"model_type": "cohere"}, ""),
        ({"model_type": "llama"}, ""),
    ],
)
def test_families_whose_layers_lanes_cannot_share_are_refused_by_the_plan(
    config: dict[str, object], said: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 96, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(sizes | config))
    spec = read_spec(tmp_path)
    assert plan(ranks("a", "a"), spec=spec).num_stages == 2
    if not said:
        assert plan(ranks("a", "a"), spec=spec, pipeline=TWO).tensor_parallel == 2
        return
    with pytest.raises(
        UnsupportedModelError, match=rf"{said}.*; set pipeline\.tensor_parallel = 1"
    ):
        plan(ranks("a", "a"), spec=spec, pipeline=TWO)


def test_ranks_that_lanes_do_not_divide_are_refused() -> None:
    with pytest.raises(EnvironmentSetupError, match="start a multiple of 3 ranks"):
        plan(ranks(*"aaaa"), pipeline=THREE)
    with pytest.raises(EnvironmentSetupError, match=r"every stage is 3 ranks .*mpirun -n 6"):
        plan(ranks(*"aaa"), pipeline=replace(THREE, num_stages=2))


def test_lanes_on_two_hosts_are_refused() -> None:
    with pytest.raises(PlanError, match="ranks 0 on a and 2 on b would share a stage"):
        plan(ranks("a", "a", "b", "b", "b", "b"), pipeline=THREE)


def test_lanes_on_gpus_need_nccl() -> None:
    made = gpu_plan(h200(2), TWO, spec=LLAMA_3_8B)
    assert (made.transport, made.num_stages, made.cuda_graphs) == ("nccl", 1, True)
    with pytest.raises(PlanError, match='needs NCCL, but tensors travel over "mpi"'):
        gpu_plan(h200(2), replace(TWO, transport="mpi"), spec=LLAMA_3_8B)


def test_a_shard_is_one_of_equal_parts() -> None:
    rows, columns = Shard(0, 1, 3), Shard(1, 2, 3)
    assert rows.whole((4, 5)) == (12, 5)
    assert columns.whole((4, 5)) == (4, 15)
    assert rows.bounds(12) == (4, 4)
    assert columns.bounds(15) == (10, 5)


# ---- what it takes -------------------------------------------------------------------------------


def test_lanes_halve_a_step_but_for_what_they_add_up() -> None:
    world = h200(2)
    one = gpu_plan(world[:1], PipelineConfig(), spec=LLAMA_3_8B)
    two = gpu_plan(world, TWO, spec=LLAMA_3_8B)
    alone, both = (rate_times(LLAMA_3_8B, made, world) for made in (one, two))
    rows, context = 1, 500.0
    sums_s = 2 * LLAMA_3_8B.num_layers * both.near.latency_s
    step_s = both.decode_s(two.stages[0], rows, context)
    assert 0.5 * alone.decode_s(one.stages[0], rows, context) < step_s - sums_s
    assert step_s < 0.8 * alone.decode_s(one.stages[0], rows, context)
    slow = replace(both, near=replace(both.near, bytes_per_s=1e9))
    prompts_s = [times.prefill_s(two.stages[0], 4096, 256.0) for times in (both, slow)]
    assert prompts_s[1] > 4 * prompts_s[0]


def test_lanes_on_cpus_take_the_time_of_two_sums_of_all_parts_a_layer() -> None:
    world = ranks(*"aaa")
    made = plan(world, pipeline=THREE)
    times, (stage,), rows = rate_times(SMOL, made, world), made.stages, 8
    alone = replace(times, num_lanes=1)
    sum_s = 0.17e-3 + 2 * rows * SMOL.hidden_size * 4 / 1.5e9
    for both, one in (
        (times.decode_s(stage, rows, 100.0), alone.decode_s(stage, rows, 100.0)),
        (times.prefill_s(stage, rows, 4.0), alone.prefill_s(stage, rows, 4.0)),
    ):
        assert both - one == pytest.approx(2 * SMOL.num_layers * sum_s)
    headless = replace(times, spec=replace(times.spec, head_rows=0))
    assert headless.decode_s(stage, rows, 100.0) != times.decode_s(stage, rows, 100.0)
