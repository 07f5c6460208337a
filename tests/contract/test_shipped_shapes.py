from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES = Path(__file__).resolve().parents[2] / "configs" / "shapes"
# Parameters as published with the checkpoints (sums over their weight files).
PUBLISHED = {
    "openllama_3b": 3_426_473_600,
    "openllama_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama32_3b": 3_212_749_824,
    "opt_6p7b": 6_658_473_984,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_builds_the_shape_with_the_published_number_of_parameters(name: str) -> None:
    config = AutoConfig.from_pretrained(SHAPES / name, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
