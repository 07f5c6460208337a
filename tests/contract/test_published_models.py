"""OpenLLaMA and OPT in their published files: two stages compute the tokens of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mpipipe.models.tokenizer import open_tokenizer
from tests.contract.published_models import NUM_LAYERS, PUBLISHED, save_published
from tests.contract.tiny_models import InProcessPipeline, load_stage, paged_cache, split

TEXTS = ("the quick brown fox", "seven wise owls", "a lazy dog jumps over 37.")
NUM_TOKENS = 12


@pytest.fixture(params=PUBLISHED, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_published(name, tmp_path_factory.mktemp(name))


def test_the_files_and_names_are_the_published_ones(name: str, folder: Path) -> None:
    weights = {
        1: {"pytorch_model.bin"},
        2: {
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model-00002-of-00002.bin",
            "pytorch_model.bin.index.json",
        },
    }[PUBLISHED[name].num_shards]
    files = {path.name for path in folder.iterdir()}
    assert files == {"config.json", *weights, *PUBLISHED[name].special_files}
    stored = {
        name: tensor
        for path in folder.glob("*.bin")
        for name, tensor in torch.load(path, weights_only=True).items()
    }
    layer = {
        "openllama-3b": "model.layers.3.mlp.gate_proj.weight",
        "openllama-7b": "model.layers.3.self_attn.rotary_emb.inv_freq",
        "opt-125m": "model.decoder.layers.3.fc1.bias",
        "opt-6.7b": "decoder.layers.3.fc1.bias",
    }[name]
    assert layer in stored
    assert ("lm_head.weight" in stored) == (name != "opt-6.7b")
    half = {tensor.dtype == torch.float16 for key, tensor in stored.items() if "freq" not in key}
    assert half == {True}


def test_two_stages_compute_the_tokens_of_transformers(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = open_tokenizer(folder)
    prompts = [tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
    assert all(prompt[0] == config.bos_token_id for prompt in prompts)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            do_sample=False,
        )
        expected.append(output[0, len(prompt) :].tolist())
    assert len({token for tokens in expected for token in tokens}) >= 8, "else they show nothing"
    stages = [
        load_stage(folder, plan, cache=paged_cache(config, plan.num_layers))
        for plan in split(2, NUM_LAYERS)
    ]
    assert InProcessPipeline(stages).generate(prompts, NUM_TOKENS, chunk=4) == expected
