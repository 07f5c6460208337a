"""GGUF files: the same weights, logits and tokens as the model they were made from, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mpipipe.errors import CheckpointError, UnsupportedModelError
from mpipipe.gguf_model import open_gguf, tokenizer_files
from mpipipe.models.tokenizer import open_tokenizer
from mpipipe.staging.record import Conversion
from mpipipe.staging.stage import StagingRequest, stage_model
from tests.contract.gguf_files import (
    HEADS,
    HIDDEN,
    MODELS,
    byte_vocabulary,
    random_model,
    sentencepiece_vocabulary,
    write_gguf,
)
from tests.contract.staging_view import SilentView

F32, F16, BF16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))
# file type → (type of the weights, largest error of a logit relative to the largest logit).
# Random weights of this size amplify rounding; q and k in a wrong order give an error near 1.
KINDS = {
    F32: ("float32", 1e-6),
    F16: ("float16", 1e-2),
    BF16: ("bfloat16", 8e-2),
    Q8_0: ("bfloat16", 0.15),
}
VOCABULARY = byte_vocabulary()
Change = Callable[[gguf.GGUFWriter], None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(40).unsqueeze(0) * 5
    with torch.inference_mode():
        result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_staged_model_computes_what_its_source_does(
    name: str, kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    source = random_model(name, len(VOCABULARY.tokens))
    architecture = MODELS[name][0]
    path = tmp_path / "tiny.gguf"
    expected = write_gguf(path, source, kind, VOCABULARY, architecture=architecture)
    staged = tmp_path / "staged"
    stage_model(StagingRequest(str(path), staged, Conversion(), ""), SilentView())
    model = AutoModelForCausalLM.from_pretrained(staged, dtype=torch.float32)
    dtype, tolerance = KINDS[kind]
    state = model.state_dict()
    for tensor_name, values in expected.items():
        rounded = values.to(getattr(torch, dtype)).float()
        assert torch.equal(state[tensor_name], rounded), tensor_name
    wanted = logits(source)
    error = (logits(model) - wanted).abs().max() / wanted.abs().max()
    assert error <= tolerance


def test_the_config_says_what_the_file_says(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(5)

    path = tmp_path / "tiny.gguf"
    model = random_model("qwen3", len(VOCABULARY.tokens))
    write_gguf(path, model, Q8_0, VOCABULARY, architecture="qwen3", change=change)
    found = open_gguf(path)
    config = found.config
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert (config["head_dim"], config["hidden_size"], config["vocab_size"]) == (
        32,
        HIDDEN,
        len(VOCABULARY.tokens),
    )
    assert config["rms_norm_eps"] == model.config.rms_norm_eps
    assert config["dtype"] == "bfloat16"
    assert dict(found.generation_config) == {"bos_token_id": 1, "eos_token_id": [2, 5]}


# ---- rotary factors ------------------------------------------------------------------------------


def llama3_factors(
    factor: float, theta: float = 10000.0, head_dim: int = HIDDEN // HEADS
) -> np.ndarray:
    """As llama.cpp's converter computes them."""
    result = []
    for frequency in theta ** (-np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 8192 / 4.0:
            result.append(1.0)
        elif wavelength > 8192 / 1.0:
            result.append(factor)
        else:
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, dtype=np.float32)


def write_with_factors(path: Path, factors: np.ndarray, theta: float = 500000.0) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["llama.rope.freq_base"]
        writer.add_rope_freq_base(theta)
        writer.add_tensor("rope_freqs.weight", factors)

    model = random_model("llama", len(VOCABULARY.tokens))
    write_gguf(path, model, F16, VOCABULARY, change=change)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotary_factors_of_llama_3_become_its_settings(factor: float, tmp_path: Path) -> None:
    theta = 500000.0
    factors = llama3_factors(factor, theta)
    assert 1.0 < np.median(factors) <= factor
    write_with_factors(tmp_path / "tiny.gguf", factors)
    staged = tmp_path / "staged"
    request = StagingRequest(str(tmp_path / "tiny.gguf"), staged, Conversion(), "")
    stage_model(request, SilentView())
    config = AutoModelForCausalLM.from_pretrained(staged).config
    assert config.rope_parameters["rope_type"] == "llama3"
    computed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    head_dim = HIDDEN // HEADS
    plain = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    assert torch.allclose(computed, plain / torch.from_numpy(factors), rtol=1e-4, atol=0)


def test_other_rotary_factors_are_refused(tmp_path: Path) -> None:
    factors = llama3_factors(8.0, 500000.0)
    factors[3] *= 1.01
    write_with_factors(tmp_path / "tiny.gguf", factors)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight.*not those of Llama 3"):
        open_gguf(tmp_path / "tiny.gguf")


# ---- refusals ------------------------------------------------------------------------------------


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


def experts(writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(8)


def odd_heads(writer: gguf.GGUFWriter) -> None:
    writer.add_value_length(8)


def extra_tensor(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32))


def split(writer: gguf.GGUFWriter) -> None:
    writer.add_uint16("split.count", 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (yarn, "llama.rope.scaling.type = 'yarn'"),
        (experts, "llama.expert_count = 8"),
        (odd_heads, "heads of several sizes"),
        (extra_tensor, "'blk.0.attn_sinks.weight'"),
        (split, "one of 3 parts.*llama-gguf-split"),
    ],
)
def test_what_would_compute_something_else_is_refused(
    change: Change, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    model = random_model("llama", len(VOCABULARY.tokens))
    write_gguf(path, model, F16, VOCABULARY, change=change)
    with pytest.raises(CheckpointError, match=words):
        open_gguf(path)


def test_an_architecture_that_was_not_tried_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = random_model("llama", len(VOCABULARY.tokens))
    write_gguf(path, model, F16, VOCABULARY, architecture="gemma2")
    with pytest.raises(UnsupportedModelError, match=r"'gemma2'.*llama, qwen2, qwen3"):
        open_gguf(path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = random_model("llama", len(VOCABULARY.tokens))
    lost = "model.layers.1.mlp.up_proj.weight"
    write_gguf(path, model, F16, VOCABULARY, without=lost)
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        open_gguf(path)


def test_a_file_that_counts_more_layers_than_it_holds_is_refused_at_once(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["llama.block_count"]
        writer.add_block_count(2**31)

    path = tmp_path / "tiny.gguf"
    model = random_model("llama", len(VOCABULARY.tokens))
    write_gguf(path, model, F16, VOCABULARY, change=change)
    with pytest.raises(CheckpointError, match="says 2147483648 layers and holds 2"):
        open_gguf(path)


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["llama.attention.head_count"]

    path = tmp_path / "tiny.gguf"
    model = random_model("llama", len(VOCABULARY.tokens))
    write_gguf(path, model, F16, VOCABULARY, change=change)
    with pytest.raises(CheckpointError, match="does not state num_attention_heads"):
        open_gguf(path)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = random_model("llama", len(VOCABULARY.tokens))
    write_gguf(path, model, F16, VOCABULARY)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="cut off"):
        open_gguf(path)


# ---- tokenizers ----------------------------------------------------------------------------------


def test_a_sentencepiece_vocabulary_gives_the_tokens_of_sentencepiece(tmp_path: Path) -> None:
    lines = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").splitlines()
    vocabulary, reference = sentencepiece_vocabulary([line for line in lines if line.strip()])
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_model("llama", len(vocabulary.tokens)), F16, vocabulary)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in tokenizer_files(open_gguf(path)).items():
        (folder / name).write_bytes(content)
    tokenizer = open_tokenizer(folder)
    texts = [*lines, " one space", "  two  spaces ", "a\n\nb\tc", "é 漢字 😀", "x" * 50]
    for text in filter(None, texts):
        ids = tokenizer.encode(text, True)
        assert ids == (1, *reference.encode(text)), text
        assert tokenizer.decode(ids) == reference.decode(list(ids[1:])), text


def test_a_byte_level_vocabulary_is_split_by_the_rule_that_the_file_names(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_model("llama", len(VOCABULARY.tokens)), F16, VOCABULARY)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in tokenizer_files(open_gguf(path)).items():
        (folder / name).write_bytes(content)
    tokenizer = open_tokenizer(folder)
    names = VOCABULARY.tokens
    ids = tokenizer.encode("the the</s>", False)
    assert [names[number] for number in ids] == ["the", "Ġthe", "</s>"]
    assert tokenizer.eos_token_ids == (2,)


def test_a_rule_that_is_not_known_is_refused(tmp_path: Path) -> None:
    vocabulary = byte_vocabulary("smollm")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_model("llama", len(vocabulary.tokens)), F16, vocabulary)
    with pytest.raises(UnsupportedModelError, match=r"'smollm'.*--tokenizer"):
        tokenizer_files(open_gguf(path))
