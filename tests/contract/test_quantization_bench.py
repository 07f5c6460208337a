"""`mpipipe bench quantize`: what it says of a text is what the model makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy

from mpipipe.bench import quantization
from mpipipe.bench.quantization import FormRecord, TextOptions, measure_forms
from mpipipe.cli.bench_quantize import quantize_command
from mpipipe.errors import ConfigError
from mpipipe.runtime.loading import StageParts, load_parts
from tests.contract.tiny_models import TinyModel, save_tiny

# Two texts are long enough; the first is cut, the last one too, where the tokens run out.
TEXTS = (tuple(range(5, 45)), (7,), tuple(range(80, 50, -1)), (9, 3, 9, 3, 9))
OPTIONS = TextOptions(num_tokens=51, tokens_per_text=32, rows_per_step=64)
READ = (TEXTS[0][:32], TEXTS[2][:19])
SETTINGS = ("pipeline.device=cpu", "model.dtype=float32", "pipeline.threads_per_rank=1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("llama")
    model = save_tiny("llama", folder)
    words = {f"t{number}": number for number in range(model.reference.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    lines = [{"prompt": " ".join(f"t{token}" for token in text)} for text in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return model


def measured(tiny: TinyModel, options: TextOptions, *forms: str) -> list[FormRecord]:
    words = (str(tiny.folder / "texts.jsonl"), *SETTINGS)
    return list(measure_forms(tiny.folder, words, forms, options))


def test_a_form_is_closed_before_the_next_is_loaded(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def load(*words: Any) -> StageParts:
        events.append("load")
        return load_parts(*words)

    monkeypatch.setattr(quantization, "load_parts", load)
    monkeypatch.setattr(StageParts, "close", lambda _: events.append("close"))
    measured(tiny, OPTIONS, "none", "int8")
    assert events == ["load", "close"] * 2


def reference_logits(tiny: TinyModel) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [tiny.reference(torch.tensor([text])).logits[0] for text in READ]


@pytest.mark.parametrize("rows", [64, 7])
def test_the_perplexity_is_that_of_transformers(tiny: TinyModel, rows: int) -> None:
    options = TextOptions(OPTIONS.num_tokens, OPTIONS.tokens_per_text, rows)
    (record,) = measured(tiny, options, "none")
    losses = [
        cross_entropy(logits_TV[:-1], torch.tensor(text[1:]), reduction="sum")
        for logits_TV, text in zip(reference_logits(tiny), READ, strict=True)
    ]
    assert record.num_tokens == 31 + 18
    perplexity = float((torch.stack(losses).sum() / record.num_tokens).exp())
    assert record.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert (record.logits_error, record.same_choice) == (None, None)


def test_errors_are_against_the_first_form(tiny: TinyModel) -> None:
    none, same, int8, fp8 = measured(tiny, OPTIONS, "none", "none", "int8", "fp8")
    assert same.logits_error == 0.0
    assert same.same_choice == 1.0
    assert int8.logits_error is not None
    assert fp8.logits_error is not None
    assert 1e-4 < int8.logits_error < fp8.logits_error < 0.5
    assert fp8.same_choice is not None
    assert fp8.same_choice < 1.0
    assert int8.perplexity != none.perplexity
    assert int8.weight_bytes < none.weight_bytes


def test_a_line_for_each_form_and_one_of_json(
    tiny: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (str(tiny.folder / "texts.jsonl"), *SETTINGS)
    with pytest.raises(ConfigError, match="int7"):
        quantize_command(tiny.folder, words, ("none", "int8", "int7"), OPTIONS)
    title, header, *lines = capsys.readouterr().out.splitlines()
    assert "49 tokens in steps of at most 64" in title
    assert header.split()[:2] == ["quantize", "perplexity"]
    assert [line.split()[0] for line in lines[:2]] == ["none", "int8"]
    records = [json.loads(line) for line in lines[2:]]
    assert [record["quantize"] for record in records] == ["none", "int8"]
    assert records[0]["dtype"] == "float32"
    assert lines[1].split()[1] == f"{records[1]['perplexity']:,.4f}"


def test_texts_of_one_token_predict_nothing(tiny: TinyModel, tmp_path: Path) -> None:
    prompts = tmp_path / "short.jsonl"
    prompts.write_text('{"prompt": "t3"}\n')
    with pytest.raises(ConfigError, match="no prompt of two tokens"):
        list(measure_forms(tiny.folder, (str(prompts), *SETTINGS), ("none",), OPTIONS))
