"""Which quantised checkpoints are read, how they lie, and which are refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpipipe.checkpoint.quantization import PlainLinears, quantization_of, read_quantization
from mpipipe.checkpoint.spec import read_spec
from mpipipe.errors import UnsupportedModelError

LAYER = "model.layers.3.self_attn.q_proj"
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(form: str, weights: dict[str, Any], **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    if weights["type"] == "float":
        group["input_activations"] = TOKEN
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **changes,
    }


GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True, "desc_act": False}


@pytest.mark.parametrize(
    ("stated", "scheme", "packing", "weight", "scale"),
    [
        (compressed("int-quantized", INT8), "int8", "none", "weight", "weight_scale"),
        (compressed("naive-quantized", INT8), "int8", "none", "weight", "weight_scale"),
        (
            compressed("int-quantized", INT8, kv_cache_scheme=None),
            "int8",
            "none",
            "weight",
            "weight_scale",
        ),
        (compressed("float-quantized", FP8), "fp8", "none", "weight", "weight_scale"),
        (compressed("pack-quantized", INT8), "int8", "rows", "weight_packed", "weight_scale"),
        (GPTQ, "int8", "columns", "qweight", "scales"),
        ({**GPTQ, "desc_act": True}, "int8", "columns", "qweight", "scales"),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, "int8", "columns", "qweight", "scales"),
    ],
)
def test_what_maps_onto_8_bits_with_a_scale_per_channel_is_read(
    stated: dict[str, Any], scheme: str, packing: str, weight: str, scale: str
) -> None:
    found = quantization_of({"quantization_config": stated})
    assert found is not None
    assert (found.scheme, found.packing, found.weight, found.scale) == (
        scheme,
        packing,
        weight,
        scale,
    )
    assert found.holds(LAYER)
    assert not found.holds("lm_head")


def test_what_a_checkpoint_leaves_plain_is_found_by_its_tensors(tmp_path: Path) -> None:
    quantization = quantization_of({"quantization_config": compressed("int-quantized", INT8)})
    assert quantization is not None
    shapes = {
        "model.embed_tokens.weight": (100, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.q_proj.weight_scale": (8, 1),
        "model.layers.0.mlp.down_proj.weight": (8, 12),
        "model.layers.1.mlp.down_proj.weight": (8, 12),
        "lm_head.weight": (100, 8),
    }
    assert quantization.plain_linears(shapes) == PlainLinears(2 * 8 * 12, 2 * 8, has_head=True)
    shapes["lm_head.weight_scale"] = (100, 1)
    assert not quantization.plain_linears(shapes).has_head


def test_a_specification_counts_what_its_checkpoint_leaves_plain(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "quantization_config": compressed("int-quantized", INT8, ignore=[]),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    without_weights = read_spec(tmp_path)
    assert (without_weights.plain_parameters, without_weights.plain_head) == (0, False)
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "lm_head.weight": np.zeros((100, 8), np.int8),
        "lm_head.weight_scale": np.zeros((100, 1), np.float32),
        "model.layers.2.mlp.down_proj.weight": np.zeros((8, 32), np.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    spec = read_spec(tmp_path)
    assert (spec.plain_parameters, spec.plain_outputs, spec.plain_head) == (86, 3, False)
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert read_spec(tmp_path).plain_head


def test_the_layers_are_those_that_the_checkpoint_names() -> None:
    ignoring = compressed("int-quantized", INT8, ignore=["re:.*down_proj", LAYER])
    found = quantization_of({"quantization_config": ignoring})
    assert found is not None
    assert not found.holds(LAYER)
    assert not found.holds("model.layers.0.mlp.down_proj")
    assert found.holds("model.layers.30.self_attn.q_proj")
    assert found.holds("lm_head")
    some = copy.deepcopy(compressed("int-quantized", INT8))
    some["config_groups"]["group_0"]["targets"] = ["re:.*self_attn"]
    found = quantization_of({"quantization_config": some})
    assert found is not None
    assert found.holds(LAYER)
    assert not found.holds("model.layers.0.mlp.up_proj")
    listed = {**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}
    found = quantization_of({"quantization_config": {**listed, "lm_head": True}})
    assert found is not None
    assert found.holds(LAYER)
    assert not found.holds("model.layers.3.self_attn.o_proj")


FOUR = {**INT8, "num_bits": 4, "strategy": "group", "group_size": 128}


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, r"with awq, .* 4 bits"),
        ({"quant_method": "bitsandbytes"}, "with bitsandbytes, .* own kernels"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "with fp8, .* per block"),
        ({"quant_method": "aqlm"}, "with aqlm, .* its layout is not known"),
        ({}, "with an unknown method"),
        ("int8", "quantization_config is 'int8'"),
        ({**GPTQ, "bits": 4}, "with gptq, .* have 4 bits"),
        ({**GPTQ, "group_size": 128}, "with gptq, .* per 128 weights"),
        ({**GPTQ, "sym": False}, "with gptq, .* not symmetric"),
        ({**GPTQ, "checkpoint_format": "marlin"}, 'with gptq, .* "marlin"'),
        ({**GPTQ, "dynamic": {"-:.*down": {}}}, "with gptq, .* layers differ"),
        (compressed("pack-quantized", FOUR), "with compressed-tensors, .* have 4 bits"),
        (compressed("nvfp4-pack-quantized", FP8), 'format is "nvfp4-pack-quantized"'),
        (compressed("int-quantized", {**INT8, "symmetric": False}), "not symmetric"),
        (compressed("float-quantized", {**FP8, "strategy": "block"}), "scales are per block"),
        (compressed("int-quantized", FP8), 'of type "float"'),
        (compressed("int-quantized", INT8, kv_cache_scheme=FP8), "keys and values are quantised"),
        (compressed("int-quantized", INT8, config_groups={}), "0 schemes"),
        (compressed("int-quantized", INT8, config_groups={"g": 3}), "config_groups are broken"),
        (compressed("int-quantized", INT8, config_groups={"g": {}}), "nothing of its weights"),
        (compressed("int-quantized", INT8, ignore=["re:("]), "no regular expression"),
    ],
)
def test_all_else_is_refused_in_a_sentence_with_a_remedy(stated: object, told: str) -> None:
    with pytest.raises(UnsupportedModelError, match=told) as caught:
        quantization_of({"quantization_config": stated})
    assert 'float16 or bfloat16 weights, with model.quantize = "int8"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_floats_for_activations_of_16_bits_and_experts_are_refused() -> None:
    without = compressed("float-quantized", FP8)
    without["config_groups"]["group_0"]["input_activations"] = None
    with pytest.raises(UnsupportedModelError, match="W8A16"):
        quantization_of({"quantization_config": without})
    with pytest.raises(UnsupportedModelError, match="experts"):
        quantization_of({"quantization_config": GPTQ, "num_local_experts": 8})


def test_the_spec_of_a_quantised_model_says_so(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 128,
        "dtype": "bfloat16",
    }
    assert read_quantization(tmp_path) is None
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert read_quantization(tmp_path) is None
    assert read_spec(tmp_path).quantized == "none"
    path.write_text(json.dumps({**config, "quantization_config": GPTQ}))
    assert read_spec(tmp_path).quantized == "int8"
