"""The fused decoder layer computes what transformers' layer does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mpipipe.kv_cache.base import ContiguousKVCache
from mpipipe.kv_cache.layout import SequenceLens, build_layout
from mpipipe.models.adapter import StageModel
from mpipipe.models.fused_cpu import FusedLayer
from mpipipe.models.prepacked_linear import can_prepack
from tests.contract.tiny_models import TinyModel, load_stage, split

FAMILIES = ["llama", "llama-head_dim-100", "mistral", "qwen2", "qwen2-window"]


def run_steps(stage: StageModel) -> list[torch.Tensor]:
    """Two prompts in chunks of unequal lengths, then a decode step of both; all outputs."""
    spans = [
        [SequenceLens(0, 0, 5, 5), SequenceLens(1, 5, 3, 3)],
        [SequenceLens(0, 0, 1, 6), SequenceLens(1, 1, 2, 5)],
        [SequenceLens(0, 0, 1, 7), SequenceLens(1, 1, 1, 6)],
    ]
    torch.manual_seed(1)
    outputs = []
    for step in spans:
        layout = build_layout([(span, [2 * span.sequence_id + 1]) for span in step], 16)
        hidden_TH = torch.randn(layout.num_tokens, stage.hidden_size).bfloat16().to(stage.dtype)
        outputs.append(stage.run_base(hidden_TH, layout))
    return outputs


def outputs(folder: Path, dtype: torch.dtype, *, mode: str) -> list[torch.Tensor]:
    """The steps of `run_steps` on the second of two stages, in float32."""
    stage = load_stage(folder, split(2)[1], mode=mode, dtype=dtype, cache=ContiguousKVCache())
    fused = [isinstance(layer, FusedLayer) for layer in stage.module.model.layers]
    # Of bfloat16 a processor without its instructions packs nothing, so the layers stay plain.
    packs = mode == "packed" and can_prepack(nn.Linear(1, 1, dtype=dtype))
    assert all(fused) if packs else not any(fused)
    with torch.inference_mode():
        return [output.float() for output in run_steps(stage)]


@pytest.fixture(params=FAMILIES)
def folder(
    request: pytest.FixtureRequest, tiny: Callable[[str], TinyModel], tmp_path: Path
) -> Path:
    """A model whose weights bfloat16 holds exactly, so that dtypes differ in arithmetic only."""
    model = tiny(request.param)
    AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.bfloat16).save_pretrained(
        tmp_path
    )
    return tmp_path


def test_fused_layers_compute_what_plain_ones_do(folder: Path) -> None:
    plain = outputs(folder, torch.float32, mode="plain")
    fused = outputs(folder, torch.float32, mode="packed")
    for expected, actual in zip(plain, fused, strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_fused_layers_round_no_worse_than_plain_ones_in_bfloat16(folder: Path) -> None:
    exact = torch.cat(outputs(folder, torch.float32, mode="plain"))
    plain = torch.cat(outputs(folder, torch.bfloat16, mode="plain"))
    fused = torch.cat(outputs(folder, torch.bfloat16, mode="packed"))
    assert (fused - exact).norm() <= 1.5 * (plain - exact).norm()
    assert (plain - exact).norm() > 0


def test_families_whose_mathematics_differ_are_left_alone(
    tiny: Callable[[str], TinyModel],
) -> None:
    for family in ("gemma", "olmo2", "granite", "phi3"):
        stage = load_stage(tiny(family).folder, split(1)[0], mode="packed")
        assert not any(isinstance(module, FusedLayer) for module in stage.module.modules())


@pytest.mark.parametrize("rows", [(4, 7), (7,), ()])
def test_behind_the_last_attention_only_sampled_rows_are_computed(
    folder: Path, rows: tuple[int, ...]
) -> None:
    """Two prompts, of which `rows` are sampled from; then a decode step of both."""
    prompts = build_layout([(SequenceLens(0, 0, 5, 5), [1]), (SequenceLens(1, 5, 3, 3), [3])], 16)
    decodes = build_layout([(SequenceLens(0, 0, 1, 6), [1]), (SequenceLens(1, 1, 1, 4), [3])], 16)
    rows_S = torch.tensor(rows, dtype=torch.int64)
    logits, num_normed = {}, {}
    for mode in ("plain", "packed"):
        stage = load_stage(folder, split(2)[1], mode=mode, cache=ContiguousKVCache())
        sizes: list[int] = []
        stage.module.model.norm.register_forward_hook(
            lambda _module, _inputs, output, sizes=sizes: sizes.append(output.shape[-2])
        )
        torch.manual_seed(1)
        hidden_TH = torch.randn(8, stage.hidden_size)
        first_SV = stage.forward(hidden_TH, prompts, rows_S)
        second_SV = stage.forward_decode(hidden_TH[:2], decodes)
        logits[mode] = torch.cat((first_SV, second_SV))
        num_normed[mode] = sizes
    assert logits["packed"].shape == (len(rows) + 2, logits["plain"].shape[1])
    torch.testing.assert_close(logits["packed"], logits["plain"], rtol=1e-4, atol=1e-4)
    assert num_normed == {"plain": [8, 2], "packed": [len(rows), 2]}
