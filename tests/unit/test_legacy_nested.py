"""`exp_config.json` with objects in it: understood, or told key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpipipe.config.binding import settings
from mpipipe.config.legacy import is_legacy
from mpipipe.config.load import LoadedConfig, load_config
from mpipipe.errors import ConfigError

REPORT = {
    "model": {"name": "m", "dtype": "fp16"},
    "pipeline": {"stages": 2, "micro_batches": 4},
    "sampling": {"max_new_tokens": 64, "temperature": 0.7},
    "nodes": {"count": 2, "gpus_per_node": 1},
}


def load(folder: Path, values: object) -> LoadedConfig:
    path = folder / "exp_config.json"
    path.write_text(json.dumps(values))
    return load_config(path)


def failure(folder: Path, values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, values)
    return str(caught.value)


def test_the_reports_objects_become_todays_settings(tmp_path: Path) -> None:
    loaded = load(tmp_path, REPORT)
    config = loaded.config
    assert (config.model.path, config.model.dtype) == ("m", "float16")
    assert (config.pipeline.num_stages, config.pipeline.num_slots) == (2, 4)
    assert (config.generation.max_new_tokens, config.generation.temperature) == (64, 0.7)
    assert config.generation.top_k == 0  # as said: no defaults of transformers
    assert "start 2 ranks" in loaded.warnings[0]
    assert "srun -N2 --ntasks-per-node=1" in loaded.warnings[0]


def test_objects_and_flat_keys_and_settings_of_today_may_be_mixed(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        {
            "experiment_name": "x",
            "model": {"path": "m", "weights": "random", "tokenizer": "t"},
            "prompts": ["a", "b"],
            "sampling": {"do_sample": False, "temperature": 0.7, "stop": "END"},
            "output": {"dir": "out.json", "overwrite": True},
            "memory": {"page_size_tokens": 8},
            "nodes": {"hosts": ["n1", "n2"], "tasks_per_node": 2},
            "max_new_tokens": 5,
        },
    )
    config = loaded.config
    assert config.name == "x"
    assert (config.model.weights, config.model.tokenizer_path) == ("random", "t")
    assert loaded.inline_prompts == ("a", "b")
    assert (config.output.dir, config.output.overwrite) == ("out", True)
    assert config.memory.page_size_tokens == 8
    assert config.pipeline.num_stages == 4
    assert config.generation.stop == ("END",)
    assert config.generation.max_new_tokens == 5
    assert config.generation.temperature == 0
    assert any("temperature has no effect" in warning for warning in loaded.warnings)


def test_each_unknown_key_is_told_with_what_it_would_be_now(tmp_path: Path) -> None:
    message = failure(
        tmp_path,
        {
            "model": {"name": "m", "dtyp": "fp16"},
            "pipeline": {"stage": 2},
            "sampling": {"max_new_token": 64},
            "seeed": 3,
            "cluster": {"partition": "gpu"},
            "monitoring": {},
        },
    )
    for part in (
        '"model.dtyp", did you mean "model.dtype"?',
        '"pipeline.stage", did you mean "pipeline.stages"? (now pipeline.num_stages)',
        '"sampling.max_new_token"',
        "(now generation.max_new_tokens)",
        '"seeed", did you mean "seed"? (now generation.seed)',
        '"cluster.partition"',
        '"monitoring"',
    ):
        assert part in message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"nodes": {"count": 3}}, "make 3 ranks, but the pipeline has 2 stages"),
        ({"nodes": {"count": 0}}, "nodes = 0"),
        ({"nodes": {"count": "two"}}, "nodes = 'two'"),
        ({"nodes": {"count": True}}, "nodes = True"),
        ({"nodes": {"count": 2, "gpus_per_node": 10**30}}, "gpus_per_node"),
        ({"nodes": []}, "nodes = 0"),
        ({"model": {"name": "m", "path": "n"}}, "'model.name' and 'model.path'"),
        ({"model": {"name": 3}}, "model.path = 3"),
        ({"model": {"name": "m", "dtype": []}}, "model.dtype = [] is no dtype"),
        ({"sampling": {"temperature": {}}}, "generation.temperature = {}"),
        ({"sampling": {"temperature": 0.5, "do_sample": 1}}, "do_sample"),
        ({"sampling": 3}, '"sampling"'),
        ({"sampling": {"n": 2}}, "num_return_sequences = 2"),
        ({"pipeline": {"stages": 2, "num_stages": 3}}, "'pipeline.stages'"),
    ],
)
def test_a_senseless_value_is_one_sentence(
    tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    assert part in failure(tmp_path, {**REPORT, **change})


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        (REPORT, True),
        ({"model": {"name": "m"}}, True),
        ({"nodes": {"count": 1}}, True),
        ({"model_path": "m", "cluster": {}}, True),
        ({"model": {"path": "m"}, "pipeline": {"num_stages": 2}}, False),
        ({"model": {"path": "m", "naem": 1}}, False),
        ({"generation": {"seed": 1}}, False),
    ],
)
def test_the_style_is_told_by_the_keys_of_the_objects(raw: dict[str, Any], answer: bool) -> None:
    assert is_legacy(raw) is answer


def test_no_setting_of_today_is_taken_for_an_old_one() -> None:
    for name in settings():
        section, _, key = name.rpartition(".")
        assert not is_legacy({section: {key: 1}} if section else {name: "x"}), name
