from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpipipe.checkpoint.spec import ModelSpec, read_spec
from mpipipe.errors import CheckpointError, UnsupportedModelError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 1024,
    "ffn_dim": 4096,
    "word_embed_proj_dim": 512,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
    "eos_token_id": 2,
}
GPT_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "eos_token_id": 0,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "head_dim": 128,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
}


def write(folder: Path, config: object, generation: object = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def spec_of(folder: Path, base: dict[str, object], **changes: object) -> ModelSpec:
    config = {key: value for key, value in {**base, **changes}.items() if value != "absent"}
    return read_spec(write(folder, config))


def test_openllama_has_head_dim_100_and_as_many_kv_heads_as_heads(tmp_path: Path) -> None:
    assert read_spec(write(tmp_path, LLAMA)) == ModelSpec(
        model_type="llama",
        architecture="LlamaForCausalLM",
        num_layers=26,
        hidden_size=3200,
        intermediate_size=8640,
        num_heads=32,
        num_kv_heads=32,
        head_dim=100,
        vocab_size=32000,
        max_context_tokens=2048,
        tied_embeddings=False,
        gated_mlp=True,
        dtype="float16",
        eos_token_ids=(2,),
    )


def test_opt_names_its_sizes_differently_and_ties_by_default(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path, OPT))
    assert (spec.intermediate_size, spec.gated_mlp, spec.tied_embeddings) == (4096, False, True)
    assert spec.embedding_parameters == 50272 * 512
    assert spec.num_experts == 1


def test_gpt_neox_has_a_plain_mlp_and_may_end_at_id_0(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path, GPT_NEOX))
    assert (spec.gated_mlp, spec.tied_embeddings, spec.eos_token_ids) == (False, False, (0,))
    assert spec.layer_parameters == 4 * 512 * 512 + 2 * 512 * 2048


def test_a_stated_head_dim_wins_over_the_quotient(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path, QWEN3))
    assert (spec.head_dim, spec.num_kv_heads, spec.dtype) == (128, 8, "bfloat16")
    assert spec.kv_elements_per_token_layer == 2 * 8 * 128


def test_names_of_gpt2_and_a_null_inner_size(tmp_path: Path) -> None:
    config = {
        "architectures": ["CodeGenForCausalLM"],
        "model_type": "codegen",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "n_positions": 1024,
        "vocab_size": 50257,
        "eos_token_id": 50256,
    }
    spec = read_spec(write(tmp_path, config))
    assert (spec.hidden_size, spec.num_layers, spec.intermediate_size) == (768, 12, 3072)
    assert (spec.max_context_tokens, spec.tied_embeddings, spec.dtype) == (1024, False, "float32")


@pytest.mark.parametrize(
    ("settings", "mlp"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, 8 * 3 * 3200 * 8640),
        (
            {"model_type": "qwen2_moe", "num_experts": 60, "moe_intermediate_size": 1408},
            60 * 9600 * 1408,
        ),
        ({"model_type": "aria_text", "moe_num_experts": 4}, 4 * 3 * 3200 * 8640),
    ],
)
def test_all_experts_of_a_layer_are_counted(
    tmp_path: Path, settings: dict[str, object], mlp: int
) -> None:
    assert spec_of(tmp_path, LLAMA, **settings).layer_parameters == 4 * 3200 * 3200 + mlp


@pytest.mark.parametrize(
    ("settings", "kv_heads"),
    [
        ({"multi_query": True, "new_decoder_architecture": False}, 1),
        ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 8}, 8),
        ({"multi_query": False, "new_decoder_architecture": False, "num_kv_heads": 71}, 16),
    ],
)
def test_falcon_kv_heads(tmp_path: Path, settings: dict[str, object], kv_heads: int) -> None:
    assert spec_of(tmp_path, OPT, model_type="falcon", **settings).num_kv_heads == kv_heads


def test_sizes_in_text_config_are_found(tmp_path: Path) -> None:
    text = {key: value for key, value in QWEN3.items() if key not in ("architectures", "dtype")}
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "dtype": "bfloat16",
        "text_config": {**text, "model_type": "gemma3_text"},
    }
    spec = read_spec(write(tmp_path, outer))
    assert (spec.model_type, spec.num_layers, spec.dtype) == ("gemma3_text", 28, "bfloat16")
    assert spec.architecture == "Gemma3ForConditionalGeneration"


@pytest.mark.parametrize(
    ("config_eos", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (2, {"eos_token_id": [128001, 128009]}, (128001, 128009)),
        (2, {"eos_token_id": 7}, (7,)),
        (2, {"temperature": 1.0}, (2,)),
        (None, None, ()),
        (2, {"eos_token_id": None}, (2,)),
    ],
)
def test_eos_ids_of_the_generation_config_win(
    tmp_path: Path, config_eos: object, generation: object, expected: tuple[int, ...]
) -> None:
    write(tmp_path, {**LLAMA, "eos_token_id": config_eos}, generation)
    assert read_spec(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "absent"}, "float32"),
    ],
)
def test_dtype_under_either_key(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    assert spec_of(tmp_path, LLAMA, **changes).dtype == expected


def test_an_unstated_dtype_is_that_of_the_safetensors_file(tmp_path: Path) -> None:
    header = {"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert spec_of(tmp_path, LLAMA, torch_dtype="absent").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"is_encoder_decoder": True, "model_type": "t5"},
            UnsupportedModelError,
            "an encoder beside the decoder",
        ),
        ({"is_causal": False}, UnsupportedModelError, "lets tokens see later ones"),
        # These state other sizes than most do, or none: that is not what is wrong with them.
        ({"model_type": "bloom", "n_head": 4}, UnsupportedModelError, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, UnsupportedModelError, "ALiBi"),
        ({"model_type": "gpt_neo"}, UnsupportedModelError, "embeds positions"),
        ({"model_type": "xglm"}, UnsupportedModelError, "embeds positions"),
        ({"model_type": "rwkv", "num_attention_heads": "absent"}, UnsupportedModelError, "RWKV"),
        ({"model_type": "minicpm3"}, UnsupportedModelError, "keys and values of several sizes"),
        ({"model_type": "granite_swa"}, UnsupportedModelError, "a learned sink"),
        ({"model_type": "doge"}, UnsupportedModelError, "chooses the keys"),
        ({"model_type": "bert"}, UnsupportedModelError, "is an encoder"),
        ({"architectures": ["BertForMaskedLM"]}, UnsupportedModelError, "BertForMaskedLM"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "gptq"),
        ({"torch_dtype": "float8_e4m3fn"}, UnsupportedModelError, "float8_e4m3fn"),
        ({"num_attention_heads": [4, 8]}, UnsupportedModelError, "num_attention_heads"),
        ({"num_hidden_layers": 0}, UnsupportedModelError, "num_hidden_layers"),
        ({"vocab_size": 2**40}, UnsupportedModelError, "vocab_size"),
        ({"num_attention_heads": 5000}, CheckpointError, "5000 attention heads"),
        ({"num_hidden_layers": "absent"}, CheckpointError, "num_hidden_layers or n_layer"),
        ({"model_type": "absent"}, CheckpointError, "model_type"),
        ({"vocab_size": "absent"}, CheckpointError, "vocab_size"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_refused(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        spec_of(tmp_path, LLAMA, **changes)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model folder .*nowhere: check the path"):
        read_spec(tmp_path / "nowhere")


_YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4096),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}, 5120),
        ({"rope_scaling": {**_YARN, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_scaling": {**_YARN, "original_max_position_embeddings": 512}}, 2048),  # stated
        ({"rope_scaling": _YARN}, 8192),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, 2048),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, 2048),
        ({"rope_scaling": {"type": "dynamic", "factor": float("nan")}}, 2048),
        ({"rope_scaling": {"type": "dynamic", "factor": 10**400}}, 2048),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, 2048),
        ({"rope_scaling": {"type": "dynamic"}}, 2048),
        ({"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8.0}}, 2048),
    ],
)
def test_a_rotary_embedding_stretches_the_context_by_its_factor(
    tmp_path: Path, changes: dict[str, object], tokens: int
) -> None:
    assert spec_of(tmp_path, LLAMA, **changes).max_context_tokens == tokens


@pytest.mark.parametrize("absolute", [False, True])
def test_a_hub_name_gets_its_own_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("openlm-research/open_llama_3b_v2")
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        read_spec(path.absolute() if absolute else path)


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a file"):
        read_spec(tmp_path / "model.bin")


def test_a_folder_without_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no config.json \(it holds tokenizer.model\)"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b'{"model_type": "lla', "not valid JSON"),
        (b"[1]", "holds list"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    ],
)
def test_a_broken_config_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_spec(tmp_path)
