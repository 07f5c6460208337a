"""What is offloaded for ranks on GPUs, and what the plan says of it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import Config, MemoryConfig, ModelConfig, PipelineConfig
from mpipipe.errors import PlanError
from mpipipe.planning import offload_search
from mpipipe.planning.cost import kv_page_bytes
from mpipipe.planning.explain import plan_lines
from mpipipe.planning.links import compute_ceilings, link_rates
from mpipipe.planning.placement import StageChoice, place_stage
from mpipipe.planning.plan import PipelinePlan, StageOffload
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.resources import RankResources
from mpipipe.planning.step_limits import StepLimits
from mpipipe.planning.workload import Workload
from mpipipe.topology.gpu import GpuFacts
from mpipipe.types import QuantizeName
from tests.unit.model_specs import OPENLLAMA_7B
from tests.unit.planned_rank import GIB, make_rank, with_gpu

LAYER_BYTES = (4 * 4096 * 4096 + 3 * 4096 * 11008) * 2
MATRIX_BYTES = 32000 * 4096 * 2


def t4(num_ranks: int, *, memory: int = 30 * GIB) -> list[RankResources]:
    """The ranks of one host, as notebooks lend them."""
    return [
        make_rank(
            rank,
            memory_available_bytes=memory,
            gpu=GpuFacts(
                index=rank,
                name="Tesla T4",
                uuid=f"GPU-{rank}",
                capability=75,
                free_bytes=15 * GIB,
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
    memory: MemoryConfig | None = None,
    pipeline: PipelineConfig | None = None,
    *,
    work: tuple[int, int, int] = (128, 512, 32),
    spec: ModelSpec = OPENLLAMA_7B,
    model: ModelConfig | None = None,
) -> PipelinePlan:
    prompts, tokens_in, tokens_out = work
    config = Config(
        memory=replace(memory or MemoryConfig(), kv_host_bytes=0),
        pipeline=pipeline or PipelineConfig(),
        model=model or ModelConfig(),
    )
    workload = Workload(
        num_requests=prompts,
        longest_request_tokens=tokens_in + tokens_out,
        num_prompt_tokens=prompts * tokens_in,
        num_output_tokens=prompts * tokens_out,
    )
    return make_plan(config, spec, world, "/models/m", workload)


def offload(made: PipelinePlan, stage: int = 0) -> StageOffload:
    found = made.stages[stage].offload
    assert found is not None
    return found


def reasons(made: PipelinePlan) -> dict[str, str]:
    return {entry.setting: entry.reason for entry in made.resolved}


def held_bytes(made: PipelinePlan) -> int:
    """All that the only stage takes of its GPU."""
    page = kv_page_bytes(
        OPENLLAMA_7B, made.dtype, num_layers=32, page_size_tokens=16, row_multiple=8
    )
    limits = StepLimits(1, made.max_sequences_per_slot, made.max_tokens_per_step, 2048)
    work = limits.gpu_work_bytes(OPENLLAMA_7B, made.dtype, made.sampling, has_head=True)
    return offload(made).device_bytes + (made.num_kv_pages + 1) * page + work


# ---- tiers ---------------------------------------------------------------------------------------


def test_a_model_too_large_for_its_gpu_streams_from_host_memory_by_itself() -> None:
    made = plan(t4(1))
    found = offload(made)
    assert (found.embedding, found.disk_layers, made.offload_dir) == ("host", (), "")
    assert found.forecast.bound_by == "link"
    assert found.num_buffers == 2
    assert found.host_bytes <= 30 * GIB * 0.7
    assert found.forecast.host_bytes >= len(found.host_layers) * LAYER_BYTES
    assert made.num_kv_pages >= found.forecast.rows * 34
    assert held_bytes(made) <= 15 * GIB * 0.9


def test_two_gpus_that_hold_it_together_offload_nothing() -> None:
    made = plan(t4(2))
    assert [stage.offload for stage in made.stages] == [None, None]
    assert "memory.offload" not in {entry.setting for entry in made.resolved}


def test_device_bytes_limit_all_that_a_rank_takes() -> None:
    for device_bytes in (4 * 10**9, 8 * 10**9, 12 * 10**9):
        made = plan(t4(1), MemoryConfig(device_bytes=device_bytes))
        assert 0.9 * device_bytes < held_bytes(made) <= device_bytes


def test_what_host_memory_does_not_hold_goes_to_disk() -> None:
    memory = MemoryConfig(device_bytes=8 * 10**9, host_bytes=7 * GIB // 4, offload_dir="/scratch/o")
    made = plan(t4(1), memory)
    found = offload(made)
    assert found.host_layers
    assert found.disk_layers
    assert found.host_bytes <= 7 * GIB // 4 - 2 * LAYER_BYTES
    assert made.offload_dir == "/scratch/o"
    assert found.forecast.bound_by == "disk"
    # Those on disk are spread among the streamed ones.
    order = sorted((*found.host_layers, *found.disk_layers))
    on_disk = [place for place, layer in enumerate(order) if layer in found.disk_layers]
    spacing = len(order) / len(on_disk)
    assert all(abs(place - (n + 1) * spacing) <= 2 for n, place in enumerate(on_disk))


def test_what_comes_from_the_disk_passes_through_host_memory_of_the_budget() -> None:
    """Two layers of it; what is left takes the embedding or not, and no layer."""
    limit = int(2.05 * LAYER_BYTES)
    memory = MemoryConfig(device_bytes=8 * 10**9, host_bytes=limit, offload_dir="/scratch/o")
    found = offload(plan(t4(1), memory))
    assert (found.host_layers, found.host_bytes, found.embedding) == ((), 0, "disk")
    more = offload(plan(t4(1), replace(memory, host_bytes=limit + 2 * LAYER_BYTES)))
    assert LAYER_BYTES <= more.host_bytes <= 2.05 * LAYER_BYTES
    with pytest.raises(
        PlanError,
        match=r"0\.0 MiB of host memory for offloaded weights, less than the 0\.75 GiB through "
        r".* raise memory\.host_bytes to at least 780 MiB",
    ):
        plan(t4(1), replace(memory, host_bytes=0))
    assert offload(plan(t4(1), replace(memory, host_bytes=780 << 20))).disk_layers


def test_ranks_of_a_host_share_its_memory() -> None:
    """Four GPUs of 4 GiB each, 16 GiB on the host: three tenths of it stay unpinned."""
    world = [with_gpu(rank, free_bytes=4 * GIB) for rank in t4(4, memory=16 * GIB)]
    made = plan(world, work=(32, 64, 16))
    assert sum(offload(made, stage).host_bytes for stage in range(4)) <= 16 * GIB * 0.7
    assert all(offload(made, stage).host_bytes <= 4 * GIB * 0.7 for stage in range(4))


def test_host_bytes_that_the_host_does_not_have_are_fewer_and_the_plan_says_so() -> None:
    """What the libraries of the ranks take stays free."""
    world = [with_gpu(rank, free_bytes=4 * GIB) for rank in t4(2, memory=13 * GIB)]
    disk = "/scratch/o"
    made = plan(world, MemoryConfig(host_bytes=100 * GIB, offload_dir=disk), work=(32, 64, 16))
    for stage in range(2):
        assert 4 * GIB < offload(made, stage).host_bytes <= 5 * GIB
    assert reasons(made)["memory.host_bytes"].startswith("less than the 100.00 GiB asked for")
    assert any("5.00 GiB" in line and "100.00 GiB" in line for line in plan_lines(made))
    made = plan(world, MemoryConfig(host_bytes=4 * GIB, offload_dir=disk), work=(32, 64, 16))
    assert "memory.host_bytes" not in reasons(made)


def test_stages_with_layers_on_disk_are_told_to_capture_no_graphs() -> None:
    small, large = t4(2)
    memory = MemoryConfig(host_bytes=GIB, offload_dir="/scratch/o")
    split = PipelineConfig(split=(16, 16))
    made = plan([with_gpu(small, free_bytes=5 * GIB), large], memory, split)
    assert (offload(made).disk_layers != (), made.stages[1].offload) == (True, None)
    assert made.cuda_graphs is True
    assert reasons(made)["memory.cuda_graphs"].startswith("not on stage 0: ")
    made = plan([with_gpu(rank, free_bytes=5 * GIB) for rank in t4(2)], memory, split)
    assert made.cuda_graphs is False
    assert reasons(made)["memory.cuda_graphs"].startswith("not on stages 0, 1: ")
    assert "memory.cuda_graphs" not in reasons(plan(t4(1))), "host memory is within graphs"


def test_rows_are_raised_to_hide_the_link() -> None:
    """Small sequences, so that memory is not what limits them."""
    memory = MemoryConfig(device_bytes=6 * 10**9)
    few = plan(t4(1), memory, work=(16, 8, 8))
    many = plan(t4(1), memory, work=(4000, 8, 8))
    assert offload(few).forecast.rows == 16
    assert many.max_sequences_per_slot >= offload(many).forecast.rows >= 192
    assert many.max_tokens_per_step >= many.max_sequences_per_slot


def test_a_stage_that_streams_gets_fewer_layers_where_another_has_room() -> None:
    small, large = t4(2)
    world = [with_gpu(small, free_bytes=5 * GIB), large]
    uneven = plan(world, work=(32, 64, 16))
    layers = [stage.num_layers for stage in uneven.stages]
    assert layers[0] < 10 < layers[1]
    steps = [0.0 if s.offload is None else s.offload.forecast.step_s for s in uneven.stages]
    assert uneven.stages[0].offload is None or steps[0] < 0.5


# ---- what cannot be ------------------------------------------------------------------------------


def test_without_a_place_to_offload_to_the_error_names_both() -> None:
    with pytest.raises(
        PlanError,
        match=r"would hold 12\.55 GiB of weights and .* of work space.*set memory\.offload_dir to "
        r"a folder on a local disk with \d+\.\d+ GiB free.*, let memory\.host_bytes be .* more",
    ):
        plan(t4(1), MemoryConfig(host_bytes=0))


def test_a_device_below_one_layer_is_told_what_it_needs() -> None:
    with pytest.raises(
        PlanError, match=r"needs \d+ MiB on its device, for a layer or staging bu"
    ) as e:
        plan(t4(1), MemoryConfig(device_bytes=GIB))
    assert "offload_dir" not in str(e.value), "host memory has room"
    least = int(str(e.value).split("at least ")[1].split(" MiB")[0]) * 2**20
    assert offload(plan(t4(1), MemoryConfig(device_bytes=least))).num_buffers == 1
    with pytest.raises(PlanError, match=f"at least {least // 2**20} MiB"):
        plan(t4(1), MemoryConfig(device_bytes=least - 2**20))


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_device_bytes_that_an_error_advises_are_enough(
    num_ranks: int, tied: bool, quantize: QuantizeName
) -> None:
    model, world = ModelConfig(quantize=quantize), t4(num_ranks, memory=12 * GIB)
    for vocab, layers in ((32000, 32), (256000, 4)):
        spec = replace(OPENLLAMA_7B, tied_embeddings=tied, vocab_size=vocab, num_layers=layers)
        low = MemoryConfig(device_bytes=GIB, host_bytes=GIB, offload_dir="/scratch/o")
        with pytest.raises(PlanError, match=r"^stage \d .* at least (\d+) MiB") as e:
            plan(world, low, spec=spec, model=model)
        least = int(str(e.value).split("at least ")[1].split(" MiB")[0]) * 2**20
        assert plan(world, replace(low, device_bytes=least), spec=spec, model=model).stages


def test_a_limit_that_was_not_set_or_does_not_bind_is_not_spoken_of() -> None:
    for memory in (MemoryConfig(host_bytes=0), MemoryConfig(host_bytes=0, device_bytes=64 * GIB)):
        with pytest.raises(
            PlanError, match=r"\(memory\.gpu_memory_fraction of what is free\)"
        ) as e:
            plan(t4(1), memory)
        assert "device_bytes" not in str(e.value)
        assert 'set model.quantize = "int8"' in str(e.value)
        assert "model.dtype" not in str(e.value), "it is in 16 bits already"


# ---- what is said --------------------------------------------------------------------------------


def test_the_plan_says_what_sits_where_and_what_it_costs() -> None:
    memory = MemoryConfig(
        device_bytes=13 * 10**9, host_bytes=7 * GIB // 4, offload_dir="/scratch/o"
    )
    made = plan(t4(1), memory)
    found, forecast = offload(made), offload(made).forecast
    text = "\n".join(plan_lines(made))
    ends = {"embedding": found.embedding, "LM head": found.head}
    tiers = {"host": ("in host memory", found.host_layers), "disk": ("on disk", found.disk_layers)}
    for tier, (where, layers) in tiers.items():
        parts = [f"{len(layers)} of 32 layers", *(name for name in ends if ends[name] == tier)]
        assert f"{' + '.join(parts)} {where}" in text
    brought = (forecast.host_bytes + forecast.disk_bytes) / GIB
    assert f"brings {brought:.2f} GiB for each step of {forecast.rows} rows" in text
    assert f"a step takes {forecast.step_s:.2f} s, bound by disk (compute" in text
    assert "at 11.8 GB/s" in text
    assert "link 11.8 GB/s (PCIe generation 3, 16 lanes), disk 1 GB/s (assumed)" in text
    slower = forecast.step_s / forecast.compute_s
    assert f"steps {slower:.3g} times as long" in text


def test_what_would_avoid_it_holds_when_it_is_tried() -> None:
    made = plan(t4(1))
    (note,) = [entry for entry in made.resolved if entry.setting == "memory.offload"]
    assert "one more stage of this kind would hold all of it" in note.reason
    assert all(stage.offload is None for stage in plan(t4(2)).stages)
    assert 'model.quantize = "int8" fits without offload' in note.reason
    int8 = ModelConfig(quantize="int8")
    assert plan(t4(1), model=int8).stages[0].offload is None
    assert "max_sequences_per_slot" not in note.reason, "no row leaves room for all weights"


def test_int8_is_told_to_bring_less_where_it_does_not_fit_either() -> None:
    memory = MemoryConfig(device_bytes=4 * 10**9)
    (note,) = [e for e in plan(t4(1), memory).resolved if e.setting == "memory.offload"]
    narrow = plan(t4(1), memory, model=ModelConfig(quantize="int8"))
    brought = offload(narrow).forecast.host_bytes / GIB
    assert f'model.quantize = "int8" would bring {brought:.2f} GiB instead of' in note.reason
    (after,) = [entry for entry in narrow.resolved if entry.setting == "memory.offload"]
    assert "int8" not in after.reason


def test_what_makes_a_run_no_faster_is_not_advised() -> None:
    """Fewer rows leave room for all weights here, but complete fewer tokens a second."""
    memory = MemoryConfig(device_bytes=15 * 10**9, gpu_memory_fraction=1.0)
    for mib in (3000, 8000, 14300):
        for work in ((512, 100, 30), (4000, 8, 8), (4, 1000, 30)):
            tried = replace(memory, device_bytes=mib * 2**20)
            told = reasons(plan(t4(1), tried, work=work)).get("memory.offload", "")
            gains = re.findall(r"([\d.]+) times as fast", told)
            assert all(float(gain) >= 1.02 for gain in gains), told


def test_stages_that_are_alike_are_placed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for 64 cards would take half a minute else."""
    calls = []

    def counted(*arguments: Any) -> StageChoice | None:
        calls.append(arguments)
        return place_stage(*arguments)

    monkeypatch.setattr(offload_search, "place_stage", counted)
    large = replace(OPENLLAMA_7B, num_layers=160)
    numbers = []
    for num_ranks in (2, 4):
        calls.clear()
        assert plan(t4(num_ranks, memory=200 * GIB), spec=large).stages[1].offload is not None
        numbers.append(len(calls))
    assert numbers[1] <= numbers[0]


# ---- rates ---------------------------------------------------------------------------------------


def test_links_are_estimated_by_generation_and_lanes() -> None:
    """Measured: a T4's 11 to 12 GB/s, an H100's 55 GB/s."""

    def rate(generation: int, width: int) -> float:
        return link_rates(
            GpuFacts(index=0, link_generation=generation, link_width=width)
        ).host_bytes_per_s

    assert 11e9 < rate(3, 16) < 12e9
    assert rate(5, 16) == pytest.approx(55e9, rel=0.02)
    assert rate(3, 8) == rate(3, 16) / 2
    assert "assumed" in link_rates(GpuFacts(index=0)).link_source
    assert link_rates(GpuFacts(index=0)).host_bytes_per_s == 11e9


def test_a_disk_that_was_measured_counts_as_measured() -> None:
    for gpu in (None, GpuFacts(index=0, link_generation=5, link_width=16)):
        assumed, measured = link_rates(gpu), link_rates(gpu, 3_100_000_000)
        assert "disk 1 GB/s (assumed)" in assumed.disk_source
        assert measured.disk_source == "disk 3.1 GB/s (measured)"
        assert measured.disk_bytes_per_s == 3.1e9
        assert measured.host_bytes_per_s == assumed.host_bytes_per_s
        assert measured.link_source == assumed.link_source


def test_a_gpu_that_was_not_measured_counts_as_its_kind() -> None:
    known = compute_ceilings(GpuFacts(index=0, name="NVIDIA H100 80GB HBM3", capability=90), 1)
    assert "measured" in known.source
    t4_ceilings = compute_ceilings(GpuFacts(index=0, name="Tesla T4", capability=75), 1)
    assert t4_ceilings.bytes_per_s < 320e9
    newer = compute_ceilings(GpuFacts(index=0, name="B200", capability=100), 1)
    alike = compute_ceilings(GpuFacts(index=0, name="GH200", capability=90), 1)
    assert newer == replace(alike, source=newer.source)
    assert newer.source == "assumed as a H100 PCIe, since the table of GPUs has no B200"
    assert compute_ceilings(None, 4).flops_per_s == 4 * compute_ceilings(None, 1).flops_per_s
