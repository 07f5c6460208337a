from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from mpipipe.checkpoint.spec import read_spec
from mpipipe.config.legacy import check_against_plan
from mpipipe.config.load import load_config
from mpipipe.config.prompts import PromptLine, read_prompts
from mpipipe.config.schema import GenerationConfig
from mpipipe.planning.model_facts import read_model

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    p for p in (ROOT / "configs").iterdir() if p.is_file() and p.name != "ds_config.json"
)
SHAPES = sorted((ROOT / "configs" / "shapes").iterdir())
PROMPTS = sorted((ROOT / "prompts").glob("*.jsonl"))
REQUIRED = (
    "Summarize the key factors that determine scalability in distributed inference "
    "for large language models."
)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def read(name: str) -> list[PromptLine]:
    return read_prompts(ROOT / "prompts" / name, GenerationConfig())


def context(line: PromptLine) -> str:
    return (line.text or "").rpartition("\n\n")[0]


def test_the_expected_files_are_there() -> None:
    names = {p.name for p in [*CONFIGS, *PROMPTS]}
    assert {"demo.toml", "openllama_3b.toml", "exp_config.example.json"} <= names
    assert {"demo.jsonl", "general_short.jsonl", "general_long.jsonl"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_loads_without_warnings_and_its_prompts_exist(path: Path) -> None:
    loaded = load_config(path)
    assert loaded.warnings == ()
    assert loaded.config.model.path
    if loaded.config.model.weights == "random":
        assert read_model(loaded).spec.num_layers > 0  # a benchmark: draws its own prompts
    elif loaded.config.prompts.path:
        assert Path(loaded.config.prompts.path).is_file()
    else:
        assert loaded.inline_prompts


def test_the_benchmarks_shapes_are_there() -> None:
    assert {path.name for path in SHAPES} == {
        "openllama_3b",
        "openllama_7b",
        "llama3_8b",
        "llama3_405b",
        "llama32_3b",
        "opt_6p7b",
        "qwen3_8b",
        "smollm2_135m",
    }


@pytest.mark.parametrize("path", SHAPES, ids=lambda p: p.name)
def test_every_shape_is_a_config_alone_that_planning_reads(path: Path) -> None:
    assert [file.name for file in path.iterdir()] == ["config.json"]
    spec = read_spec(path)
    assert spec.dtype in {"bfloat16", "float16"}
    assert spec.eos_token_ids
    num_matrices = 1 if spec.tied_embeddings else 2
    billions = (
        spec.num_layers * spec.layer_parameters + num_matrices * spec.embedding_parameters
    ) / 1e9
    published = {"3b": 3.3, "7b": 6.7, "8b": 8.1, "6p7b": 6.7, "405b": 405.9, "135m": 0.1345}[
        path.name.rpartition("_")[2]
    ]
    assert billions == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("path", PROMPTS, ids=lambda p: p.name)
def test_every_prompt_line_is_good(path: Path) -> None:
    assert [line.error for line in read(path.name) if line.error] == []


def test_demo_config_is_the_demo_model_decoded_greedily() -> None:
    config = load_config(ROOT / "configs/demo.toml").config
    assert config.model.path.startswith("demo:")
    assert config.generation.temperature == 0
    assert config.generation.max_new_tokens == 48


def test_example_of_the_older_style_agrees_with_the_ds_config_beside_it() -> None:
    loaded = load_config(ROOT / "configs/exp_config.example.json")
    assert loaded.inline_prompts[0] == REQUIRED
    assert loaded.deepspeed is not None
    assert loaded.deepspeed.num_stages == loaded.config.pipeline.num_stages
    assert (
        check_against_plan(
            loaded.deepspeed, num_stages=2, dtype="float16", max_sequences_per_slot=8
        )
        == []
    )


def test_demo_shows_every_form_of_a_line_and_is_greedy() -> None:
    lines = read("demo.jsonl")
    raw = (ROOT / "prompts/demo.jsonl").read_text()
    assert 6 <= len(lines) <= 8
    assert any(line.text for line in lines)
    assert any(line.messages for line in lines)
    assert '"custom_id"' in raw
    assert all(line.sampling and line.sampling.temperature == 0 for line in lines)
    assert any(line.sampling and line.sampling.max_new_tokens != 128 for line in lines)


def test_short_prompts_are_twelve_with_the_required_one() -> None:
    lines = read("general_short.jsonl")
    assert len(lines) == 12
    assert REQUIRED in [line.text for line in lines]
    assert len({line.text for line in lines}) == 12


def test_long_prompts_ask_each_short_question_after_two_contexts() -> None:
    long = {line.prompt_id: line.text or "" for line in read("general_long.jsonl")}
    assert len(long) == 24
    for line in read("general_short.jsonl"):
        for size in ("2k", "4k"):
            assert long[f"{line.prompt_id}-{size}"].endswith(f"\n\n{line.text}")


def test_long_contexts_are_of_their_size() -> None:
    # English prose has about 1.3 tokens per word with these vocabularies (prompts/README.md).
    ranges = {"2k": (1300, 1600), "4k": (2800, 3200)}
    for line in read("general_long.jsonl"):
        low, high = ranges[line.prompt_id[-2:]]
        assert low <= len(context(line).split()) <= high, line.prompt_id


def test_long_contexts_share_no_passage() -> None:
    seen: dict[str, str] = {}
    for line in read("general_long.jsonl"):
        sentences = {s for s in re.split(r"(?<=[.!?])\s+", context(line)) if len(s) > 80}
        assert len(sentences) > 20
        for sentence in sentences:
            assert seen.setdefault(sentence, line.prompt_id) == line.prompt_id


def test_the_readme_has_the_checksums_of_the_prompt_files() -> None:
    readme = (ROOT / "prompts/README.md").read_text(encoding="utf-8")
    for path in PROMPTS:
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in readme
