"""The main job on a real model: the same greedy tokens as transformers for any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpipipe.config.prompts import read_prompts
from mpipipe.config.schema import GenerationConfig
from mpipipe.models.tokenizer import open_tokenizer
from mpipipe.runtime.baseline import generate_with_transformers
from mpipipe.runtime.requests import prepare
from tests.e2e.conftest import ROOT, read_jsonl, run

NEW_TOKENS = 16


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every prompt of the shipped short files and one long one (all: see BENCHMARKS.md)."""
    path = tmp_path_factory.mktemp("prompts") / "short.jsonl"
    names = ("demo", "general_short")
    lines = [line for name in names for line in read_jsonl(ROOT / "prompts" / f"{name}.jsonl")]
    lines.append(read_jsonl(ROOT / "prompts" / "general_long.jsonl")[0])
    for line in lines:
        for key in ("temperature", "top_p", "top_k", "seed", "max_new_tokens", "stop"):
            line.pop(key, None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def expected(demo_model: Path, prompt_file: Path) -> dict[str, tuple[int, ...]]:
    """What transformers makes of each prompt, one at a time (no padding)."""
    lines = read_prompts(prompt_file, GenerationConfig(max_new_tokens=NEW_TOKENS))
    tokenizer = open_tokenizer(demo_model, False)
    prompts = prepare(lines, tokenizer, add_special_tokens=True)
    assert not prompts.refused
    result = generate_with_transformers(
        demo_model,
        prompts.requests,
        dtype="float32",
        batch_size=1,
        num_threads=1,
        decode=tokenizer.decode,
    )
    return {c.request_id: c.token_ids for c in result.completions}


@pytest.mark.parametrize("num_ranks", [0, 1, 2, 3, 4])
def test_greedy_tokens_are_those_of_transformers(
    num_ranks: int, expected: dict[str, tuple[int, ...]], prompt_file: Path, tmp_path: Path
) -> None:
    outcome = run(
        num_ranks,
        "configs/demo.toml",
        tmp_path / "run",
        f"prompts.path={prompt_file}",
        f"generation.max_new_tokens={NEW_TOKENS}",
        "pipeline.max_tokens_per_step=64",
    )
    assert outcome.exit_code == 0, outcome.stderr
    tokens = {record["id"]: tuple(record["token_ids"]) for record in outcome.completions()}
    assert tokens == expected
