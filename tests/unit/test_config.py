from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from mpipipe.config.binding import bind, settings
from mpipipe.config.checks import default_sampling
from mpipipe.config.load import config_hash, load_config, require_set, to_dict
from mpipipe.config.schema import Config, GenerationConfig
from mpipipe.errors import ConfigError
from mpipipe.types import SamplingParams


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def failure(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults_without_file_are_the_schema_defaults() -> None:
    assert load_config(None).config == Config()


def test_file_wins_over_defaults_and_overrides_win_over_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", "[generation]\nseed = 3\nmax_new_tokens = 9\n")
    config = load_config(path, ["generation.max_new_tokens=64"]).config
    assert config.generation.seed == 3
    assert config.generation.max_new_tokens == 64
    assert config.generation.top_p == 1.0
    assert config.name == "a"


def test_json_and_toml_of_the_same_content_are_equal(tmp_path: Path) -> None:
    values = {"name": "x", "pipeline": {"split": [14, 16]}, "generation": {"temperature": 1}}
    one = write(tmp_path, "a.json", json.dumps(values))
    two = write(
        tmp_path,
        "b.toml",
        'name = "x"\n[pipeline]\nsplit = [14, 16]\n[generation]\ntemperature = 1.0\n',
    )
    assert load_config(one).config == load_config(two).config
    assert config_hash(load_config(one).config) == config_hash(load_config(two).config)


def test_whole_number_for_a_float_setting_becomes_a_float(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", "[generation]\ntemperature = 1\n")
    assert type(load_config(path).config.generation.temperature) is float


# extends


def test_extends_chain_merges_key_by_key_with_the_nearest_file_winning(tmp_path: Path) -> None:
    write(tmp_path, "base/root.toml", "[generation]\nseed = 1\ntop_k = 1\nmax_new_tokens = 1\n")
    write(tmp_path, "base/mid.toml", 'extends = "root.toml"\n[generation]\nseed = 2\ntop_k = 2\n')
    top = write(tmp_path, "top.toml", 'extends = "base/mid.toml"\n[generation]\nseed = 3\n')
    loaded = load_config(top)
    found = loaded.config.generation
    assert (found.seed, found.top_k, found.max_new_tokens) == (3, 2, 1)
    assert [path.name for path in loaded.sources] == ["top.toml", "mid.toml", "root.toml"]
    assert loaded.config.name == "top"


def test_extends_circle_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", 'extends = "b.toml"\n')
    path = write(tmp_path, "b.toml", 'extends = "a.toml"\n')
    assert "b.toml → a.toml → b.toml" in failure(path)


def test_extends_of_itself_is_a_circle(tmp_path: Path) -> None:
    assert "circle" in failure(write(tmp_path, "a.toml", 'extends = "./a.toml"\n'))


def test_error_names_the_base_file_that_holds_it(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", "[generation]\nsed = 1\n")
    path = write(tmp_path, "top.toml", 'extends = "base.toml"\n')
    message = failure(path)
    assert "base.toml" in message
    assert '"generation.seed"' in message


@pytest.mark.parametrize("value", ["3", '""', '["a.toml"]'])
def test_extends_must_be_one_path(tmp_path: Path, value: str) -> None:
    assert "extends" in failure(write(tmp_path, "a.toml", f"extends = {value}\n"))


# files


def test_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    message = failure(tmp_path / "nope.toml")
    assert "does not exist" in message
    assert os.getcwd() in message


def test_folder_unknown_suffix_and_other_encodings_are_sentences(tmp_path: Path) -> None:
    assert "is a folder" in failure(tmp_path)
    assert ".toml or .json" in failure(write(tmp_path, "a.yaml", "x: 1"))
    latin = tmp_path / "l.toml"
    latin.write_bytes(b'[model]\npath = "caf\xe9"\n')
    assert "not UTF-8 text (line 2)" in failure(latin)
    utf16 = tmp_path / "u.toml"
    utf16.write_bytes("name = 'x'".encode("utf-16"))
    assert "UTF-16" in failure(utf16)


def test_byte_order_mark_and_crlf_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf[generation]\r\nseed = 4\r\n")
    assert load_config(path).config.generation.seed == 4


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.toml", "[model\n", "line 1"),
        ("a.toml", "[model]\npath = 'x'\npath = 'y'\n", "line 3"),
        ("a.json", '{\n"model": {,}}', "line 2"),
        ("a.json", '{"model": {"path": "a", "path": "b"}}', "'path' is there twice"),
        ("a.json", '{"generation": {"temperature": NaN}}', "NaN"),
        ("a.json", "[1]", "found a list"),
        ("a.json", "[" * 100_000, "nested"),
    ],
)
def test_broken_syntax_names_file_and_place(
    tmp_path: Path, name: str, text: str, part: str
) -> None:
    message = failure(write(tmp_path, name, text))
    assert name in message
    assert part in message


# paths


def test_file_path_is_taken_from_the_current_directory_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "sub/a.toml", '[prompts]\npath = "p.jsonl"\n')
    write(tmp_path, "sub/p.jsonl", "")
    write(tmp_path, "p.jsonl", "")
    monkeypatch.chdir(tmp_path)
    assert load_config(path).config.prompts.path == "p.jsonl"


def test_file_path_falls_back_to_the_folder_of_the_file_that_sets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "base/b.toml", '[model]\npath = "m"\n')
    (tmp_path / "base/m").mkdir()
    path = write(tmp_path, "top/a.toml", 'extends = "../base/b.toml"\n')
    monkeypatch.chdir(path.parent)
    assert Path(load_config(path).config.model.path).samefile(tmp_path / "base/m")


def test_path_that_exists_nowhere_stays_as_written(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", '[model]\npath = "nope/x"\n[output]\ndir = "runs/y"\n')
    config = load_config(path).config
    assert (config.model.path, config.output.dir) == ("nope/x", "runs/y")


def test_output_folder_is_never_taken_from_the_files_folder(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", '[output]\ndir = "out"\n')
    (tmp_path / "out").mkdir()
    assert load_config(path).config.output.dir == "out"


def test_variables_and_home_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/s")
    monkeypatch.setenv("HOME", "/h")
    config = load_config(
        None, ["model.path=~/m", "prompts.path=$SCRATCH/p", "output.dir=${SCRATCH}/o"]
    ).config
    assert (config.model.path, config.prompts.path, config.output.dir) == ("/h/m", "/s/p", "/s/o")


def test_variable_that_is_not_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRATCH", raising=False)
    message = failure(None, "model.path=$SCRATCH/m")
    assert "'SCRATCH' is not set" in message
    assert "model.path" in message


def test_demo_model_is_not_a_path(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", '[model]\npath = "demo:smollm2"\n')
    (tmp_path / "demo:smollm2").mkdir()
    assert load_config(path).config.model.path == "demo:smollm2"


def test_require_set_names_the_empty_setting() -> None:
    require_set(load_config(None, ["model.path=x"]).config, "model.path")
    with pytest.raises(ConfigError, match=r"prompts\.path is not set"):
        require_set(Config(), "prompts.path")


# dictionary and hash


def test_to_dict_survives_json_and_binding() -> None:
    words = ["pipeline.split=14,16", "generation.stop=a", "model.path=m"]
    config = load_config(None, words).config
    assert bind(json.loads(json.dumps(to_dict(config))), "test") == config


def test_hash_is_twelve_hex_digits_and_changes_with_any_setting() -> None:
    base = config_hash(Config())
    assert len(base) == 12
    assert int(base, 16) >= 0
    assert config_hash(load_config(None, []).config) == base
    assert config_hash(load_config(None, ["generation.seed=1"]).config) != base


def test_every_setting_of_the_schema_has_a_readable_type() -> None:
    config = to_dict(Config())
    num_leaves = sum(len(v) if isinstance(v, dict) else 1 for v in config.values())
    assert len(settings()) == num_leaves


def test_default_sampling_takes_every_generation_setting() -> None:
    generation = GenerationConfig(
        max_new_tokens=3, temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, repetition_penalty=1.2,
        frequency_penalty=0.3, presence_penalty=-0.4, seed=8, stop=("a",),
        stop_token_ids=(5,), ignore_eos=True, num_logprobs=2,
    )  # fmt: skip
    fields = dataclasses.asdict(generation)
    assert fields.pop("use_model_defaults") is True  # decides on the others, and is none itself
    expected = SamplingParams(**fields)
    assert default_sampling(generation) == expected
    assert default_sampling(GenerationConfig()) == SamplingParams()
