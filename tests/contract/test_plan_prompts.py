"""`mpipipe plan --gpus` counts prompts by the model's tokenizer, where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.test_plan_command import OPENLLAMA_7B, answer, with_prompts


def test_prompts_are_counted_by_the_models_tokenizer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((OPENLLAMA_7B / "config.json").read_text())
    (model / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "model": {"type": "WordLevel", "vocab": {"?": 0, "ab": 1}, "unk_token": "?"},
                "pre_tokenizer": {"type": "Whitespace"},
            }
        )
    )
    words = with_prompts(tmp_path, {"prompt": "ab " * 99 + "ab", "max_new_tokens": 10})
    found = answer(capsys, model, *words, gpus="2 x t4")["prompts"]
    assert found["source"] == "3 bytes a token, by the model's tokenizer"
    assert found["num_prompt_tokens"] == 101  # and one that begins a sequence
