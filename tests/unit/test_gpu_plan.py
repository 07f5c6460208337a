"""What planning decides for GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import (
    Auto,
    Config,
    GenerationConfig,
    MemoryConfig,
    ModelConfig,
    PipelineConfig,
)
from mpipipe.errors import ConfigError, EnvironmentSetupError, PlanError
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.resources import RankResources
from mpipipe.planning.step_limits import (
    DEQUANTIZED_BYTES,
    StepLimits,
    gpu_sequences_per_slot,
    gpu_tokens_per_step,
)
from mpipipe.planning.workload import SamplingUse, Workload
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.topology.gpu import GpuFacts
from mpipipe.types import DeviceName
from tests.unit.model_specs import OPENLLAMA_3B
from tests.unit.planned_rank import make_rank, with_gpu

GIB = 2**30
BACKENDS = ("triton", "sdpa", "reference")

LLAMA_3_8B = replace(
    OPENLLAMA_3B,
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_context_tokens=8192,
    dtype="bfloat16",
)


def h200(num_ranks: int) -> list[RankResources]:
    """One host with a GPU per rank."""
    return [
        make_rank(
            rank,
            memory_available_bytes=64 * GIB,
            gpu=GpuFacts(
                index=rank,
                name="NVIDIA H200",
                uuid=f"GPU-{rank}",
                capability=90,
                free_bytes=138 * GIB,
                nccl_version="2.28.9",
            ),
            attention_backends=BACKENDS,
        )
        for rank in range(num_ranks)
    ]


def t4(num_ranks: int) -> list[RankResources]:
    """One host per rank, with one T4."""
    return [
        with_gpu(
            replace(rank, host=f"node{rank.rank}"),
            index=0,
            name="Tesla T4",
            capability=75,
            free_bytes=15 * GIB,
        )
        for rank in h200(num_ranks)
    ]


def without_gpu(rank: RankResources, problem: str = "") -> RankResources:
    return replace(rank, gpu=GpuFacts(problem=problem))


def plan(
    world: list[RankResources],
    *settings: PipelineConfig | MemoryConfig | ModelConfig,
    spec: ModelSpec = OPENLLAMA_3B,
    work: tuple[int, int, int] | None = None,
    sampling: SamplingUse | None = None,
) -> PipelinePlan:
    """`work`: prompts × input × output."""
    config = Config()
    for section in settings:
        match section:
            case PipelineConfig():
                config = replace(config, pipeline=section)
            case MemoryConfig():
                config = replace(config, memory=section)
            case ModelConfig():
                config = replace(config, model=section)
    if work is None:
        return make_plan(config, spec, world, "/models/m")
    prompts, tokens_in, tokens_out = work
    return make_plan(
        config,
        spec,
        world,
        "/models/m",
        Workload(
            num_requests=prompts,
            longest_request_tokens=tokens_in + tokens_out,
            num_prompt_tokens=prompts * tokens_in,
            num_output_tokens=prompts * tokens_out,
            sampling=sampling,
        ),
    )


def split(made: PipelinePlan) -> list[int]:
    return [stage.num_layers for stage in made.stages]


def reason(made: PipelinePlan, setting: str) -> str:
    (found,) = [entry.reason for entry in made.resolved if entry.setting == setting]
    return found


# ---- device --------------------------------------------------------------------------------------


def test_ranks_with_a_gpu_each_run_ahead_on_them_over_nccl() -> None:
    made = plan(h200(2))
    assert (made.device, made.transport, made.attention) == ("cuda", "nccl", "triton")
    assert (made.lookahead, made.prefill, made.cuda_graphs) == (1, "phases", True)
    assert (made.num_slots, made.max_sequences_per_slot, made.max_tokens_per_step) == (2, 256, 4096)
    assert "NVIDIA H200" in reason(made, "pipeline.device")
    assert "NCCL 2.28.9" in reason(made, "pipeline.transport")
    assert all(entry.reason for entry in made.resolved)


def test_one_rank_needs_one_slot_and_no_transport() -> None:
    made = plan(h200(1))
    assert (made.num_slots, made.transport, made.lookahead) == (1, "loopback", 1)


def test_one_rank_without_a_gpu_puts_all_on_the_cpu_and_says_which() -> None:
    world = h200(2)
    world[1] = without_gpu(world[1], "CUDA could not be started (x): see nvidia-smi")
    made = plan(world)
    assert (made.device, made.transport, made.lookahead, made.dtype) == (
        "cpu",
        "mpi",
        0,
        "float32",
    )
    assert reason(made, "pipeline.device") == (
        "rank 1 on node1 has no usable GPU: CUDA could not be started (x): see nvidia-smi"
    )
    made = plan([without_gpu(rank) for rank in h200(2)])
    assert reason(made, "pipeline.device") == "no rank has an NVIDIA GPU"


def test_asking_for_gpus_that_a_rank_lacks_is_refused_with_its_problem() -> None:
    world = h200(2)
    world[1] = without_gpu(world[1], "no NVIDIA driver visible in this container: start with --nv")
    with pytest.raises(
        EnvironmentSetupError, match=r"rank 1 on node1 has no usable GPU: no NVIDIA"
    ):
        plan(world, PipelineConfig(device="cuda"))
    world[1] = without_gpu(world[1])
    with pytest.raises(EnvironmentSetupError, match=r'rank 1 .*there is none.*device = "cpu"'):
        plan(world, PipelineConfig(device="cuda"))


def test_a_cpu_run_on_a_gpu_machine_ignores_the_gpus() -> None:
    made = plan(h200(2), PipelineConfig(device="cpu"))
    assert (made.device, made.transport, made.attention) == ("cpu", "mpi", "sdpa")
    assert (made.dtype, made.max_sequences_per_slot, made.cuda_graphs) == ("float32", 32, False)


# ---- sharing -------------------------------------------------------------------------------------


def sharing(num_ranks: int, num_gpus: int) -> list[RankResources]:
    return [
        with_gpu(rank, index=rank.rank % num_gpus, uuid=f"GPU-{rank.rank % num_gpus}")
        for rank in h200(num_ranks)
    ]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_ranks_than_gpus_of_a_host_are_refused(
    device: Auto | DeviceName,
) -> None:
    with pytest.raises(
        EnvironmentSetupError,
        match=r"ranks 0, 2 on node1 would share GPU 0 .*as 3 ranks see 2 GPUs.*share_gpus = true",
    ):
        plan(sharing(3, 2), PipelineConfig(device=device))


def test_the_same_index_on_two_hosts_is_not_the_same_gpu() -> None:
    assert plan(t4(2)).transport == "nccl"


def test_shared_gpus_go_over_mpi_and_share_the_memory() -> None:
    made = plan(sharing(2, 1), PipelineConfig(share_gpus=True))
    assert (made.device, made.transport) == ("cuda", "mpi")
    assert "share GPU 0" in reason(made, "pipeline.transport")
    alone = plan(h200(2))
    assert made.num_kv_pages < 0.5 * alone.num_kv_pages
    with pytest.raises(PlanError, match=r"ranks 0 and 1 share GPU 0 .*NCCL refuses"):
        plan(sharing(2, 1), PipelineConfig(share_gpus=True, transport="nccl"))


# ---- transport -----------------------------------------------------------------------------------


def test_without_nccl_on_a_rank_tensors_go_over_mpi_and_asking_for_nccl_is_refused() -> None:
    world = h200(3)
    world[2] = with_gpu(world[2], nccl_version="")
    made = plan(world)
    assert made.transport == "mpi"
    assert "rank 2 on node1 was built without NCCL" in reason(made, "pipeline.transport")
    with pytest.raises(EnvironmentSetupError, match="rank 2 on node1 was built without NCCL"):
        plan(world, PipelineConfig(transport="nccl"))


def test_slices_of_one_gpu_are_gpus_of_their_own_but_not_to_nccl() -> None:
    slices = [with_gpu(rank, uuid=f"MIG-{rank.rank}", pci="0000:3b:00.0") for rank in h200(2)]
    made = plan(slices)
    assert (made.device, made.transport) == ("cuda", "mpi")
    assert "slices (MIG) of one GPU" in reason(made, "pipeline.transport")
    with pytest.raises(PlanError, match="2 ranks on node1 have slices"):
        plan(slices, PipelineConfig(transport="nccl"))
    apart = [replace(rank, host=f"node{rank.rank}") for rank in slices]
    assert plan(apart).transport == "nccl"


def test_different_nccl_versions_do_not_talk() -> None:
    world = h200(2)
    world[1] = with_gpu(world[1], nccl_version="2.27.3")
    made = plan(world)
    assert made.transport == "mpi"
    assert "NCCL 2.27.3 and 2.28.9" in reason(made, "pipeline.transport")


def test_nccl_between_cpus_is_refused() -> None:
    with pytest.raises(PlanError, match="NCCL moves tensors between GPUs, but the stages run on"):
        plan(h200(2), PipelineConfig(device="cpu", transport="nccl"))


# ---- dtype ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "on_h200", "on_t4"),
    [
        ("float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "float16"),
        ("float32", "bfloat16", "float16"),
    ],
)
def test_auto_dtype_is_the_checkpoints_16_bits_where_the_gpu_has_them(
    checkpoint: str, on_h200: str, on_t4: str
) -> None:
    spec = replace(OPENLLAMA_3B, dtype=checkpoint)
    assert plan(h200(2), spec=spec).dtype == on_h200
    assert plan(t4(2), spec=spec).dtype == on_t4


def test_bfloat16_on_a_t4_is_refused_by_capability() -> None:
    with pytest.raises(
        PlanError, match=r"GPU 0 \(Tesla T4\) of rank 1 on node1 .*capability 7\.5.*float16"
    ):
        plan([*h200(2)[:1], t4(2)[1]], ModelConfig(dtype="bfloat16"))
    assert plan(t4(2), ModelConfig(dtype="float32")).dtype == "float32"


def test_the_least_capable_gpu_decides() -> None:
    made = plan([*h200(2)[:1], t4(2)[1]], spec=LLAMA_3_8B)
    assert (made.dtype, made.max_tokens_per_step) == ("float16", 2048)
    assert "rank 1 on node1" in reason(made, "model.dtype")


# ---- attention, graphs, launch-ahead -------------------------------------------------------------


def test_attention_is_one_that_every_rank_has() -> None:
    world = h200(2)
    world[1] = replace(world[1], attention_backends=("sdpa", "reference"))
    made = plan(world)
    assert made.attention == "sdpa"
    assert made.cuda_graphs is False
    assert "sdpa attention needs lengths" in reason(made, "memory.cuda_graphs")
    with pytest.raises(ConfigError, match="triton"):
        plan(world, PipelineConfig(attention="triton"))


def test_a_mixture_of_experts_is_planned_without_graphs() -> None:
    made = plan(h200(2), spec=replace(LLAMA_3_8B, num_experts=8))
    assert made.cuda_graphs is False
    assert "routing of experts" in reason(made, "memory.cuda_graphs")


def test_attention_without_paged_kernels_leaves_room_for_its_copy_of_the_cache() -> None:
    """Of one layer, for every sequence of a slot at its longest."""
    work = (1024, 1920, 128)
    paged, gathered = (
        plan(h200(2), PipelineConfig(attention=name), MemoryConfig(cuda_graphs=False), work=work)
        for name in ("triton", "sdpa")
    )
    rows = paged.max_sequences_per_slot
    pages_in_copy = rows * 2048 * 2 * 32 * 100 * 2 / (13 * PAGE_BYTES_OF_LAYER)
    assert paged.num_kv_pages - gathered.num_kv_pages == pytest.approx(pages_in_copy, abs=2)


def test_a_far_context_does_not_take_all_memory_for_that_copy() -> None:
    """The pages that fit bound it too."""
    far = replace(LLAMA_3_8B, max_context_tokens=131072)
    paged, gathered = (
        plan(t4(2), PipelineConfig(attention=name), spec=far) for name in ("triton", "sdpa")
    )
    assert 0.7 * paged.num_kv_pages < gathered.num_kv_pages < paged.num_kv_pages


def test_few_layers_a_stage_leave_room_for_pages_beside_that_copy() -> None:
    """With L layers the copy takes 2 of L + 2 parts of what is left; of few pages, little."""
    far = replace(LLAMA_3_8B, max_context_tokens=131072)
    paged, gathered = (
        plan(t4(16), PipelineConfig(attention=name), MemoryConfig(cuda_graphs=False), spec=far)
        for name in ("triton", "sdpa")
    )
    assert max(stage.num_layers for stage in gathered.stages) <= 3
    assert 0.5 * paged.num_kv_pages < gathered.num_kv_pages < 0.7 * paged.num_kv_pages
    asked = MemoryConfig(num_kv_pages=9000)
    assert plan(t4(16), PipelineConfig(attention="sdpa"), asked, spec=far).num_kv_pages == 9000


def test_graphs_can_be_switched_off_and_need_launch_ahead() -> None:
    made = plan(h200(2), MemoryConfig(cuda_graphs=False))
    assert (made.cuda_graphs, made.lookahead) == (False, 1)
    with pytest.raises(PlanError, match=r"lookahead = 0 is for CPUs"):
        plan(h200(2), PipelineConfig(lookahead=0))


def test_launch_ahead_finds_keys_and_values_by_page() -> None:
    contiguous = MemoryConfig(kv_cache="contiguous")
    for pipeline in (PipelineConfig(), PipelineConfig(device="cpu", lookahead=1)):
        with pytest.raises(PlanError, match=r'kv_cache = "contiguous" cannot be used with'):
            plan(h200(2), contiguous, pipeline)
    made = plan(h200(2), contiguous, PipelineConfig(device="cpu"))
    assert (made.kv_cache, made.lookahead) == ("contiguous", 0)


def test_prompts_are_mixed_in_without_lookahead_unless_phases_are_asked_for() -> None:
    made = plan(h200(2), PipelineConfig(device="cpu", lookahead=0))
    assert (made.lookahead, made.prefill) == (0, "mixed")
    made = plan(h200(2), PipelineConfig(device="cpu", lookahead=0, prefill="phases"))
    assert (made.lookahead, made.prefill) == (0, "phases")
    made = plan(h200(2), PipelineConfig(device="cpu", lookahead=1))
    assert (made.device, made.lookahead, made.prefill) == ("cpu", 1, "phases")


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_requests", "num_slots", "rows"),
    [(None, 2, 256), (10_000, 2, 256), (512, 2, 256), (511, 2, 256), (128, 2, 64), (100, 2, 56),
     (32, 1, 32), (7, 2, 4), (3, 2, 2), (1, 2, 1), (0, 2, 1), (5, 1, 8)],
)  # fmt: skip
def test_rows_are_what_the_run_has_for_each_slot(
    num_requests: int | None, num_slots: int, rows: int
) -> None:
    assert gpu_sequences_per_slot(num_requests, num_slots)[0] == rows


def test_a_small_step_budget_bounds_the_automatic_rows() -> None:
    made = plan(h200(2), PipelineConfig(max_tokens_per_step=64))
    assert (made.max_sequences_per_slot, made.max_tokens_per_step) == (64, 64)


def test_a_turing_gpu_takes_shorter_steps() -> None:
    assert gpu_tokens_per_step(75, OPENLLAMA_3B)[0] == 2048
    assert gpu_tokens_per_step(80, OPENLLAMA_3B)[0] == gpu_tokens_per_step(90, OPENLLAMA_3B)[0]
    assert gpu_tokens_per_step(90, OPENLLAMA_3B)[0] == 4096  # 141 MB of gate and up activations


def test_no_sequence_grows_beyond_the_longest_request_or_the_context() -> None:
    assert plan(h200(2), work=(8, 100, 28)).max_sequence_tokens == 128
    assert plan(h200(2), work=(8, 9000, 28)).max_sequence_tokens == 2048
    assert plan(h200(2)).max_sequence_tokens == 2048


# ---- memory --------------------------------------------------------------------------------------

PAGE_BYTES_OF_LAYER = 16 * 2 * 32 * 104 * 2  # rows of 100 are padded to 104


def work_bytes(made: PipelinePlan, *, has_head: bool) -> int:
    limits = StepLimits(made.num_slots, made.max_sequences_per_slot, made.max_tokens_per_step, 2048)
    return limits.gpu_work_bytes(OPENLLAMA_3B, made.dtype, made.sampling, has_head=has_head)


PLAIN = SamplingUse()
DRAWN = SamplingUse(SamplingNeeds.DRAW, plain=False)


def test_log_probabilities_and_penalties_take_memory_of_the_last_stage_only() -> None:
    limits = StepLimits(4, 256, 4096, 8192)

    def needed(use: SamplingUse, *, has_head: bool = True) -> int:
        return limits.gpu_work_bytes(LLAMA_3_8B, "bfloat16", use, has_head=has_head)

    vocabulary = LLAMA_3_8B.vocab_size
    kept = SamplingUse(DRAWN.needs, logprobs=True, plain=False)
    assert needed(kept) - needed(DRAWN) == 256 * vocabulary * 2
    penalised = SamplingUse(SamplingNeeds.DRAW | SamplingNeeds.SEEN, plain=False)
    assert needed(penalised) - needed(DRAWN) == (2 * 4 * 256 + 1) * (vocabulary + 1)
    counted = SamplingUse(SamplingNeeds.DRAW | SamplingNeeds.COUNTS, plain=False)
    assert needed(counted) - needed(DRAWN) == (2 * 4 * 256 + 1) * (vocabulary + 1) * 4
    assert needed(DRAWN) > needed(PLAIN)
    everything = SamplingUse(SamplingNeeds.DRAWING | SamplingNeeds.HISTORY, logprobs=True)
    assert needed(everything, has_head=False) == needed(PLAIN, has_head=False)


def test_weights_in_8_bits_need_room_to_be_written_out() -> None:
    limits = StepLimits(4, 256, 4096, 8192)
    int8 = replace(LLAMA_3_8B, quantized="int8")
    plain, quantized = (
        limits.gpu_work_bytes(spec, "bfloat16", PLAIN, has_head=False)
        for spec in (LLAMA_3_8B, int8)
    )
    assert quantized - plain == DEQUANTIZED_BYTES


def test_what_sampling_takes_is_not_given_to_pages() -> None:
    work = (4000, 1000, 500)
    plain = plan(t4(2), work=work, sampling=PLAIN)
    penalised = replace(PLAIN, needs=SamplingNeeds.SEEN)
    assert plan(t4(2), work=work, sampling=penalised).num_kv_pages < plain.num_kv_pages
    assert plan(t4(2), work=work, sampling=penalised).sampling == penalised
    assert plain.sampling == PLAIN


def test_unknown_requests_are_greedy_or_as_configured() -> None:
    assert plan(h200(2)).sampling == PLAIN
    config = replace(
        Config(), generation=GenerationConfig(temperature=0.7, top_k=9, num_logprobs=3)
    )
    made = make_plan(config, OPENLLAMA_3B, h200(2), "/models/m")
    assert made.sampling == SamplingUse(SamplingNeeds.DRAWING, True, True)
    assert PipelinePlan.from_json(made.to_json()) == made


def test_pages_take_what_weights_and_work_space_leave_on_the_tightest_gpu() -> None:
    world = [*h200(2)[:1], t4(2)[1]]
    made = plan(world)
    last = made.stages[1]
    page_bytes = last.num_layers * PAGE_BYTES_OF_LAYER
    left = int(15 * GIB * 0.9) - last.weight_bytes - work_bytes(made, has_head=True) - page_bytes
    assert made.num_kv_pages == left // page_bytes
    assert "leave on GPU 0 (Tesla T4) of node1 (rank 1)" in reason(made, "memory.num_kv_pages")
    half = plan(world, MemoryConfig(gpu_memory_fraction=0.45))
    assert half.num_kv_pages < made.num_kv_pages


def test_pages_are_no_more_than_the_run_can_use() -> None:
    made = plan(h200(2), work=(512, 512, 128))
    assert made.num_kv_pages == 512 * 40 + 256


def test_weights_that_do_not_fit_a_gpu_are_refused_with_sizes_and_remedies() -> None:
    """Where no host memory may take them either."""
    world = [with_gpu(rank, free_bytes=4 * GIB) for rank in h200(2)]
    with pytest.raises(
        PlanError,
        match=r"rank 0 on GPU 0 \(NVIDIA H200\) of node1 would hold 3\.\d+ GiB of weights and "
        r"1\.\d+ GiB of work space, but only 3\.60 GiB of its memory may be used.*more ranks",
    ):
        plan(world, MemoryConfig(host_bytes=0))


def test_ranks_that_share_a_gpu_must_fit_together() -> None:
    world = [with_gpu(rank, free_bytes=8 * GIB) for rank in sharing(2, 1)]
    with pytest.raises(PlanError, match=r"ranks 0, 1 together on GPU 0"):
        plan(world, PipelineConfig(share_gpus=True), MemoryConfig(host_bytes=0))


# ---- split ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [(512, 512, 128), (1, 512, 128), (32, 512, 128), None])
def test_a_head_smaller_than_a_layer_moves_none(work: tuple[int, int, int] | None) -> None:
    assert split(plan(h200(2), work=work)) == [13, 13]


@pytest.mark.parametrize(
    ("work", "expected"), [((512, 512, 128), [16, 16]), ((1, 512, 128), [17, 15])]
)
def test_a_large_head_counts_by_its_share_of_the_run(
    work: tuple[int, int, int], expected: list[int]
) -> None:
    assert split(plan(h200(2), spec=LLAMA_3_8B, work=work)) == expected


def test_an_explicit_split_is_kept_on_gpus_too() -> None:
    assert split(plan(h200(2), PipelineConfig(split=(20, 6)))) == [20, 6]
