"""The main job on a real model: the same greedy tokens as transformers for any number of ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from mpipipe.bench.baseline import BaselinePlace, generate_with_transformers
from mpipipe.config.prompts import read_prompts
from mpipipe.config.schema import GenerationConfig
from mpipipe.models.tokenizer import open_tokenizer
from mpipipe.runtime.requests import prepare
from tests.e2e.conftest import ROOT, read_jsonl, run

NEW_TOKENS = 16
REPEATING = {"id": "repeating", "prompt": "red green blue black " * 9, "max_new_tokens": 48}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Without what `plan --measure` found on this machine: drafts pay by the planner's rates."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / demo_model.name).symlink_to(demo_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPIPIPE_CACHE", str(cache))
        yield


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long prompt and every second one of the shipped short files (all: see BENCHMARKS.md).

    Of the long one a half, a thousand tokens, which are 16 steps and 64 pages already.
    """
    path = tmp_path_factory.mktemp("prompts") / "short.jsonl"
    names = ("demo", "general_short")
    short = [line for name in names for line in read_jsonl(ROOT / "prompts" / f"{name}.jsonl")]
    long = read_jsonl(ROOT / "prompts" / "general_long.jsonl")[0]
    long["prompt"] = long["prompt"][: len(long["prompt"]) // 2]
    lines = [long, *short[::2]]
    for line in lines:
        for key in ("temperature", "top_p", "top_k", "seed", "max_new_tokens", "stop"):
            line.pop(key, None)
    lines.insert(0, REPEATING)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def expected(demo_model: Path, prompt_file: Path) -> dict[str, tuple[int, ...]]:
    """What transformers makes of each prompt, one at a time (no padding)."""
    lines = read_prompts(prompt_file, GenerationConfig(max_new_tokens=NEW_TOKENS))
    tokenizer = open_tokenizer(demo_model, False)
    prompts = prepare(lines, tokenizer, add_special_tokens=True)
    assert not prompts.rejected
    result = generate_with_transformers(
        demo_model,
        prompts.requests,
        dtype="float32",
        batch_size=1,
        decode=tokenizer.decode,
        place=BaselinePlace(),
    )
    return {c.request_id: c.token_ids for c in result.completions}


def test_a_text_that_repeats_is_drafted_and_stays_as_it_is(
    expected: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps(REPEATING) + "\n")
    outcome = run(0, "configs/demo.toml", tmp_path / "run", f"prompts.path={alone}")
    assert outcome.exit_code == 0, outcome.stderr
    (record,) = outcome.completions()
    assert tuple(record["token_ids"]) == expected["repeating"]
    drafts = outcome.json("metrics.json")["drafts"]
    assert drafts["num_drafted"] >= drafts["num_accepted"] >= drafts["num_saved_steps"] > 2
    assert f"{drafts['num_saved_steps']} decode steps saved" in outcome.stdout


# Four ranks on two cores take twice the time of two: the long prompt and some others are enough.
@pytest.mark.parametrize(("num_ranks", "num_prompts"), [(0, 12), (2, 12), (4, 6)])
def test_greedy_tokens_are_those_of_transformers(
    num_ranks: int,
    num_prompts: int,
    expected: dict[str, tuple[int, ...]],
    prompt_file: Path,
    tmp_path: Path,
) -> None:
    outcome = run(
        num_ranks,
        "configs/demo.toml",
        tmp_path / "run",
        f"prompts.path={prompt_file}",
        f"generation.max_new_tokens={NEW_TOKENS}",
        f"prompts.limit={num_prompts}",
        "pipeline.max_tokens_per_step=64",
    )
    assert outcome.exit_code == 0, outcome.stderr
    tokens = {record["id"]: tuple(record["token_ids"]) for record in outcome.completions()}
    assert len(tokens) == num_prompts
    assert "scalability-2k" in tokens, "the long one"
    assert tokens == {name: expected[name] for name in tokens}


MIB = 1 << 20


def test_a_model_larger_than_its_memory_streams_from_disk_once_a_step(
    expected: dict[str, tuple[int, ...]], prompt_file: Path, tmp_path: Path
) -> None:
    """60 % of the weights' bytes: the same tokens, whatever the number of sequences of a step."""
    weight_bytes = 513 * MIB  # float32
    allowed = weight_bytes * 6 // 10
    offload_dir = tmp_path / "offload"
    offload_dir.mkdir()
    outcome = run(
        1,
        "configs/demo.toml",
        tmp_path / "run",
        f"prompts.path={prompt_file}",
        f"generation.max_new_tokens={NEW_TOKENS}",
        "pipeline.max_tokens_per_step=64",
        f"memory.device_bytes={allowed}",
        "memory.host_bytes=0",
        f"memory.offload_dir={offload_dir}",
        warm=False,  # its memory is measured
    )
    assert outcome.exit_code == 0, outcome.stderr
    tokens = {record["id"]: tuple(record["token_ids"]) for record in outcome.completions()}
    assert tokens == expected
    (rank,) = outcome.json("metrics.json")["ranks"]
    assert 0.9 * allowed < rank["weight_bytes"] <= allowed
    assert rank["peak_rss_bytes"] - rank["baseline_rss_bytes"] - rank["kv_bytes"] < (
        allowed + 100 * MIB  # what is read passes through 64 MiB of buffers
    )
    use, num_steps = rank["offload"], rank["stage"]["num_steps"]
    assert use["bytes_per_step"] > weight_bytes - allowed
    rate = use["planned_disk_bytes_per_s"]
    assert f"disk {rate / 1e9:.2g} GB/s (measured)" in " ".join(outcome.stdout.split())
    assert "bound by" in outcome.stdout, "the plan tells what a step takes"
    assert "gate wait" in outcome.stdout, "and the end of the run what it took"
    # Beside the run's steps three trial steps, and what is brought for a step that never comes.
    laps = use["disk_bytes"] / use["bytes_per_step"]
    assert num_steps + 3 <= laps < num_steps + 4
    assert list(offload_dir.iterdir()) == []


def test_ranks_that_stream_weights_in_8_bits_choose_the_tokens_of_one_that_holds_them(
    tmp_path: Path,
) -> None:
    """Embedding and LM head do not fit 60 MiB either, and the last stage has few layers."""
    words = ("model.quantize=int8", "generation.max_new_tokens=8", "prompts.limit=6")
    alone = run(0, "configs/demo.toml", tmp_path / "alone", *words)
    offload_dir = tmp_path / "offload"  # the ranks make it
    limits = ("memory.device_bytes=60MiB", f"memory.offload_dir={offload_dir}")
    streamed = run(2, "configs/demo.toml", tmp_path / "streamed", *words, *limits)
    assert (alone.exit_code, streamed.exit_code) == (0, 0), alone.stderr + streamed.stderr
    tokens = [[record["token_ids"] for record in done.completions()] for done in (alone, streamed)]
    assert len(tokens[0]) == 6
    assert tokens[0] == tokens[1]
    ranks = streamed.json("metrics.json")["ranks"]
    assert len(ranks) == 2
    assert all(0 < rank["weight_bytes"] <= 60 * MIB for rank in ranks)
    assert all(rank["offload"]["bytes_per_step"] > 0 for rank in ranks)
    assert list(offload_dir.iterdir()) == []


# ---- a model whose file and lengths decide -------------------------------------------------------

LENGTHS = (10, 62, 63, 64, 65, 80)  # bytes, which are tokens; the original context is 64


@pytest.fixture(scope="session")
def phi3(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long factors beyond 64 tokens, and a penalty in its generation_config.json."""
    folder = tmp_path_factory.mktemp("phi3")
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=299,
        pad_token_id=None,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
        },
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 299, "repetition_penalty": 1.3, "no_repeat_ngram_size": 0})
    )
    for path in tiny_model.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize(("num_ranks", "lookahead"), [(0, 0), (2, 1)])
def test_lengths_and_the_models_own_settings_count_as_in_transformers(
    phi3: Path, num_ranks: int, lookahead: int, tmp_path: Path
) -> None:
    texts = {str(n): "".join(chr(97 + (7 * i + n) % 26) for i in range(n)) for n in LENGTHS}
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": name, "prompt": text} for name, text in texts.items()]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = AutoModelForCausalLM.from_pretrained(phi3, dtype=torch.float32)
    tokenizer = open_tokenizer(phi3, False)
    expected = {}
    for name, text in texts.items():
        ids = torch.tensor([tokenizer.encode(text, True)])
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0)
        expected[name] = output[0, ids.shape[1] :].tolist()
    config = tmp_path / "phi3.toml"
    config.write_text(f'model.path = "{phi3}"\nprompts.path = "{prompts}"\n')
    outcome = run(
        num_ranks,
        config,
        tmp_path / "run",
        "generation.max_new_tokens=12",
        f"pipeline.lookahead={lookahead}",
        "pipeline.max_tokens_per_step=32",
        "memory.num_kv_pages=40",
    )
    assert outcome.exit_code == 0, outcome.stderr
    assert {record["id"]: record["token_ids"] for record in outcome.completions()} == expected
    assert "a sequence that grows to 65 tokens" in outcome.stdout
    assert outcome.json("manifest.json")["basis"]["generation.repetition_penalty"] == 1.3
