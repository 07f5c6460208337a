"""Which weights a plan has in 8 bits, what they weigh, and which devices are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import Config, ModelConfig
from mpipipe.errors import PlanError
from mpipipe.planning.cost import (
    layer_decode_cost,
    stage_weight_bytes,
)
from mpipipe.planning.explain import plan_lines
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.resources import RankResources
from mpipipe.topology.gpu import GpuFacts
from mpipipe.types import QuantizeName
from tests.unit.planned_rank import GIB, make_rank

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, DIM, VOCAB = 64, 96, 4, 2, 16, 1000
SPEC = ModelSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    vocab_size=VOCAB,
    max_context_tokens=512,
    tied_embeddings=False,
    gated_mlp=True,
    dtype="bfloat16",
    eos_token_ids=(2,),
)
# (outputs, inputs) of one layer's matrices: q, k, v, o, gate, up, down
SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]


def made(
    world: list[RankResources], quantize: QuantizeName, spec: ModelSpec = SPEC
) -> PipelinePlan:
    return make_plan(Config(model=ModelConfig(quantize=quantize)), spec, world, "/models/m")


def cpus(num_ranks: int) -> list[RankResources]:
    return [make_rank(rank) for rank in range(num_ranks)]


def gpus(*capabilities: int) -> list[RankResources]:
    return [
        make_rank(
            rank,
            gpu=GpuFacts(
                index=rank,
                name="a card",
                uuid=f"GPU-{rank}",
                capability=capability,
                memory_bytes=16 * GIB,
                free_bytes=16 * GIB,
                nccl_version="2.27.5",
            ),
            attention_backends=("triton", "sdpa"),
        )
        for rank, capability in enumerate(capabilities)
    ]


def weigh(spec: ModelSpec, *, first: bool = False, last: bool = False) -> int:
    return stage_weight_bytes(spec, "bfloat16", num_layers=2, has_embedding=first, has_head=last)


def test_a_quantised_weight_takes_a_byte_and_a_scale_per_output() -> None:
    layer = sum(outputs * inputs + 4 * outputs for outputs, inputs in SHAPES)
    spec = replace(SPEC, quantized="int8")
    assert weigh(spec) == 2 * layer
    assert weigh(spec, first=True) == 2 * layer + 2 * VOCAB * HIDDEN
    assert weigh(spec, last=True) == 2 * layer + VOCAB * HIDDEN + 4 * VOCAB
    assert weigh(spec, first=True, last=True) == weigh(spec, first=True) + weigh(
        spec, last=True
    ) - weigh(spec)


def test_a_tied_head_is_a_copy_in_8_bits_unless_a_checkpoint_has_none() -> None:
    embedding = 2 * VOCAB * HIDDEN
    tied = replace(SPEC, quantized="int8", tied_embeddings=True)
    assert weigh(tied, last=True) == weigh(tied) + VOCAB * HIDDEN + 4 * VOCAB
    assert weigh(tied, first=True, last=True) == weigh(tied, last=True) + embedding
    for plain in (replace(tied, plain_head=True), replace(tied, quantized="fp8")):
        assert weigh(plain, last=True) == weigh(plain) + embedding
        assert weigh(plain, first=True, last=True) == weigh(plain, last=True)


def test_linears_that_a_checkpoint_leaves_plain_are_counted_in_the_dtype_of_the_run() -> None:
    # One of two layers has a plain down projection: on average half of one.
    spec = replace(SPEC, quantized="int8", plain_parameters=64 * 96 // 2, plain_outputs=64 // 2)
    whole = weigh(replace(SPEC, quantized="int8"))
    assert weigh(spec) == whole + 64 * 96 - 4 * 64


def test_experts_are_counted_in_the_dtype_of_the_run() -> None:
    attention = sum(outputs * inputs + 4 * outputs for outputs, inputs in SHAPES[:4])
    experts = replace(SPEC, quantized="int8", num_experts=8)
    assert weigh(experts) == 2 * (attention + 2 * 8 * 3 * HIDDEN * INTERMEDIATE)


def test_a_plan_counts_and_tells_it() -> None:
    plain, plan = made(cpus(2), "none"), made(cpus(2), "int8")
    assert (plain.quantize, plan.quantize) == ("none", "int8")
    assert plan.content_hash() != plain.content_hash()
    for stage, before in zip(plan.stages, plain.stages, strict=True):
        spec = replace(SPEC, quantized="int8")
        assert stage.weight_bytes < before.weight_bytes
        assert stage.weight_bytes == stage_weight_bytes(
            spec,
            plan.dtype,
            num_layers=stage.num_layers,
            has_embedding=stage.has_embedding,
            has_head=stage.has_head,
        )
    (line,) = [line for line in plan_lines(plan) if "model.quantize" in line]
    assert "int8" in line
    assert "the linears of the layers, with a scale per output channel" in line
    assert not any("model.quantize" in line for line in plan_lines(plain))


def test_what_stays_as_it_is_is_said() -> None:
    spec = replace(SPEC, tied_embeddings=True, num_experts=4)
    (note,) = [e for e in made(cpus(1), "int8", spec).resolved if e.setting == "model.quantize"]
    assert "experts stay as they are (86% of a layer's weights)" in note.reason
    assert "of the embedding the LM head has a copy in 8 bits" in note.reason
    spec = replace(SPEC, quantized="int8", plain_head=True, plain_parameters=9, plain_outputs=1)
    (note,) = [e for e in made(cpus(1), "none", spec).resolved if e.setting == "model.quantize"]
    assert "those apart that it leaves as they are; the LM head stays as it is" in note.reason


def test_on_a_cpu_the_split_is_that_of_the_plain_weights() -> None:
    # There int8 saves memory, not time.
    plain, plan = made(cpus(2), "none"), made(cpus(2), "int8")
    assert [s.num_layers for s in plain.stages] == [s.num_layers for s in plan.stages]
    quantised = layer_decode_cost(replace(SPEC, quantized="int8"), "float32")
    assert quantised.bytes_moved < layer_decode_cost(SPEC, "float32").bytes_moved


def test_fp8_is_refused_on_a_cpu_and_on_older_gpus_with_int8_as_the_remedy() -> None:
    with pytest.raises(PlanError, match=r'"fp8", but the stages run on CPUs: set .*"int8"'):
        made(cpus(1), "fp8")
    with pytest.raises(PlanError, match=r"rank 1 on .* capability 8\.6, and 8-bit floats .*int8"):
        made(gpus(90, 86), "fp8")
    assert made(gpus(90, 89), "fp8").quantize == "fp8"
    assert made(gpus(75), "int8").quantize == "int8"


def test_weights_of_a_checkpoint_in_8_bits_stay_as_they_are() -> None:
    spec = replace(SPEC, quantized="int8")
    plan = made(cpus(1), "none", spec)
    assert plan.quantize == "int8"
    (note,) = [entry for entry in plan.resolved if entry.setting == "model.quantize"]
    assert note.reason.startswith("as the weights are in the checkpoint")
    assert made(cpus(1), "int8", spec).quantize == "int8"
    with pytest.raises(PlanError, match=r'"fp8", but the weights .* are in int8 already'):
        made(gpus(90), "fp8", spec)
    with pytest.raises(PlanError, match=r'model\.quantize = "fp8", but the stages run on CPUs'):
        made(cpus(1), "none", replace(SPEC, quantized="fp8"))
