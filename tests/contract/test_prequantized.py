"""Checkpoints in 8 bits, written as their tools write them, against the dequantised model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mpipipe.checkpoint.quantization import read_quantization
from mpipipe.errors import CheckpointError
from mpipipe.models.quantized_linear import quantized_linears
from mpipipe.types import QuantizeName
from tests.contract.tiny_models import (
    InProcessPipeline,
    TinyModel,
    load_stage,
    split,
)
from tests.unit.test_quantized_checkpoints import FP8, GPTQ, INT8, compressed

PROMPT = (7, 7, 20, 31, 8, 90, 41, 12, 60, 33, 2)
IGNORED = "model.layers.1.mlp.down_proj"

Tensors = dict[str, torch.Tensor]


def narrowed(weight_OI: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    largest = 127.0 if scheme == "int8" else 448.0
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / largest
    exact_OI = weight_OI / scale_O1
    if scheme == "int8":
        return exact_OI.round().to(torch.int8), scale_O1
    return exact_OI.to(torch.float8_e4m3fn), scale_O1


def packed_rows(weight_OI: torch.Tensor) -> torch.Tensor:
    """Four weights + 128 in an int32, the first in its lowest byte; the last filled up."""
    shifted = (weight_OI.numpy().astype(np.int64) + 128).astype(np.uint32)
    padding = -shifted.shape[1] % 4
    shifted = np.pad(shifted, ((0, 0), (0, padding)))
    packed = sum(shifted[:, place::4] << np.uint32(8 * place) for place in range(4))
    return torch.from_numpy(np.asarray(packed, dtype=np.uint32).view(np.int32))


def as_plain(name: str, weight: torch.Tensor, scale: torch.Tensor) -> Tensors:
    return {f"{name}.weight": weight, f"{name}.weight_scale": scale.to(torch.bfloat16)}


def as_packed(name: str, weight: torch.Tensor, scale: torch.Tensor) -> Tensors:
    return {
        f"{name}.weight_packed": packed_rows(weight),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


def as_gptq(name: str, weight: torch.Tensor, scale: torch.Tensor) -> Tensors:
    outputs, inputs = weight.shape
    return {
        f"{name}.qweight": packed_rows(weight).t().contiguous(),
        f"{name}.scales": scale.t().contiguous().to(torch.float16),
        f"{name}.qzeros": torch.full((1, outputs // 4), 0x7F7F7F7F, dtype=torch.int32),
        f"{name}.g_idx": torch.zeros(inputs, dtype=torch.int32),
    }


FORMS: dict[str, tuple[dict[str, Any], Callable[..., Tensors], QuantizeName]] = {
    "int-quantized": (compressed("int-quantized", INT8), as_plain, "int8"),
    "pack-quantized": (compressed("pack-quantized", INT8), as_packed, "int8"),
    "float-quantized": (compressed("float-quantized", FP8), as_plain, "fp8"),
    "gptq": (GPTQ, as_gptq, "int8"),
}


def write(model: TinyModel, form: str, folder: Path, *, as_bin: bool = False) -> TinyModel:
    """The checkpoint of `form` in `folder`, and beside it the model of the dequantised weights."""
    stated, pack, scheme = FORMS[form]
    stated = {**stated, "ignore": ["lm_head", IGNORED]} if "ignore" in stated else dict(stated)
    twin = copy.deepcopy(model.reference)
    tensors = dict(twin.state_dict())
    for name, module in twin.named_modules():
        inside = ".layers." in name and name not in stated.get("ignore", ())
        if not isinstance(module, nn.Linear) or not inside:
            continue
        weight, scale = narrowed(module.weight.data, scheme)
        stored = pack(name, weight, scale)
        (kept,) = [
            t for key, t in stored.items() if key.rpartition(".")[2].endswith(("scale", "scales"))
        ]
        module.weight.data = weight.float() * kept.float().reshape(-1, 1)
        del tensors[f"{name}.weight"]
        tensors |= stored
    config = {**twin.config.to_dict(), "quantization_config": stated}
    folder.joinpath("config.json").write_text(json.dumps(config))
    if as_bin:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors")
    exact = folder / "exact"
    twin.save_pretrained(exact)
    return TinyModel(exact, twin)


def logits(folder: Path, num_stages: int, mode: str, quantize: QuantizeName) -> torch.Tensor:
    stages = [load_stage(folder, p, mode=mode, quantize=quantize) for p in split(num_stages)]
    return InProcessPipeline(stages).step([(0, PROMPT, 0)])


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("form", ["int-quantized", "pack-quantized", "gptq"])
def test_int8_checkpoints_compute_what_their_dequantised_model_does(
    form: str, family: str, tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    twin = write(tiny(family), form, tmp_path)
    expected = logits(twin.folder, 1, "plain", "none")
    for mode in ("plain", "packed"):
        found = logits(tmp_path, 2, mode, "int8")
        assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_a_bin_file_is_read_too(tiny: Callable[[str], TinyModel], tmp_path: Path) -> None:
    twin = write(tiny("llama"), "gptq", tmp_path, as_bin=True)
    expected = logits(twin.folder, 1, "plain", "none")
    assert (logits(tmp_path, 2, "packed", "int8") - expected).norm() <= 1e-4 * expected.norm()


def test_fp8_checkpoints_keep_their_numbers(
    tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    twin = write(tiny("llama"), "float-quantized", tmp_path)
    (stage,) = (load_stage(tmp_path, p, mode="plain", quantize="fp8") for p in split(1))
    exact = twin.reference.state_dict()
    names = []
    for name, linear in quantized_linears(stage.module):
        names.append(name)
        assert linear.weight.dtype == torch.float8_e4m3fn
        restored = linear.weight.float() * linear.scale[:, None]
        assert torch.equal(restored, exact[f"{name}.weight"])
    assert len(names) == 27
    assert IGNORED not in names
    expected = logits(twin.folder, 1, "plain", "none")
    found = logits(tmp_path, 1, "plain", "fp8")
    assert (found - expected).norm() <= 0.3 * expected.norm()  # the activations' three bits


def test_what_the_checkpoint_ignores_stays_plain(
    tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    write(tiny("llama"), "int-quantized", tmp_path)
    stages = [load_stage(tmp_path, p, mode="plain", quantize="int8") for p in split(2)]
    ignored = stages[1].module.model.layers[0].mlp.down_proj
    assert type(ignored) is nn.Linear
    assert type(stages[1].module.lm_head) is nn.Linear
    assert sum(1 for s in stages for _ in quantized_linears(s.module)) == 27


def test_one_scale_for_a_whole_tensor_is_one_for_each_channel(
    tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    model = tiny("llama")
    write(model, "int-quantized", tmp_path)
    stage = load_stage(tmp_path, split(1)[0], mode="plain", quantize="int8")
    name, linear = next(iter(quantized_linears(stage.module)))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{name}.weight_scale"] = torch.tensor([0.25])
    save_file(tensors, tmp_path / "model.safetensors")
    stage = load_stage(tmp_path, split(1)[0], mode="plain", quantize="int8")
    _, again = next(iter(quantized_linears(stage.module)))
    assert torch.equal(again.scale, torch.full_like(linear.scale, 0.25))
    assert torch.equal(again.weight, linear.weight)


def test_a_weight_of_another_shape_or_without_a_scale_is_named(
    tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    write(tiny("llama"), "gptq", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    shorter = {**tensors, f"{name}.qweight": tensors[f"{name}.qweight"][:-1].contiguous()}
    save_file(shorter, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"{name}\.weight is \[11, 80\], expected \[12, 80\]"
    ):
        load_stage(tmp_path, split(1)[0], mode="plain", quantize="int8")
    del tensors[f"{name}.scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"1 missing \({name}\.weight\)"):
        load_stage(tmp_path, split(1)[0], mode="plain", quantize="int8")


def test_the_loader_finds_the_quantisation_in_the_folder(
    tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    write(tiny("llama"), "pack-quantized", tmp_path)
    found = read_quantization(tmp_path)
    assert found is not None
    assert found.packing == "rows"
