"""`mpipipe run` of OpenLLaMA and OPT in their published files, over two stages.

One of each family, as one file and as shards; all four: `tests/contract/test_published_models.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpipipe.models.tokenizer import open_tokenizer
from tests.contract.published_models import save_published
from tests.e2e.conftest import run

TEXTS = ("the quick brown fox", "seven wise owls", "a lazy dog jumps over 37.")
NUM_TOKENS = 12


@pytest.mark.parametrize("name", ["openllama-3b", "opt-6.7b"])
def test_a_model_as_published_makes_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    model = tmp_path / name
    model.mkdir()
    save_published(name, model)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": text, "prompt": text}) + "\n" for text in TEXTS))
    words = [str(prompts), f"generation.max_new_tokens={NUM_TOKENS}"]
    outcome = run(2, model, tmp_path / "run", *words)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.json("manifest.json")["plan"]["dtype"] == "float32"  # on a CPU
    tokenizer = open_tokenizer(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for record in outcome.completions():
        ids = torch.tensor([tokenizer.encode(record["id"], add_special_tokens=True)])
        output = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
        assert record["token_ids"] == output[0, ids.shape[1] :].tolist()
        assert record["text"] == tokenizer.decode(record["token_ids"])
