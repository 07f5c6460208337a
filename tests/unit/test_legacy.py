from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpipipe.config.binding import settings
from mpipipe.config.legacy import TARGETS, DeepSpeedExpectations, check_against_plan, is_legacy
from mpipipe.config.load import LoadedConfig, load_config
from mpipipe.errors import ConfigError


def load(folder: Path, values: dict[str, Any], *overrides: str) -> LoadedConfig:
    path = folder / "exp_config.json"
    path.write_text(json.dumps(values))
    return load_config(path, overrides)


def failure(folder: Path, values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, values)
    return str(caught.value)


def write_ds(folder: Path, values: object, name: str = "ds_config.json") -> None:
    (folder / name).write_text(json.dumps(values))


def test_the_reports_style_becomes_todays_settings(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        {
            "model_path": "models/m",
            "prompts": ["One?", "Two?"],
            "outputs": "runs/x",
            "max_new_tokens": 20,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
            "pipeline_parallel_size": 2,
            "batch_size": 4,
            "local_files_only": True,
            "torch_dtype": "torch.float16",
            "seed": 5,
        },
    )
    config = loaded.config
    assert config.name == "exp_config"
    assert config.model.path == "models/m"
    assert config.model.dtype == "float16"
    assert config.output.dir == "runs/x"
    assert config.pipeline.num_stages == 2
    assert config.pipeline.max_sequences_per_slot == 4
    found = config.generation
    assert (found.max_new_tokens, found.temperature, found.top_k, found.top_p, found.seed) == (
        20, 0.7, 50, 0.9, 5,
    )  # fmt: skip
    assert loaded.inline_prompts == ("One?", "Two?")
    assert config.prompts.path == ""
    assert loaded.warnings == ()
    assert loaded.deepspeed is None


@pytest.mark.parametrize("key", sorted(key for key in TARGETS if TARGETS[key] in settings()))
def test_every_documented_key_reaches_its_setting(tmp_path: Path, key: str) -> None:
    section, _, name = TARGETS[key].rpartition(".")
    samples: dict[str, Any] = {
        "dtype": "float16", "trust_remote_code": True, "stop": ["a"], "temperature": 0.5,
        "top_p": 0.5, "min_p": 0.5, "repetition_penalty": 1.5,
    }  # fmt: skip
    is_text = section in ("", "prompts", "output") or name.endswith("path")
    value = samples.get(name, "x" if is_text else 3)
    outer, _, inner = key.rpartition(".")
    written = {outer: {inner: value}} if outer else {key: value}
    in_old_style = {"nodes": {}, "do_sample": True}
    config = load(tmp_path, in_old_style | written).config
    found = getattr(getattr(config, section), name) if section else config.name
    assert found == (tuple(value) if isinstance(value, list) else value)


def test_every_other_key_is_one_that_is_read() -> None:
    others = {target for target in TARGETS.values() if target not in settings()}
    assert others == {
        "do_sample", "num_beams", "num_return_sequences", "nodes", "gpus_per_node",
        "local_files_only", "deepspeed_config", "device_map", "low_cpu_mem_usage", "use_cache",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("torch.float16", "float16"), ("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"),
     ("torch.bfloat16", "bfloat16"), ("fp32", "float32"), ("auto", "auto")],
)  # fmt: skip
def test_old_dtype_words(tmp_path: Path, word: str, dtype: str) -> None:
    assert load(tmp_path, {"model_path": "m", "torch_dtype": word}).config.model.dtype == dtype


def test_without_do_sample_decoding_is_greedy_and_the_loss_is_said(tmp_path: Path) -> None:
    loaded = load(tmp_path, {"model_path": "m", "temperature": 0.7, "top_k": 5})
    assert loaded.config.generation.temperature == 0
    assert loaded.config.generation.top_k == 0
    assert "temperature, top_k has no effect" in loaded.warnings[0]
    assert "do_sample is absent" in loaded.warnings[0]
    assert "temperature" in loaded.generation_set  # so that a model that samples does not, here


def test_do_sample_alone_samples_as_transformers_does(tmp_path: Path) -> None:
    generation = load(tmp_path, {"model_path": "m", "do_sample": True}).config.generation
    assert (generation.temperature, generation.top_k) == (1.0, 50)


def test_prompts_as_a_text_is_a_file_and_may_be_overridden(tmp_path: Path) -> None:
    assert load(tmp_path, {"prompts": "p.jsonl"}).config.prompts.path == "p.jsonl"
    loaded = load(tmp_path, {"prompts": ["a"]}, "prompts.path=q.jsonl")
    assert loaded.inline_prompts == ()
    assert loaded.config.prompts.path == "q.jsonl"


def test_a_toml_file_may_extend_an_old_file(tmp_path: Path) -> None:
    load(tmp_path, {"prompts": ["a"], "seed": 3, "max_length": 9})
    top = tmp_path / "top.toml"
    top.write_text('extends = "exp_config.json"\n[generation]\nseed = 4\n')
    loaded = load_config(top)
    assert loaded.inline_prompts == ("a",)
    assert loaded.config.generation.seed == 4
    assert loaded.config.generation.max_new_tokens == 9
    top.write_text('extends = "exp_config.json"\n[prompts]\npath = "p.jsonl"\n')
    assert load_config(top).inline_prompts == ()


def test_output_file_becomes_a_folder_with_a_warning(tmp_path: Path) -> None:
    loaded = load(tmp_path, {"output_path": "out/results.json"})
    assert loaded.config.output.dir == "out/results"
    assert "writes a folder" in loaded.warnings[0]


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"model_path": "m", "local_files_only": False}, "nothing is ever downloaded"),
        ({"model_path": "m", "max_length": 64}, "number of new tokens"),
        ({"model_path": "m", "device_map": {"": 0}}, "device_map has no effect"),
    ],
)
def test_keys_that_mean_something_else_here_are_warned_about(
    tmp_path: Path, values: dict[str, Any], part: str
) -> None:
    assert part in load(tmp_path, values).warnings[0]


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"model_path": "m", "max_new_token": 5}, 'did you mean "max_new_tokens"?'),
        ({"model_path": "m", "zzz": 5}, "it may have model_path"),
        ({"model_path": "m", "model": "n"}, "'model_path' and 'model' both mean model.path"),
        ({"prompts": ["a"], "prompt_file": "p"}, "both mean prompts.path but differ"),
        ({"prompts": [], "model_path": "m"}, "'prompts' is empty"),
        ({"prompts": ["a", 3]}, "prompt 2"),
        ({"model_path": "m", "num_return_sequences": 2}, "must be 1"),
        ({"model_path": "m", "do_sample": "yes"}, "true or false"),
        ({"model_path": "m", "local_files_only": 1}, "true or false"),
        ({"model_path": "m", "torch_dtype": "int8"}, "is no dtype"),
        ({"model_path": 5}, "model.path = 5"),
        ({"model_path": "m", "max_new_tokens": "ten"}, "generation.max_new_tokens"),
        ({"model_path": "m", "ds_config": "nope.json"}, "nope.json"),
    ],
)
def test_what_cannot_be_mapped_is_one_sentence(
    tmp_path: Path, values: dict[str, Any], part: str
) -> None:
    message = failure(tmp_path, values)
    assert part in message


def test_equal_values_under_two_names_are_fine(tmp_path: Path) -> None:
    config = load(tmp_path, {"num_stages": 2, "world_size": 2}).config
    assert config.pipeline.num_stages == 2


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        ({"model_path": "m"}, True),
        ({"prompts": ["a"]}, True),
        ({"prompts": "p.jsonl"}, True),
        ({"model": {"path": "m"}}, False),
        ({"prompts": {"path": "p"}, "seed": 3}, False),
        ({"name": "x"}, False),
        ({}, False),
    ],
)
def test_the_style_is_told_by_its_keys(raw: dict[str, Any], answer: bool) -> None:
    assert is_legacy(raw) is answer


# ds_config.json


def test_ds_config_beside_is_read(tmp_path: Path) -> None:
    write_ds(
        tmp_path,
        {
            "train_micro_batch_size_per_gpu": 4,
            "train_batch_size": 8,
            "fp16": {"enabled": True, "loss_scale": 0},
            "bf16": {"enabled": False},
            "pipeline": {"stages": 2},
            "zero_optimization": {"stage": 0},
        },
    )
    found = load(tmp_path, {"model_path": "m"}).deepspeed
    assert found == DeepSpeedExpectations(tmp_path / "ds_config.json", 2, "float16", 4)


def test_ds_config_under_another_name_and_with_nothing_said(tmp_path: Path) -> None:
    write_ds(tmp_path, {"pipeline_parallel_size": 3, "bf16": {"enabled": "auto"}}, "other.json")
    found = load(tmp_path, {"model_path": "m", "deepspeed_config": "other.json"}).deepspeed
    assert found == DeepSpeedExpectations(tmp_path / "other.json", 3, None, None)


def test_a_config_in_todays_style_ignores_a_ds_config_beside_it(tmp_path: Path) -> None:
    write_ds(tmp_path, {"pipeline": {"stages": 2}})
    path = tmp_path / "a.json"
    path.write_text('{"generation": {"seed": 1}}')
    assert load_config(path).deepspeed is None


@pytest.mark.parametrize(
    "values",
    [
        {"pipeline": {"stages": 2}, "pipeline_parallel_size": 3},
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        {"pipeline": {"stages": 0}},
        {"pipeline": {"stages": "two"}},
        {"pipeline": 2},
        {"dtype": "int8"},
        [1],
    ],
)
def test_a_senseless_ds_config_is_a_sentence_with_its_path(tmp_path: Path, values: object) -> None:
    write_ds(tmp_path, values)
    assert "ds_config.json" in failure(tmp_path, {"model_path": "m"})


def test_broken_ds_config_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_text("{")
    assert "not valid JSON" in failure(tmp_path, {"model_path": "m"})


def check(expected: DeepSpeedExpectations) -> list[str]:
    return check_against_plan(expected, num_stages=2, dtype="float32", max_sequences_per_slot=32)


def test_a_plan_that_agrees_gives_nothing() -> None:
    assert check(DeepSpeedExpectations(Path("d"), 2, "float32", 32)) == []
    assert check(DeepSpeedExpectations(Path("d"))) == []


def test_another_stage_count_is_an_error() -> None:
    with pytest.raises(ConfigError, match="expects 4 pipeline stages, the plan has 2"):
        check(DeepSpeedExpectations(Path("d"), 4))


def test_another_dtype_or_batch_size_is_a_warning_with_the_remedy() -> None:
    found = check(DeepSpeedExpectations(Path("d"), 2, "float16", 8))
    assert "model.dtype=float16" in found[0]
    assert "pipeline.max_sequences_per_slot=8" in found[1]
    assert len(found) == 2
