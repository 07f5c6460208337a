"""The generated checkpoint whose text repeats: what drafts of n-grams are measured with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from mpipipe.bench.copying_model import PERIOD, write_copying_model
from mpipipe.errors import ConfigError, OutputError

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "vocab_size": 200, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_greedy_text_goes_round_a_cycle(shape: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_copying_model(shape, folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([[7, 150, 3, 42]])
    with torch.inference_mode():
        made = model.generate(prompt, max_new_tokens=3 * PERIOD, do_sample=False, eos_token_id=-1)
    ids = made[0, prompt.shape[1] :].tolist()
    begin = 42 - 42 % PERIOD
    assert ids == [begin + (42 + 1 + place) % PERIOD for place in range(3 * PERIOD)]


def test_what_is_there_is_not_written_again(shape: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_copying_model(shape, folder)
    (folder / "model.safetensors").unlink()
    write_copying_model(shape, folder)
    assert not (folder / "model.safetensors").exists()


def test_what_cannot_be_written_is_one_sentence(shape: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another --scratch"):
        write_copying_model(shape, tmp_path / "file" / "model")
    (shape / "config.json").write_text(json.dumps({**CONFIG, "model_type": "opt"}))
    with pytest.raises(ConfigError, match="not the shape of a Llama"):
        write_copying_model(shape, tmp_path / "model")
