"""`generation_config.json`: what becomes a default, what wins over it, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpipipe.checkpoint.generation_defaults import read_generation_defaults
from mpipipe.checkpoint.spec import read_spec
from mpipipe.config.checks import default_sampling
from mpipipe.config.load import load_config
from mpipipe.config.prompts import read_prompts
from mpipipe.errors import CheckpointError
from mpipipe.planning.explain import plan_lines
from mpipipe.planning.model_facts import ModelFacts, read_model
from mpipipe.planning.resolve import make_plan
from mpipipe.types import SamplingParams
from tests.unit.planned_rank import make_rank

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}


def facts(tmp_path: Path, generation: object, *words: str, **config: object) -> ModelFacts:
    """What is read of a model with this generation_config.json, under these settings."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (tmp_path / "generation_config.json").write_text(text)
    return read_model(load_config(None, [f"model.path={tmp_path}", "model.weights=random", *words]))


def sampling(tmp_path: Path, generation: object, *words: str, **config: object) -> SamplingParams:
    return default_sampling(facts(tmp_path, generation, *words, **config).loaded.config.generation)


def notes(found: ModelFacts) -> dict[str, str]:
    return {note.setting: note.value for note in found.notes}


def test_a_penalty_counts_without_sampling(tmp_path: Path) -> None:
    assert sampling(tmp_path, {"repetition_penalty": 1.3}) == SamplingParams(repetition_penalty=1.3)


def test_a_model_that_samples_does_so_by_its_own_settings(tmp_path: Path) -> None:
    found = facts(tmp_path, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20})
    assert default_sampling(found.loaded.config.generation) == SamplingParams(
        temperature=0.6, top_p=0.9, top_k=20
    )
    assert notes(found) == {
        "generation.temperature": "0.6",
        "generation.top_k": "20",
        "generation.top_p": "0.9",
    }


def test_what_its_file_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    assert sampling(tmp_path, {"do_sample": True}) == SamplingParams(temperature=1.0, top_k=50)


@pytest.mark.parametrize("do_sample", [False, None])
def test_a_model_that_does_not_sample_stays_greedy(tmp_path: Path, do_sample: bool | None) -> None:
    found = sampling(tmp_path, {"do_sample": do_sample, "temperature": 0.6, "top_p": 0.9})
    assert found.is_greedy
    assert found.top_p == 0.9  # for a prompt that asks for a temperature


def test_what_the_user_sets_wins_also_where_it_is_our_default(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.3, "top_k": 7}
    words = ("generation.temperature=0", "generation.repetition_penalty=1.0")
    found = facts(tmp_path, generation, *words)
    assert default_sampling(found.loaded.config.generation) == SamplingParams(top_k=7)
    assert notes(found) == {"generation.top_k": "7"}


def test_a_file_and_a_base_of_it_count_as_the_user(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[generation]\nrepetition_penalty = 1.1\n")
    (tmp_path / "exp.toml").write_text('extends = "base.toml"\n[generation]\nseed = 3\n')
    loaded = load_config(tmp_path / "exp.toml", ["generation.top_p=0.5"])
    assert loaded.generation_set == {"repetition_penalty", "seed", "top_p"}


def test_the_older_style_that_says_no_sampling_means_it(tmp_path: Path) -> None:
    path = tmp_path / "exp_config.json"
    old = {"model_name_or_path": "x", "prompts": ["a"], "do_sample": False}
    path.write_text(json.dumps(old))
    assert "temperature" in load_config(path).generation_set
    path.write_text(json.dumps({name: old[name] for name in ("model_name_or_path", "prompts")}))
    assert "temperature" not in load_config(path).generation_set


def test_a_prompt_line_wins_over_the_model(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.3}
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": "b", "temperature": 0, "repetition_penalty": 1.0}\n'
    )
    found = facts(tmp_path, generation).loaded.config.generation
    first, second = (line.sampling for line in read_prompts(tmp_path / "prompts.jsonl", found))
    assert first is not None
    assert second is not None
    assert (first.temperature, first.repetition_penalty) == (0.6, 1.3)
    assert second.is_greedy
    assert second.repetition_penalty == 1.0


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    generation = {"do_sample": True, "repetition_penalty": 1.3, "num_beams": 4, "eos_token_id": 5}
    found = facts(tmp_path, generation, "generation.use_model_defaults=false")
    assert default_sampling(found.loaded.config.generation) == SamplingParams()
    assert not found.notes
    assert found.spec.eos_token_ids == (5,)


def test_without_the_file_the_settings_of_config_json_count(tmp_path: Path) -> None:
    assert sampling(tmp_path, None, repetition_penalty=1.2).repetition_penalty == 1.2
    assert sampling(tmp_path, {"eos_token_id": 2}, repetition_penalty=1.2) == SamplingParams()


def test_what_is_not_applied_is_said_one_line_each(tmp_path: Path) -> None:
    generation = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "num_beams": 4,
        "suppress_tokens": [5, 6],
        "max_new_tokens": 2048,
        "chat_format": "chatml",
        # these change nothing, and are not mentioned
        "typical_p": 1.0,
        "bad_words_ids": None,
        "begin_suppress_tokens": [],
        "use_cache": True,
        "pad_token_id": 0,
        "transformers_version": "5.0.0",
    }
    found = facts(tmp_path, generation)
    assert notes(found) == {
        "generation.repetition_penalty": "1.3",
        "generation_config.no_repeat_ngram_size": "3",
        "generation_config.num_beams": "4",
        "generation_config.suppress_tokens": "[5, 6]",
        "generation_config.max_new_tokens": "2048",
        "generation_config.chat_format": '"chatml"',
    }
    plan = make_plan(
        found.loaded.config, found.spec, [make_rank(0)], str(tmp_path), notes=found.notes
    )
    lines = "\n".join(plan_lines(plan))
    for note in found.notes:
        assert note.setting in lines
        assert note.reason in lines


@pytest.mark.parametrize(
    ("kind", "model_type", "is_said"),
    [("dynamic", "llama", True), ("linear", "llama", False), ("longrope", "phi3", False)],
)
def test_a_model_without_a_cache_is_named_where_that_changes_keys(
    kind: str, model_type: str, is_said: bool, tmp_path: Path
) -> None:
    """Transformers without one computes all keys anew, as the length then has it."""
    rope = {"rope_type": kind, "factor": 2.0}
    config = {"use_cache": False, "rope_scaling": rope, "model_type": model_type}
    found = facts(tmp_path, None, **config)
    assert ("generation_config.use_cache" in notes(found)) == is_said


@pytest.mark.parametrize(
    "odd",
    [
        {"repetition_penalty": "1.3"},
        {"repetition_penalty": 0},
        {"repetition_penalty": [1.3]},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 10**400},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_p": 1.5},
        {"min_p": 1},
        {"do_sample": "yes"},
        {"do_sample": True, "temperature": 0},
        {"do_sample": True, "temperature": {}},
    ],
    ids=str,
)
def test_an_odd_value_is_named_and_changes_nothing(tmp_path: Path, odd: dict[str, Any]) -> None:
    found = facts(tmp_path, odd)
    assert default_sampling(found.loaded.config.generation) == SamplingParams()
    ((setting, _),) = notes(found).items()
    assert setting in {f"generation_config.{name}" for name in odd}


@pytest.mark.parametrize("text", ["[1, 2]", "{", "", "null", '"do_sample"', "[" * 100_000])
def test_a_file_that_is_no_object_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        facts(tmp_path, text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
NAMES = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), JSON))
def test_no_content_raises_anything_and_what_is_applied_is_in_range(
    generation: dict[str, object],
) -> None:
    found = read_generation_defaults(generation, {})
    assert SamplingParams(**{setting.name: setting.value for setting in found.applied})


def test_the_spec_knows_where_sequences_start_over(tmp_path: Path) -> None:
    long = {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}
    for settings_, restart in (
        ({"rope_scaling": long, "original_max_position_embeddings": 64}, 65),
        ({"rope_scaling": long}, 4097),
        ({"rope_parameters": {"rope_type": "longrope"}}, 4097),
        ({"rope_parameters": {"rope_type": "default"}}, 0),
        ({"rope_scaling": None}, 0),
        ({"rope_scaling": "odd"}, 0),
    ):
        config = {**CONFIG, "model_type": "phi3", **settings_}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_spec(tmp_path).rotary.restart_tokens == restart
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "rope_scaling": long}))
    assert read_spec(tmp_path).rotary.restart_tokens == 0


@pytest.mark.parametrize(("context", "noted"), [(256, True), (64, False)])
def test_the_plan_says_where_sequences_start_over(
    tmp_path: Path, context: int, noted: bool
) -> None:
    found = facts(
        tmp_path,
        None,
        f"memory.max_context_tokens={context}",
        model_type="phi3",
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope"},
    )
    plan = make_plan(found.loaded.config, found.spec, [make_rank(0)], str(tmp_path))
    assert plan.restart_tokens == (65 if noted else 0)
    assert ("a sequence that grows to 65 tokens" in "\n".join(plan_lines(plan))) == noted


@pytest.mark.parametrize("top_k", [1e300, 2**31, 2**63])
def test_a_top_k_beyond_every_vocabulary_is_named_and_stops_no_run(
    tmp_path: Path, top_k: float
) -> None:
    found = facts(tmp_path, {"top_k": top_k})
    assert default_sampling(found.loaded.config.generation) == SamplingParams()
    assert "generation_config.top_k" in notes(found)
