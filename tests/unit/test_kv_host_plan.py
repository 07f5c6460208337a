"""KV pages in host memory: how many the plan takes, for which sequences, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mpipipe.config.schema import Config, MemoryConfig, PipelineConfig
from mpipipe.errors import PlanError
from mpipipe.planning.cost import kv_page_bytes
from mpipipe.planning.explain import plan_lines
from mpipipe.planning.links import compute_ceilings
from mpipipe.planning.offload_search import RankRoom
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.rank_rooms import rank_rooms
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.resources import RankResources
from mpipipe.planning.workload import Workload
from mpipipe.topology.gpu import GpuFacts
from mpipipe.types import CacheKind
from tests.unit.model_specs import OPENLLAMA_7B
from tests.unit.planned_rank import GIB, make_rank, with_gpu

PAGE_BYTES = kv_page_bytes(OPENLLAMA_7B, "float16", num_layers=32, page_size_tokens=16)


def gpus(num_ranks: int, *, free: int = 22 * GIB, host: int = 60 * GIB) -> list[RankResources]:
    """As an L4 or a T4 of more memory: link of generation 3."""
    return [
        make_rank(
            rank,
            memory_available_bytes=host,
            gpu=GpuFacts(
                index=rank,
                name="Tesla T4",
                uuid=f"GPU-{rank}",
                capability=75,
                free_bytes=free,
                nccl_version="2.28.9",
                link_generation=3,
                link_width=16,
            ),
            attention_backends=("triton", "sdpa", "reference"),
        )
        for rank in range(num_ranks)
    ]


def plan(
    world: list[RankResources],
    kv_host_bytes: int | str = "auto",
    *,
    num_requests: int = 256,
    longest: int = 1024,
    kv_cache: CacheKind = "paged",
    num_kv_pages: int | str = "auto",
    device: bool = True,
) -> PipelinePlan:
    memory = MemoryConfig(kv_host_bytes=kv_host_bytes, kv_cache=kv_cache, num_kv_pages=num_kv_pages)
    pipeline = PipelineConfig(device="cuda" if device else "cpu")
    workload = Workload(
        num_requests=num_requests,
        longest_request_tokens=longest,
        num_prompt_tokens=num_requests * longest // 2,
        num_output_tokens=num_requests * longest // 2,
    )
    config = Config(memory=memory, pipeline=pipeline)
    return make_plan(config, OPENLLAMA_7B, world, "/models/m", workload)


def reason(made: PipelinePlan) -> str:
    return next((n.reason for n in made.resolved if n.setting == "memory.kv_host_bytes"), "")


def test_a_gpu_whose_cache_is_too_small_gets_pages_in_host_memory_by_itself() -> None:
    made = plan(gpus(1))
    assert made.num_kv_pages < 256 * 64
    assert 0 < made.num_host_pages <= made.num_kv_pages
    assert made.num_host_pages * PAGE_BYTES <= 0.7 * 60 * GIB
    assert f"{made.num_host_pages} pages for preempted sequences" in reason(made)
    assert any("memory.kv_host_bytes" in line for line in plan_lines(made))
    assert PipelinePlan.from_json(made.to_json()) == made


def test_pages_that_take_longer_to_pin_than_they_spare_are_not_taken_unasked() -> None:
    fast = [with_gpu(r, name="H100", capability=90, link_generation=5) for r in gpus(1)]
    short = plan(fast)
    assert short.num_host_pages == 0
    assert "would spare" in reason(short)
    assert "GiB for them takes about" in reason(short)
    assert plan(fast, 8 * GIB).num_host_pages == 8 * GIB // PAGE_BYTES
    assert plan(fast, num_requests=20_000).num_host_pages > 0
    unknown = make_plan(Config(pipeline=PipelineConfig(device="cuda")), OPENLLAMA_7B, fast, "/m")
    assert unknown.num_host_pages == 0
    assert "is not known" in reason(unknown)


def test_a_cache_that_holds_everything_needs_none() -> None:
    made = plan(gpus(1), num_requests=4)
    assert made.num_host_pages == 0
    assert not reason(made)
    asked = plan(gpus(1), 8 * GIB, num_requests=4)
    assert asked.num_host_pages == 0
    assert "none are needed" in reason(asked)


def test_as_many_as_are_asked_for_and_can_be_used() -> None:
    made = plan(gpus(1), 8 * GIB)
    assert made.num_host_pages == 8 * GIB // PAGE_BYTES
    many = plan(gpus(1, host=400 * GIB), 300 * GIB)
    assert many.num_host_pages == 256 * 64


def test_none_of_a_host_that_has_no_memory_to_spare() -> None:
    made = plan(gpus(1, host=GIB))
    assert made.num_host_pages == 0
    assert "no memory to spare" in reason(made)


def test_zero_takes_none_and_says_nothing() -> None:
    made = plan(gpus(1), 0)
    assert made.num_host_pages == 0
    assert not reason(made)


def test_the_faster_the_link_the_shorter_the_sequences_that_are_moved() -> None:
    slow = [with_gpu(rank, link_generation=2) for rank in gpus(1)]
    slower = [with_gpu(rank, link_generation=1, link_width=1) for rank in gpus(1)]
    tokens = [plan(world).min_saved_tokens for world in (gpus(1), slow)]
    assert 1 <= tokens[0] < tokens[1]
    never = plan(slower)
    assert never.num_host_pages == 0
    assert "computed anew, which is cheaper" in reason(never)


def test_the_tokens_are_those_at_which_both_cost_the_same() -> None:
    """By the plan's own figures: compute 2 · 6.5e9 FLOP, move 2 · 0.5 · 512 KiB."""
    made = plan(gpus(1))
    flops_per_s = compute_ceilings(gpus(1)[0].gpu, 1).flops_per_s
    token_s = 2 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) / flops_per_s
    moved_s = PAGE_BYTES / (0.985e9 * 16 * 0.75)
    breaks_even = moved_s / (token_s - moved_s / 16)
    assert breaks_even <= made.min_saved_tokens <= breaks_even + 1
    assert f"{token_s * 1e6:.3g} µs to compute it again" in reason(made)


def test_cpu_ranks_have_pages_in_host_memory_only_where_asked_for() -> None:
    world = [replace(rank, gpu=GpuFacts()) for rank in gpus(2, host=200 * GIB)]
    made = plan(world, device=False, num_kv_pages=100)
    assert made.num_host_pages == 0
    assert not reason(made)
    asked = plan(world, 2 * GIB, device=False, num_kv_pages=100)
    assert 0 < asked.num_host_pages <= 2 * GIB // (PAGE_BYTES // 2)
    assert asked.min_saved_tokens == 1


@pytest.mark.parametrize(
    ("kv_host_bytes", "host", "words"),
    [
        (PAGE_BYTES - 1, 60, ("holds no page", f"at least {PAGE_BYTES}", "or to 0")),
        (59 * GIB, 60, ("59.00 GiB", "rank 0 on node1", "58.50 GiB", "lower")),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(
    kv_host_bytes: int, host: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(PlanError) as raised:
        plan(gpus(1, host=host * GIB), kv_host_bytes)
    for word in (*words, "memory.kv_host_bytes"):
        assert word in str(raised.value)


def test_a_cache_without_pages_moves_none() -> None:
    world = [replace(rank, gpu=GpuFacts()) for rank in gpus(1, host=200 * GIB)]
    assert plan(world, device=False, kv_cache="contiguous").num_host_pages == 0
    with pytest.raises(PlanError, match='"contiguous" has none'):
        plan(world, GIB, device=False, kv_cache="contiguous")


# ---- the cache of some layers in host memory -----------------------------------------------------


def small(
    kv_host_bytes: int | str = 70 * GIB,
    *,
    num_output_tokens: int = 256 * 128,
    link_generation: int = 3,
    **fields: Any,
) -> PipelinePlan:
    """A model of 12.6 GiB on a device of 4 GiB, whose cache is what limits its rows."""
    memory = MemoryConfig(device_bytes=4 * GIB, kv_host_bytes=kv_host_bytes)
    memory = replace(memory, **fields)
    workload = Workload(
        num_requests=256,
        longest_request_tokens=640,
        num_prompt_tokens=256 * 512,
        num_output_tokens=num_output_tokens,
    )
    config = Config(memory=memory, pipeline=PipelineConfig(device="cuda"))
    (rank,) = gpus(1, host=100 * GIB)
    rank = replace(rank, gpu=replace(rank.gpu, link_generation=link_generation))
    return make_plan(config, OPENLLAMA_7B, [rank], "/models/m", workload)


def layers_reason(made: PipelinePlan) -> str:
    return next((n.reason for n in made.resolved if n.setting == "memory.kv_host_layers"), "")


def test_the_cache_of_layers_goes_to_host_memory_where_that_lets_more_rows_run() -> None:
    made, without = small(), small(0)
    (stage,), (plain,) = made.stages, without.stages
    assert plain.kv_in_host is None
    assert stage.kv_in_host is not None
    assert stage.num_kv_device_layers == 32 - len(stage.kv_in_host.layers) >= 1
    assert made.num_kv_pages > 2 * without.num_kv_pages
    assert stage.offload is not None
    assert plain.offload is not None
    forecast = stage.offload.forecast
    assert forecast.rows > 2 * plain.offload.forecast.rows
    assert stage.kv_in_host.step_bytes == forecast.kv_bytes > 0
    assert forecast.step_s >= max(forecast.link_s, forecast.compute_s) + forecast.kv_s
    rows = f"host memory, for steps of {forecast.rows} rows"
    assert rows in layers_reason(made)
    assert "with all of it on the devices" in layers_reason(made)
    lines = "\n".join(plan_lines(made))
    assert f"{len(stage.kv_in_host.layers)} of 32 layers in host memory" in lines
    assert "KV cache in host memory" in lines
    assert made.num_host_pages == 0, "one or the other"
    assert PipelinePlan.from_json(made.to_json()) == made


def test_device_and_host_hold_what_is_planned() -> None:
    for kv_host_bytes in (70 * GIB, 6 * GIB):
        made = small(kv_host_bytes)
        (stage,) = made.stages
        assert stage.offload is not None
        assert stage.kv_in_host is not None
        layer_page = PAGE_BYTES // 32
        on_device = (made.num_kv_pages + 1) * stage.num_kv_device_layers * layer_page
        in_host = (made.num_kv_pages + 1) * len(stage.kv_in_host.layers) * layer_page
        assert stage.offload.device_bytes + on_device < 4 * GIB
        assert in_host <= kv_host_bytes
        assert in_host + stage.offload.host_bytes <= 98.5 * GIB


def test_weights_and_cache_in_host_memory_may_each_be_what_is_asked_for_of_them() -> None:
    def room(**asked: Any) -> RankRoom:
        (found,) = rank_rooms(
            MemoryConfig(**asked),
            ranks := gpus(1, host=100 * GIB),
            ranks,
            on_gpus=True,
            num_threads=1,
        )
        return found

    assert room().pool_bytes == pytest.approx(70 * GIB, rel=0.005)
    both = room(host_bytes=45 * GIB, kv_host_bytes=45 * GIB)
    assert both.pool_bytes == pytest.approx(90 * GIB, rel=0.005)
    assert room(host_bytes=80 * GIB).pool_bytes == pytest.approx(80 * GIB, rel=0.005)
    more = room(host_bytes=80 * GIB, kv_host_bytes=80 * GIB)
    assert more.pool_bytes == pytest.approx(98.5 * GIB, rel=0.005)


def test_layers_that_are_spread_leave_the_first_ones_on_the_device() -> None:
    (stage,) = small().stages
    assert stage.kv_in_host is not None
    assert stage.kv_in_host.layers[-1] == 31
    assert list(stage.kv_in_host.layers) == sorted(set(stage.kv_in_host.layers))


def test_a_cache_whose_size_is_asked_for_stays_on_the_device() -> None:
    assert small(num_kv_pages=200).stages[0].kv_in_host is None
    assert small(kv_cache_bytes=GIB).stages[0].kv_in_host is None


def test_by_itself_only_where_weights_are_streamed_and_pinning_pays() -> None:
    made = small("auto")
    assert made.stages[0].kv_in_host is not None
    assert "with all of it on the devices" in layers_reason(made)
    assert layers_reason(made) == layers_reason(small())
    whole = plan(gpus(1))
    assert whole.stages[0].offload is None
    assert whole.stages[0].kv_in_host is None
    assert small("auto", link_generation=5).stages[0].kv_in_host is not None
    short = small("auto", link_generation=5, num_output_tokens=256)
    assert short.stages[0].kv_in_host is None
    assert "all of the KV cache is on the devices" in layers_reason(short)


def test_where_it_gains_nothing_the_plan_says_so() -> None:
    made = plan(gpus(1), 40 * GIB)
    assert made.stages[0].kv_in_host is None
    assert "all of the KV cache is on the devices" in layers_reason(made)
    assert "with a part of it in host memory" in layers_reason(made)
    assert not layers_reason(plan(gpus(1), 0))
    assert not layers_reason(plan(gpus(1), num_requests=4))
    cpus = [replace(rank, gpu=GpuFacts()) for rank in gpus(1, host=200 * GIB)]
    assert not layers_reason(plan(cpus, GIB, device=False, num_kv_pages=100))
