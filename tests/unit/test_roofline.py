from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mpipipe.checkpoint.spec import ModelSpec, read_spec
from mpipipe.metrics.throughput import FloorTimes
from mpipipe.planning.cost import Ceilings
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.roofline import JobShape, ceilings_of, job_floor

SHAPES = Path(__file__).resolve().parents[2] / "configs" / "shapes"

# 2 heads of 2, 1 KV head: a layer has 4·2·2·(2 + 1) + 3·4·5 = 48 + 60 = 108 weights and 4 elements
# of K and V per token; the head 4·10 = 40 weights.
TINY = ModelSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=4,
    intermediate_size=5,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    vocab_size=10,
    max_context_tokens=64,
    tied_embeddings=False,
    gated_mlp=True,
    dtype="bfloat16",
    eos_token_ids=(),
)


def plan(spec: ModelSpec, stages: int, rows: int, *, chunk: int = 8192) -> PipelinePlan:
    cuts = [spec.num_layers * i // stages for i in range(stages + 1)]
    return PipelinePlan(
        model_path="/m",
        model_type=spec.model_type,
        architecture=spec.architecture,
        dtype="bfloat16",
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        stages=tuple(
            StagePlan(
                stage=i,
                rank=i,
                host="a",
                first_layer=cuts[i],
                last_layer=cuts[i + 1],
                has_embedding=i == 0,
                has_head=i == stages - 1,
                weight_bytes=0,
                cost_share=1 / stages,
            )
            for i in range(stages)
        ),
        num_slots=stages,
        max_sequences_per_slot=rows,
        max_tokens_per_step=chunk,
        page_size_tokens=16,
        num_kv_pages=1,
        max_context_tokens=spec.max_context_tokens,
        kv_cache="paged",
        transport="nccl",
        device="cuda",
        attention="triton",
        threads_per_rank=1,
        resolved=(),
    )


def num_rounds(floor: FloorTimes, num_output_tokens: int) -> float:
    """Decode rounds that the floor assumes."""
    decode_s = num_output_tokens / floor.tokens_per_s - floor.prefill_s
    return decode_s / floor.decode_round_s


def test_the_shape_counts_decoded_tokens_and_what_they_read() -> None:
    shape = JobShape.of([(4, 3), (2, 1)])
    assert (shape.num_sequences, shape.num_prompt_tokens, shape.num_output_tokens) == (2, 6, 4)
    assert shape.num_decoded_tokens == 2
    # The first output token is read with 5 tokens cached, the second with 6.
    assert shape.cached_tokens == 5 + 6
    assert shape.mean_context_tokens == 5.5
    assert shape.prompt_pairs == 4 * 4 / 2 + 2 * 2 / 2


def test_a_memory_bound_step_takes_its_bytes_over_the_bandwidth() -> None:
    floor = job_floor(TINY, plan(TINY, 2, 8), JobShape.of([(4, 3)] * 4), Ceilings(1.0, 1e9, "test"))
    # 2 rows a slot, 5.5 tokens of 4 elements; 108 weights a layer, 40 more in the head; 2 bytes.
    first, last = 2 * (108 + 2 * 5.5 * 4), 2 * (108 + 40 + 2 * 5.5 * 4)
    assert first < last
    assert floor.decode_round_s == 2 * last  # the slowest stage for both slots
    assert num_rounds(floor, 12) == pytest.approx(2)
    assert floor.prefill_s == pytest.approx(2 * 108 + 2 * 148)


def test_what_prompts_share_is_read_once_for_the_rows_of_a_slot() -> None:
    shape = JobShape.of([(4, 3)] * 4, shared_ratio=0.5)
    shared = replace(plan(TINY, 1, 8), max_sharing_tokens=64)
    floor = job_floor(TINY, shared, shape, Ceilings(1.0, 1e9, "test"))
    # 4 rows: 3.5 tokens of their own each, and 2 of all.
    assert floor.decode_round_s == pytest.approx(2 * (2 * (108 + (4 * 3.5 + 2) * 4) + 40))


def test_a_compute_bound_step_takes_its_flops() -> None:
    floor = job_floor(
        TINY, plan(TINY, 1, 8, chunk=8), JobShape.of([(4, 2)] * 4), Ceilings(1e9, 1.0, "test")
    )
    # 4 rows: a multiply and an add per weight; 5 tokens cached, 4 flops per element of 2 · 2.
    weights = 2 * 108 + 40
    assert floor.decode_round_s == 2 * 4 * weights + 4 * 4 * 5 * 2 * 4
    # 16 prompt tokens in two chunks of 8; the head sees the last row of each prompt only.
    flops = 2 * 16 * 216 + 2 * 4 * 40 + 4 * (4 * 8) * 2 * 4
    assert floor.prefill_s == pytest.approx(flops)


def test_one_sequence_must_pass_all_stages_one_after_the_other() -> None:
    one = job_floor(TINY, plan(TINY, 2, 8), JobShape.of([(4, 3)]), Ceilings(1.0, 1e9, "test"))
    first, last = 2 * (108 + 5.5 * 4), 2 * (108 + 40 + 5.5 * 4)
    assert one.decode_round_s == first + last


def test_more_sequences_than_places_take_more_rounds() -> None:
    floor = job_floor(TINY, plan(TINY, 2, 2), JobShape.of([(4, 3)] * 8), Ceilings(1.0, 1e9, ""))
    assert num_rounds(floor, 24) == pytest.approx(4)


def test_nothing_is_decoded_when_one_token_is_asked_for() -> None:
    floor = job_floor(TINY, plan(TINY, 1, 8), JobShape.of([(4, 1)]), Ceilings(1.0, 1e9, ""))
    assert floor.decode_tokens_per_s is None
    assert floor.tokens_per_s == pytest.approx(1 / (2 * 256))


def on_two_h200(model: str, prompts: int, tokens_in: int, tokens_out: int) -> FloorTimes:
    spec = read_spec(SHAPES / model)
    ceilings = ceilings_of("cuda", "NVIDIA H200")
    assert ceilings is not None
    shape = JobShape.of([(tokens_in, tokens_out)] * prompts)
    return job_floor(spec, plan(spec, 2, 256), shape, ceilings)


@pytest.mark.parametrize(
    ("model", "work", "by_hand"),
    [
        # 6.65 GB of weights and 0.19 GB of cache over 4.25 TB/s; the prompt 4 ms.
        ("openllama_3b", (1, 512, 128), 614),
        # 262,144 prompt tokens: 1.1 s; 127 rounds of 2 · (1.86 + 24.5) GB.
        ("openllama_3b", (512, 512, 128), 23_500),
        ("llama3_8b", (1, 512, 128), 278),
        ("llama3_8b", (128, 1024, 256), 11_700),
        ("llama3_8b", (512, 512, 128), 18_900),
    ],
)
def test_floors_of_the_benchmarks(model: str, work: tuple[int, int, int], by_hand: float) -> None:
    assert on_two_h200(model, *work).tokens_per_s == pytest.approx(by_hand, rel=0.01)


def test_known_gpus_have_ceilings_which_say_whether_they_were_measured() -> None:
    measured, published = ceilings_of("cuda", "NVIDIA H200"), ceilings_of("cuda", "Tesla T4")
    assert measured is not None
    assert measured.source.startswith("measured: 2 x H200")
    assert published is not None
    assert published.source.startswith("published, 78% of 320 GB/s")
    assert ceilings_of("cuda", "NVIDIA B300") is None
    one, two = ceilings_of("cpu"), ceilings_of("cpu", num_threads=2)
    assert one is not None
    assert two is not None
    assert two.flops_per_s == 2 * one.flops_per_s
