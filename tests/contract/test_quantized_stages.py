"""A stage in 8 bits computes what a model of the dequantised weights does, in every mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from mpipipe.models.adapter import StageModel, build_stage_model
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.operations import torch_operations
from mpipipe.models.quantized_linear import QuantizedLinear, quantized_linears
from mpipipe.planning.plan import StageOffload
from mpipipe.types import QuantizeName
from mpipipe.weights.random import fill_random
from tests.contract.tiny_models import (
    NUM_LAYERS,
    InProcessPipeline,
    Offloading,
    TinyModel,
    load_stage,
    paged_cache,
    split,
)

PROMPTS = ((5, 9, 3), (7, 7, 20, 31, 8, 90, 41, 12, 60, 33, 2), (11, 4, 50, 6, 77, 18, 29))
NUM_TOKENS = 7
# Fused on CPU and GPU, on a CPU alone, on neither; a tied head; biases; experts.
FAMILIES = ["llama", "llama-tied", "qwen2", "qwen3", "opt", "gpt_neox", "gemma2", "mixtral"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def is_quantised(name: str, module: nn.Module) -> bool:
    """By the rule of the README: linears of the layers, and the LM head."""
    inside = ".layers." in name or name in {"lm_head", "embed_out"}
    return isinstance(module, nn.Linear) and inside


def rounded(weight_OI: torch.Tensor) -> torch.Tensor:
    scale_O1 = (weight_OI.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)  # of padding
    return (weight_OI / scale_O1).round() * scale_O1


@pytest.fixture(scope="module")
def twin(
    tiny: Callable[[str], TinyModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TinyModel]:
    """The same model with weights that were in int8 once, saved in float32."""

    @cache
    def make(name: str) -> TinyModel:
        model: transformers.PreTrainedModel = copy.deepcopy(tiny(name).reference)
        if model.config.tie_word_embeddings:  # the embedding gives its rows as they are
            model.config.tie_word_embeddings = False
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.data.clone())
        for path, module in model.named_modules():
            if is_quantised(path, module):
                module.weight.data = rounded(module.weight.data)
        folder: Path = tmp_path_factory.mktemp(f"{name}-twin")
        model.save_pretrained(folder)
        return TinyModel(folder, model)

    return make


def new_pipeline(
    model: TinyModel, num_stages: int, mode: str, quantize: QuantizeName = "none"
) -> InProcessPipeline:
    return InProcessPipeline(
        [
            load_stage(
                model.folder,
                plan,
                cache=paged_cache(model.reference.config, plan.num_layers),
                mode=mode,
                quantize=quantize,
                operations=torch_operations() if mode == "fast" else None,
            )
            for plan in split(num_stages)
        ]
    )


def quantised_in(stage: StageModel) -> int:
    return sum(1 for _ in quantized_linears(stage.module))


@pytest.mark.parametrize("name", FAMILIES)
def test_int8_stages_give_the_tokens_of_the_dequantised_model(
    name: str, tiny: Callable[[str], TinyModel], twin: Callable[[str], TinyModel]
) -> None:
    expected = [twin(name).greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) >= 5
    for num_stages in (1, 2, 4):
        pipeline = new_pipeline(tiny(name), num_stages, "packed", "int8")
        assert pipeline.generate(PROMPTS, NUM_TOKENS, chunk=4) == expected, num_stages


@pytest.mark.parametrize("mode", ["plain", "packed", "fast"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_every_mode_computes_with_the_dequantised_weights(
    name: str, mode: str, tiny: Callable[[str], TinyModel], twin: Callable[[str], TinyModel]
) -> None:
    expected = new_pipeline(twin(name), 1, "plain").step([(0, PROMPTS[1], 0)])
    pipeline = new_pipeline(tiny(name), 2, mode, "int8")
    assert [stage.mode for stage in pipeline.stages] == [mode, mode]
    found = pipeline.step([(0, PROMPTS[1], 0)])
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    exact = new_pipeline(tiny(name), 1, "plain").step([(0, PROMPTS[1], 0)])
    assert (found - exact).norm() > 1e-3 * exact.norm()  # else the weights were not quantised


def test_in_fp8_a_tied_head_stays_the_embedding(tiny: Callable[[str], TinyModel]) -> None:
    (stage,) = new_pipeline(tiny("llama-tied"), 1, "plain", "fp8").stages
    assert stage.module.lm_head.weight is stage.module.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_is_made_of_what_the_file_holds_however_the_model_is_split(
    dtype: torch.dtype, tiny: Callable[[str], TinyModel]
) -> None:
    """Also of a file in float32, where the embedding itself is rounded to bfloat16."""
    model = tiny("llama-tied")
    heads = [
        load_stage(model.folder, split(count)[-1], dtype=dtype, quantize="int8", mode="plain")
        for count in (1, 2)
    ]
    both, alone = (stage.module.lm_head for stage in heads)
    assert torch.equal(both.weight, alone.weight)
    assert torch.equal(both.scale, alone.scale)
    embedding = heads[0].module.model.embed_tokens.weight
    assert torch.equal(embedding, model.reference.get_input_embeddings().weight.to(dtype))


def test_random_weights_of_a_tied_head_are_those_of_the_embedding(
    tiny: Callable[[str], TinyModel],
) -> None:
    model = tiny("llama-tied")
    heads = []
    for plan in (split(1)[0], split(2)[1]):
        stage = build_stage_model(
            model.folder,
            plan,
            dtype=torch.bfloat16,
            backend=SdpaAttention(),
            max_sequence_tokens=64,
            quantize="int8",
        )
        report = fill_random(
            stage.module,
            stage.wanted_names(),
            tied=stage.tied,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )
        state = stage.module.state_dict()
        assert report.parameter_bytes == sum(tensor.nbytes for tensor in state.values())
        heads.append(stage.module.lm_head)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert heads[0].weight.any()


def test_what_is_quantised_and_what_stays(tiny: Callable[[str], TinyModel]) -> None:
    for name in ("llama", "llama-tied", "mixtral"):
        (stage,) = new_pipeline(tiny(name), 1, "plain", "int8").stages
        assert isinstance(stage.module.lm_head, QuantizedLinear)
        per_layer = 4 if name == "mixtral" else 7  # experts and their routing stay
        assert quantised_in(stage) == NUM_LAYERS * per_layer + 1
        assert stage.module.model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("mode", ["plain", "packed", "fast"])
def test_fp8_stages_compute_alike_in_every_mode(
    mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    exact = new_pipeline(tiny("qwen2"), 1, "plain").step([(0, PROMPTS[1], 0)])
    plain = new_pipeline(tiny("qwen2"), 1, "plain", "fp8").step([(0, PROMPTS[1], 0)])
    found = new_pipeline(tiny("qwen2"), 2, mode, "fp8").step([(0, PROMPTS[1], 0)])
    # A last bit that differs rounds an activation to its neighbour in three bits, now and then.
    assert (found - plain).norm() <= 3e-2 * plain.norm()
    # Weights this wide amplify every rounding: 28 products, each about 4 % off.
    assert 1e-2 <= (found - exact).norm() / exact.norm() <= 0.5


@pytest.mark.parametrize("mode", ["packed", "fast"])
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantised_weights_may_stand_anywhere(
    quantize: QuantizeName, mode: str, tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    def run(offload: StageOffload | None) -> list[list[int]]:
        model = tiny("qwen2")
        with closing(Offloading(tmp_path)) as offloading:
            stage = load_stage(
                model.folder,
                replace(split(1)[0], offload=offload),
                cache=paged_cache(model.reference.config, NUM_LAYERS),
                mode=mode,
                quantize=quantize,
                operations=torch_operations(),
                offloading=None if offload is None else offloading,
            )
            assert stage.mode == mode
            return InProcessPipeline([stage]).generate(PROMPTS, NUM_TOKENS, chunk=4)

    anywhere = StageOffload(
        host_layers=(1,), disk_layers=(0, 3), embedding="disk", head="host", num_buffers=2
    )
    assert run(anywhere) == run(None)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_stage_takes_little_memory(
    quantize: QuantizeName, dtype: torch.dtype, tiny: Callable[[str], TinyModel]
) -> None:
    (stage,) = (
        load_stage(tiny("llama").folder, plan, dtype=dtype, quantize=quantize, mode="plain")
        for plan in split(1)
    )
    for _, linear in quantized_linears(stage.module):
        assert linear.weight.dtype.itemsize == 1
        assert linear.scale.dtype == torch.float32
        assert linear(torch.ones(2, linear.in_features, dtype=dtype)).dtype == dtype
