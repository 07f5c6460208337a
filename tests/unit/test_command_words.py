"""`mpipipe run MODEL prompts.jsonl section.key=value`: which word means what."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpipipe.config.load import config_hash, load_config
from mpipipe.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "llama-3.2"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.parametrize("prompts", ["p.jsonl", "dir/p", "p.jsonl.gz", "p.jsonl.zst", "-"])
def test_a_model_and_a_prompt_file_need_no_configuration(model: Path, prompts: str) -> None:
    loaded = load_config(model, [prompts, "generation.seed=7"])
    config = loaded.config
    assert (config.model.path, config.prompts.path) == (str(model), prompts)
    assert config.generation.seed == 7
    assert config.name == "llama-3.2"
    assert loaded.sources == ()
    same = load_config(model, ["generation.seed=7", prompts]).config
    assert config_hash(same) == config_hash(config)


def test_a_folder_is_a_model_whatever_its_name_ends_in(model: Path) -> None:
    folder = model.rename(model.with_name("llama.json"))
    assert load_config(folder, ["p.jsonl"]).config.model.path == str(folder)


def test_the_config_of_a_model_is_no_experiment_file(model: Path) -> None:
    path = model / "config.json"
    # As published: with keys that old experiment files have, too.
    path.write_text('{"model_type": "llama", "torch_dtype": "bfloat16", "use_cache": true}')
    with pytest.raises(ConfigError, match="give the model's folder"):
        load_config(path, ["p.jsonl"])


def test_the_demo_model_and_a_folder_that_only_other_ranks_see_are_models() -> None:
    demo = load_config(Path("demo:smollm2"), ["p.jsonl"]).config
    assert (demo.model.path, demo.name) == ("demo:smollm2", "smollm2")
    assert load_config(Path("/not/here/m")).config.model.path == "/not/here/m"


def test_a_prompt_file_may_follow_a_configuration_file_and_settings_win(tmp_path: Path) -> None:
    path = tmp_path / "exp.toml"
    path.write_text('model.path = "m"\nprompts.path = "a.jsonl"\n')
    assert load_config(path, ["b.jsonl"]).config.prompts.path == "b.jsonl"
    words = ["b.jsonl", "prompts.path=copy/b.jsonl", "model.path=n"]  # as run.sh has them
    config = load_config(path, words).config
    assert (config.prompts.path, config.model.path, config.name) == ("copy/b.jsonl", "n", "exp")
    old = tmp_path / "old.json"
    old.write_text('{"model_path": "m", "prompts": ["x"]}')
    assert load_config(old).inline_prompts == ("x",)
    assert load_config(old, ["b.jsonl"]).inline_prompts == ()


@pytest.mark.parametrize(
    ("source", "words", "part"),
    [
        ("p.jsonl", ["MODEL"], "write `mpipipe run MODEL p.jsonl`"),
        ("p.jsonl", ["generation.seed=1"], "in the place of the model"),
        ("-", ["MODEL"], "write `mpipipe run MODEL -`"),
        ("generation.seed=1", [], "a setting in the first place"),
        ("MODEL", ["a.jsonl", "b.jsonl"], "two prompt files"),
        ("MODEL", ["exp.toml"], "in the place of the prompt file"),
        ("exp.toml", ["demo:smollm2"], "in the place of the prompt file"),
        ("MODEL", ["generation.seed"], "write section.key=value"),
        ("MODEL", ["nothing"], "no setting, and no file"),
        ("MODEL", ["a.jsonl\0"], "NUL"),
        ("MO\0DEL", [], "NUL"),
        ("~\0", [], "NUL"),  # a user of that name is looked up, too
        ("nope.toml", [], "does not exist"),
    ],
)
def test_words_in_a_wrong_place_are_told_with_the_right_one(
    source: str, words: list[str], part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Path(source), words)
    assert part in str(caught.value)


def test_files_that_are_no_configuration_say_what_is_wanted(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the model's folder"):
        load_config(model / "config.json")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\0\0")
    with pytest.raises(ConfigError, match=r"ends in \.toml or \.json"):
        load_config(weights)
    with pytest.raises(ConfigError, match=r"is a folder without a config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "path", ["a\0b", "x" * 256, "y/" * 2100, "$MPIPIPE_NOT_SET/x", "caf\udce9"]
)
@pytest.mark.parametrize("setting", ["model.path", "prompts.path", "output.dir"])
def test_what_no_path_can_be_is_a_sentence(setting: str, path: str, tmp_path: Path) -> None:
    section, _, key = setting.partition(".")
    config = tmp_path / "a.toml"
    config.write_text(f'[{section}]\n{key} = "x"\n')
    with pytest.raises(ConfigError):
        load_config(config, [f"{setting}={path}"])


def test_links_in_a_circle_are_a_sentence(tmp_path: Path) -> None:
    link = tmp_path / "a.toml"
    link.symlink_to(link)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(link)
