"""A tokenizer that does not quite fit its model: each prompt for itself, on one rank and on two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoModelForCausalLM

from mpipipe.models.tokenizer import open_tokenizer
from tests.e2e.conftest import Outcome, run

# The tiny model has embeddings for 300 ids; its tokenizer's own are the 256 bytes.
INSIDE, OUTSIDE = 256, 300
GREEDY = {"max_new_tokens": 24, "ignore_eos": True}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def odd_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with special tokens, one beyond its vocabulary, and no default template."""
    folder = tmp_path_factory.mktemp("odd") / "model"
    shutil.copytree(tiny_model, folder)
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    names = [f"<|{number}|>" for number in range(INSIDE, OUTSIDE + 1)]
    raw.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    raw.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = [{"name": "tool_use", "template": TEMPLATE}]
    path.write_text(json.dumps(settings))
    return folder


def complete(
    folder: Path, model: Path, num_ranks: int, lines: list[dict[str, Any]], *words: str
) -> Outcome:
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = folder / "odd.toml"
    config.write_text(
        f'model.path = "{model}"\nprompts.path = "{prompts}"\nmemory.num_kv_pages = 64\n'
    )
    return run(num_ranks, config, folder / "run", *words)


@pytest.fixture(scope="module")
def long_ids(odd_model: Path) -> list[int]:
    """What transformers makes of "seek" where nothing stops it."""
    model = AutoModelForCausalLM.from_pretrained(odd_model, dtype=torch.float32)
    prompt = torch.tensor([open_tokenizer(odd_model, False).encode("seek", True)])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=GREEDY["max_new_tokens"],
        eos_token_id=None,
        pad_token_id=0,
    )
    ids: list[int] = output[0, prompt.shape[1] :].tolist()
    assert len(ids) == GREEDY["max_new_tokens"]
    return ids


@pytest.mark.parametrize(("num_ranks", "ahead"), [(0, 0), (2, 1)])
def test_tokens_of_no_embedding_and_stops_that_are_tokens(
    num_ranks: int, ahead: int, odd_model: Path, long_ids: list[int], tmp_path: Path
) -> None:
    place, special = next((p, i) for p, i in enumerate(long_ids) if i >= INSIDE and i != 299)
    assert place, "the model's first token is no special one"
    seek: dict[str, Any] = {"prompt": "seek", **GREEDY}
    lines: list[dict[str, Any]] = [
        {"id": "good", "prompt": "a good one"},
        {"id": "bad", "prompt": f"look <|{OUTSIDE}|> here"},
        {"id": "chat", "messages": [{"role": "user", "content": "hi"}]},
        {"id": "ids", **seek, "stop_token_ids": [special]},
        {"id": "text", **seek, "stop": [f"<|{special}|>"]},
        {"id": "never", **seek, "stop": [f"no such text<|{special}|>"]},
    ]
    outcome = complete(tmp_path, odd_model, num_ranks, lines, f"pipeline.lookahead={ahead}")
    assert outcome.exit_code == 4, outcome.stderr
    found = {record["id"]: record for record in outcome.completions()}
    assert [name for name in found if "error" in found[name]] == ["bad", "chat"]
    assert found["bad"]["error"]["kind"] == "unknown_token"
    assert f"<|{OUTSIDE}|>" in found["bad"]["error"]["message"]
    assert "tool_use" in found["chat"]["error"]["message"]
    assert found["ids"]["token_ids"] == long_ids[: place + 1]
    for key in ("token_ids", "text", "finish_reason"):
        assert found["text"][key] == found["ids"][key]
    assert found["text"]["finish_reason"] == "stop"
    assert found["never"]["token_ids"] == long_ids
    said = outcome.stdout + outcome.stderr
    assert said.count("none of the 1 prompts with messages") == 1
