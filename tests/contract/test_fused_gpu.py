"""The fused stack computes what transformers' modules do; with kernels, what it does without."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mpipipe.clock import MonotonicClock
from mpipipe.metrics.boot import BootTimeline
from mpipipe.models import fused_gpu
from mpipipe.models.adapter import StageModel, build_stage_model
from mpipipe.models.attention.base import AttentionBackend
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.attention.triton_paged import TritonAttention
from mpipipe.models.fused_gpu import MergedLayer, merge_layer
from mpipipe.models.operations import Operations, torch_operations, triton_operations
from mpipipe.runtime.loading import load_parts
from tests.contract.engine_pipeline import engine_plan
from tests.contract.stage_steps import (
    run_tensor_decodes,
    run_varlen,
    stage_inputs,
    step_cache,
    varlen_layout,
)
from tests.contract.tiny_models import (
    TinyModel,
    fill,
    load_stage,
    modules_of_transformers,
    split,
)

FAMILIES = [
    "llama",
    "llama-head_dim-100",
    "llama-tied",
    "llama-rope-llama3",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
]
DTYPES = (torch.float32, torch.bfloat16)


def finished_stage(
    folder: Path,
    number: int,
    *,
    mode: str,
    dtype: torch.dtype = torch.float32,
    backend: AttentionBackend | None = None,
    operations: Operations | None = None,
    device: str = "cpu",
) -> StageModel:
    """Stage `number` of two. The first has one layer, the second three."""
    config = AutoConfig.from_pretrained(folder)
    with modules_of_transformers() if mode == "plain" else nullcontext():
        stage = build_stage_model(
            folder,
            split(2)[number],
            dtype=dtype,
            backend=backend or SdpaAttention(),
            max_sequence_tokens=32,
        )
    fill(stage, folder, device)
    heads = config.num_attention_heads
    pages = step_cache(
        stage,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        device=device,
    )
    stage.finish(pages, mode=mode, operations=operations)
    assert stage.mode == mode
    return stage


def assert_near(actual: list[torch.Tensor], expected: list[torch.Tensor], error: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.float() - theirs.float()).norm() <= error * theirs.float().norm()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_stack_computes_what_transformers_modules_do(
    family: str, number: int, tiny: Callable[[str], TinyModel]
) -> None:
    folder = tiny(family).folder
    plain = run_varlen(finished_stage(folder, number, mode="plain"))
    operations = torch_operations()
    fused = finished_stage(folder, number, mode="fast", operations=operations)
    assert_near(run_varlen(fused), plain, 1e-5)


@pytest.mark.parametrize("family", ["llama-head_dim-100", "qwen2-window", "qwen3"])
def test_decode_steps_from_tensors_alone_give_the_same(
    family: str, tiny: Callable[[str], TinyModel]
) -> None:
    stage = finished_stage(tiny(family).folder, 1, mode="fast", operations=torch_operations())
    expected = run_varlen(stage)[-2:]
    assert_near(run_tensor_decodes(stage), expected, 1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma2"])
def test_plain_stages_decode_from_tensors_alone_too(
    family: str, tiny: Callable[[str], TinyModel]
) -> None:
    folder = tiny(family).folder
    config = AutoConfig.from_pretrained(folder)
    heads = config.num_attention_heads
    for plan in split(2):
        stage = build_stage_model(
            folder, plan, dtype=torch.float32, backend=SdpaAttention(), max_sequence_tokens=32
        )
        fill(stage, folder)
        pages = step_cache(
            stage,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )
        stage.finish(pages, mode="plain")
        expected = run_varlen(stage)[-2:]
        assert_near(run_tensor_decodes(stage), expected, 1e-5)


def test_the_fused_stack_rounds_no_worse_than_plain_modules_in_bfloat16(
    tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3").folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)  # weights that bfloat16 holds exactly
    exact, plain = (
        torch.cat(run_varlen(finished_stage(tmp_path, 0, mode="plain", dtype=dtype))).float()
        for dtype in DTYPES
    )
    operations = torch_operations()
    fused_stage = finished_stage(
        tmp_path, 0, mode="fast", dtype=torch.bfloat16, operations=operations
    )
    fused = torch.cat(run_varlen(fused_stage)).float()
    assert (plain - exact).norm() > 0
    assert (fused - exact).norm() <= 1.2 * (plain - exact).norm()


if importlib.util.find_spec("triton") is not None:  # in its interpreter: see conftest.py

    @pytest.mark.parametrize(("family", "number"), [("qwen3", 1), ("llama-head_dim-100", 0)])
    def test_kernels_compute_what_torch_does(
        family: str, number: int, tiny: Callable[[str], TinyModel]
    ) -> None:
        folder = tiny(family).folder
        plain = run_varlen(finished_stage(folder, number, mode="plain"))
        stage = finished_stage(
            folder,
            number,
            mode="fast",
            backend=TritonAttention(),
            operations=triton_operations(),
        )
        assert_near(run_varlen(stage), plain, 1e-5)
        assert_near(run_tensor_decodes(stage), plain[-2:], 1e-5)


def test_what_the_fused_stack_is_given_stays_as_it_is(tiny: Callable[[str], TinyModel]) -> None:
    stage = finished_stage(tiny("llama").folder, 1, mode="fast", operations=torch_operations())
    hidden_TH = stage_inputs(stage, 5, seed=3)
    before_TH = hidden_TH.clone()
    stage.forward(hidden_TH, varlen_layout(((0, 5, 5),)), None)
    assert torch.equal(hidden_TH, before_TH)


def test_other_mathematics_are_left_to_transformers(tiny: Callable[[str], TinyModel]) -> None:
    for family in ("gemma2", "opt", "olmo2", "granite", "mixtral", "gpt_neox"):
        stage = build_stage_model(
            tiny(family).folder,
            split(1)[0],
            dtype=torch.float32,
            backend=SdpaAttention(),
            max_sequence_tokens=32,
        )
        fill(stage, tiny(family).folder)
        problem = fused_gpu.unsupported_reason(stage.module, [], 16)
        assert type(stage.module).__name__ in problem


def test_the_rotary_table_is_as_long_as_the_sequences_of_the_run(
    tiny: Callable[[str], TinyModel],
) -> None:
    """A model made for 128k tokens would have tables of 64 MB, for prompts of a few hundred."""
    folder = tiny("llama").folder
    for longest in (12, 32):
        stage = build_stage_model(
            folder,
            split(1)[0],
            dtype=torch.float32,
            backend=SdpaAttention(),
            max_sequence_tokens=longest,
        )
        fill(stage, folder)
        stage.finish(
            step_cache(stage, num_kv_heads=2, head_dim=12),
            mode="fast",
            operations=torch_operations(),
        )
        assert stage._fused is not None
        cos_TD, sin_TD = stage._fused.rotary(torch.tensor([0, longest - 1]))
        assert cos_TD.shape == sin_TD.shape == (2, 12)
        with pytest.raises(IndexError):
            stage._fused.rotary(torch.tensor([longest]))


def test_a_stage_is_built_for_the_sequences_of_its_plan(tiny: Callable[[str], TinyModel]) -> None:
    plan = replace(engine_plan(1), model_path=str(tiny("llama").folder))
    assert plan.max_sequence_tokens < plan.max_context_tokens
    boot = BootTimeline(MonotonicClock())
    parts = load_parts(plan, plan.stages[0], False, torch.device("cpu"), boot)
    assert parts.model._max_positions == plan.max_sequence_tokens
    boot.end()
    names = [part.name for part in boot.parts]
    assert names[:2] == ["process", "read weights"]  # as nothing has begun `build` here
    assert names[-1] == "convert weights"
    (read,) = (part for part in boot.parts if part.name == "read weights")
    assert read.num_bytes == parts.loaded_bytes > 0


def test_cpu_stages_are_packed_unless_asked_otherwise(tiny: Callable[[str], TinyModel]) -> None:
    stage = load_stage(tiny("llama").folder, split(1)[0], mode="auto")
    assert stage.mode == "packed"
    assert stage.mode_reason


def test_plain_weights_are_freed_layer_by_layer(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llama").folder
    config = AutoConfig.from_pretrained(folder)
    stage = build_stage_model(
        folder, split(1)[0], dtype=torch.float32, backend=SdpaAttention(), max_sequence_tokens=32
    )
    fill(stage, folder)
    merged = [
        weakref.ref(module.weight)
        for name, module in stage.module.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("q_proj", "gate_proj"))
    ]
    alive: list[int] = []

    def counting(*arguments: object) -> MergedLayer:
        gc.collect()
        alive.append(sum(weight() is not None for weight in merged))
        return merge_layer(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fused_gpu, "merge_layer", counting)
    pages = step_cache(stage, num_kv_heads=config.num_key_value_heads, head_dim=12)
    stage.finish(pages, mode="fast", operations=torch_operations())
    assert alive == [8, 6, 4, 2]  # two a layer, four layers
