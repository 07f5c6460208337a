from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mpipipe.checkpoint.spec import read_spec
from mpipipe.errors import UnsupportedModelError
from tests.contract.tiny_models import (
    FAMILIES,
    NUM_LAYERS,
    InProcessPipeline,
    TinyModel,
    load_stage,
    paged_cache,
    save_config,
    split,
)

PROMPTS = ((5, 9, 3), (7, 7, 20, 31, 8, 90, 41, 12, 60, 33, 2), (11, 4, 50, 6, 77, 18, 29))
NUM_TOKENS = 7
SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def expected(tiny: Callable[[str], TinyModel]) -> Callable[[str], list[list[int]]]:
    @cache
    def make(name: str) -> list[list[int]]:
        return [tiny(name).greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]

    return make


def new_pipeline(model: TinyModel, num_stages: int) -> InProcessPipeline:
    return InProcessPipeline(
        [
            load_stage(
                model.folder, plan, cache=paged_cache(model.reference.config, plan.num_layers)
            )
            for plan in split(num_stages)
        ]
    )


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(
    name: str,
    num_stages: int,
    tiny: Callable[[str], TinyModel],
    expected: Callable[[str], list[list[int]]],
) -> None:
    pipeline = new_pipeline(tiny(name), num_stages)
    assert pipeline.generate(PROMPTS, NUM_TOKENS, chunk=4) == expected(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_expected_tokens_are_not_degenerate(
    name: str, expected: Callable[[str], list[list[int]]]
) -> None:
    # a model that repeats one token would agree with almost anything
    assert len({token for tokens in expected(name) for token in tokens}) >= 5


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_logits_are_near_those_of_transformers(
    name: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    pipeline = new_pipeline(model, 2)
    logits = pipeline.step([(index, prompt, 0) for index, prompt in enumerate(PROMPTS)])
    assert logits.dtype == torch.float32
    for row, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            wanted = model.reference(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits[row], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        ("GraniteSWAConfig", {}),
        ("GptOssConfig", {"num_local_experts": 2}),
        ("MiniCPM3Config", {}),
        ("DogeConfig", {}),
        ("Qwen3_5TextConfig", {}),
    ],
)
def test_a_family_whose_layers_ours_cannot_compute_is_refused_from_its_configuration_already(
    config_class: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = save_config(config_class, SIZES | settings, tmp_path)
    with pytest.raises(UnsupportedModelError, match="cannot be split into stages"):
        load_stage(tmp_path, split(1)[0], cache=paged_cache(model.reference.config, NUM_LAYERS))
    with pytest.raises(UnsupportedModelError, match="cannot be split into stages"):
        read_spec(tmp_path)
