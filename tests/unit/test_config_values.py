"""What a setting may be: overrides, unknown names, types and ranges."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpipipe.config.binding import to_dict
from mpipipe.config.load import load_config
from mpipipe.errors import ConfigError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def failure(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# overrides


@pytest.mark.parametrize(
    ("words", "setting", "value"),
    [
        (["generation.seed=7"], "generation.seed", 7),
        (["generation.temperature=1"], "generation.temperature", 1.0),
        (["generation.ignore_eos=true"], "generation.ignore_eos", True),
        (["model.path=2024"], "model.path", "2024"),
        (["model.path=/data/x y"], "model.path", "/data/x y"),
        (['model.path="quoted"'], "model.path", "quoted"),
        (["model.path=a=b"], "model.path", "a=b"),
        (["model.tokenizer_path="], "model.tokenizer_path", ""),
        (["name=2024-01-02"], "name", "2024-01-02"),
        (["name=3"], "name", "3"),
        (["model.weights=random"], "model.weights", "random"),
        (["pipeline.transport=nccl"], "pipeline.transport", "nccl"),
        (["pipeline.device=cuda"], "pipeline.device", "cuda"),
        (["pipeline.attention=triton"], "pipeline.attention", "triton"),
        (["pipeline.lookahead=0"], "pipeline.lookahead", 0),
        (["pipeline.lookahead=3"], "pipeline.lookahead", 3),
        (["pipeline.lookahead=auto"], "pipeline.lookahead", "auto"),
        (["memory.gpu_memory_fraction=1"], "memory.gpu_memory_fraction", 1.0),
        (["generation.stop=END"], "generation.stop", ("END",)),
        (["generation.stop=END", "generation.stop=5"], "generation.stop", ("END", "5")),
        (['generation.stop=["a", "b"]'], "generation.stop", ("a", "b")),
        (['generation.stop="\\n"'], "generation.stop", ("\n",)),
        (["generation.stop=a, b"], "generation.stop", ("a, b",)),
        (["generation.stop_token_ids=1", "generation.stop_token_ids=2"],
         "generation.stop_token_ids", (1, 2)),
        (["pipeline.split=[14, 16]"], "pipeline.split", (14, 16)),
        (["pipeline.split=14,16"], "pipeline.split", (14, 16)),
        (["pipeline.split=30"], "pipeline.split", (30,)),
        (["pipeline.split=auto"], "pipeline.split", "auto"),
        (["pipeline.num_stages=auto"], "pipeline.num_stages", "auto"),
        (["memory.device_bytes=200MiB"], "memory.device_bytes", 200 * 2**20),
        (["memory.device_bytes=1.5 GiB"], "memory.device_bytes", 3 * 2**29),
        (['memory.device_bytes="6gib"'], "memory.device_bytes", 6 * 2**30),
        (["memory.device_bytes=4096"], "memory.device_bytes", 4096),
        (["memory.device_bytes=auto"], "memory.device_bytes", "auto"),
        (["memory.host_bytes=16GB"], "memory.host_bytes", 16 * 10**9),
        (["memory.host_bytes=0"], "memory.host_bytes", 0),
        (["memory.kv_host_bytes=2GiB"], "memory.kv_host_bytes", 2 * 2**30),
        (["memory.kv_host_bytes=0"], "memory.kv_host_bytes", 0),
        (["memory.kv_cache_bytes=0.5 TB"], "memory.kv_cache_bytes", 5 * 10**11),
        (["memory.kv_cache_bytes=12 B"], "memory.kv_cache_bytes", 12),
        (["pipeline.num_stages=2", "pipeline.num_stages=3"], "pipeline.num_stages", 3),
    ],
)  # fmt: skip
def test_override_values(words: list[str], setting: str, value: object) -> None:
    section, _, key = setting.rpartition(".")
    config = to_dict(load_config(None, words).config)
    found = config[section][key] if section else config[key]
    assert (tuple(found) if isinstance(found, list) else found) == value


def test_repeated_list_override_replaces_the_files_list(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", '[generation]\nstop = ["x"]\n')
    assert load_config(path, ["generation.stop=y"]).config.generation.stop == ("y",)


@pytest.mark.parametrize("word", ["generation.seed", "=3", "run"])
def test_override_without_a_value_shows_the_form(word: str) -> None:
    assert "section.key=value" in failure(None, word)


# unknown names


@pytest.mark.parametrize(
    ("word", "guess"),
    [
        ("generation.temprature=1", "generation.temperature"),
        ("max_new_tokens=5", "generation.max_new_tokens"),
        ("modle.path=x", "model.path"),
        ("modle.dtpe=x", "model.dtype"),
        ("model.max_new_tokens=2", "generation.max_new_tokens"),
        ("pipeline.page_size_tokens=2", "memory.page_size_tokens"),
        ("nmae=x", "name"),
        ("temprature=1", "generation.temperature"),
    ],
)
def test_unknown_setting_names_the_nearest(word: str, guess: str) -> None:
    message = failure(None, word)
    assert f'did you mean "{guess}"?' in message
    assert word.partition("=")[0] in message


def test_a_dotted_name_in_quotes_is_no_setting_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('"model.path" = "m"\n')
    assert 'unknown setting "model.path"' in failure(path)
    path.write_text('[model]\n"path.path" = "m"\n')
    assert 'unknown setting "model.path.path"' in failure(path)


def test_unknown_section_in_a_file_lists_the_sections(tmp_path: Path) -> None:
    message = failure(write(tmp_path, "a.toml", "[modle]\npath = 'x'\n"))
    assert "a.toml" in message
    assert '"model"' in message
    assert "model, prompts, generation, pipeline, memory, output, log" in message


def test_setting_without_a_near_name_lists_its_section() -> None:
    message = failure(None, "memory.zzz=1")
    assert "did you mean" not in message
    assert "kv_cache_bytes" in message


@pytest.mark.parametrize("word", ["generation=3", "model=x"])
def test_section_used_as_a_setting_lists_what_is_in_it(word: str) -> None:
    section = word.partition("=")[0]
    assert f"{section} is a section with {section}." in failure(None, word)


def test_section_used_as_a_setting_in_a_file(tmp_path: Path) -> None:
    assert "model.path" in failure(write(tmp_path, "a.toml", 'model = "x"\n'))


# types


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[generation]\nseed = "x"', ["generation.seed", "'x'", "a whole number"]),
        ("[generation]\nseed = 1.0", ["generation.seed", "1.0", "a whole number"]),
        ("[generation]\nseed = true", ["generation.seed", "True", "a whole number"]),
        ('[generation]\ntemperature = "hot"', ["'hot'", "a number"]),
        ("[generation]\ntemperature = false", ["False", "a number"]),
        ("[generation]\nignore_eos = 1", ["1", "true or false"]),
        ("[model]\npath = 3", ["model.path", "3", "a text"]),
        ("[generation]\nstop = 3", ["a list of texts"]),
        ("[generation]\nstop = [3]", ["[3]", "a list of texts"]),
        ("[generation]\nstop_token_ids = [1.5]", ["a list of whole numbers"]),
        ("[pipeline]\nnum_stages = 2.5", ["2.5", 'a whole number or "auto"']),
        ("[pipeline]\nsplit = [1, true]", ['a list of whole numbers or "auto"']),
        (f"[generation]\nseed = {2**63 - 1}0", ["generation.seed"]),
    ],
)
def test_wrong_type_names_setting_value_and_expectation(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    message = failure(write(tmp_path, "a.toml", text))
    assert all(part in message for part in ["a.toml", *parts])


def test_null_in_json_is_a_wrong_type(tmp_path: Path) -> None:
    message = failure(write(tmp_path, "a.json", '{"generation": {"seed": null}}'))
    assert "generation.seed = None" in message


# ranges


@pytest.mark.parametrize(
    "word",
    [
        "model.dtype=int8",
        "model.weights=zeros",
        "pipeline.transport=gloo",
        "pipeline.device=tpu",
        "pipeline.attention=flash",
        "pipeline.prefill=eager",
        "pipeline.lookahead=4",
        "pipeline.lookahead=-1",
        "memory.gpu_memory_fraction=0",
        "memory.gpu_memory_fraction=1.01",
        "memory.gpu_memory_fraction=nan",
        "memory.kv_cache=ring",
        "log.level=verbose",
        "log.progress=fancy",
        "pipeline.num_stages=0",
        "pipeline.num_stages=-1",
        "pipeline.num_stages=two",
        "pipeline.num_slots=0",
        "pipeline.max_sequences_per_slot=0",
        "pipeline.max_tokens_per_step=0",
        "pipeline.threads_per_rank=0",
        "pipeline.split=[]",
        "pipeline.split=[14, 0]",
        "pipeline.split=[14, -2]",
        "pipeline.handshake_timeout_s=0",
        "pipeline.handshake_timeout_s=nan",
        "pipeline.handshake_timeout_s=inf",
        "memory.kv_cache_bytes=0",
        "memory.kv_cache_bytes=0.4 B",
        "memory.device_bytes=0",
        "memory.device_bytes=-1GiB",
        "memory.device_bytes=1.5",
        "memory.device_bytes=GiB",
        "memory.device_bytes=6 GiBs",
        "memory.device_bytes=99999999999 TiB",
        "memory.host_bytes=-1",
        "memory.kv_host_bytes=-1",
        "memory.host_bytes=true",
        "memory.num_kv_pages=0",
        "memory.page_size_tokens=0",
        "memory.max_context_tokens=0",
        "prompts.limit=-1",
        "name=a/b",
        "name=",
        "output.dir=",
        "generation.max_new_tokens=0",
        "generation.temperature=-0.1",
        "generation.temperature=nan",
        "generation.temperature=inf",
        "generation.top_k=-1",
        "generation.top_p=0",
        "generation.top_p=1.1",
        "generation.min_p=1.0",
        "generation.repetition_penalty=0",
        "generation.repetition_penalty=inf",
        "generation.frequency_penalty=2.1",
        "generation.frequency_penalty=nan",
        "generation.presence_penalty=-2.1",
        "generation.num_logprobs=-2",
        "generation.seed=-1",
        'generation.stop=""',
        "generation.stop_token_ids=-1",
    ],
)
def test_value_out_of_range_names_the_setting(word: str) -> None:
    assert word.partition("=")[0] in failure(None, word)


def test_a_size_that_is_none_shows_how_to_write_it(tmp_path: Path) -> None:
    """In files and on the command line; an unknown unit gets the likeliest one."""
    message = failure(None, "memory.device_bytes=6G")
    assert """memory.device_bytes = '6G' has the unit "G", which is not known""" in message
    assert 'e.g. "6GiB"' in message
    assert 'e.g. "3GiB"' in failure(None, "memory.host_bytes=3 pages")
    assert 'a size such as "6GiB"' in failure(None, "memory.kv_cache_bytes=much")
    assert "[1]" in failure(write(tmp_path, "a.toml", "[memory]\ndevice_bytes = [1]\n"))
    path = write(tmp_path, "b.toml", '[memory]\ndevice_bytes = "2 KiB"\n')
    assert load_config(path, []).config.memory.device_bytes == 2048


def test_wrong_choice_lists_the_choices_and_the_nearest() -> None:
    message = failure(None, "model.dtype=bf16")
    assert '"auto", "float32", "bfloat16", "float16"' in message
    assert 'did you mean "bfloat16"?' in message


@pytest.mark.parametrize("as_word", [False, True])
def test_laps_ahead_is_read_as_lookahead_with_a_warning(tmp_path: Path, as_word: bool) -> None:
    path = tmp_path / "job.toml"
    path.write_text("" if as_word else "[pipeline]\nlaps_ahead = 2\n")
    loaded = load_config(path, ["pipeline.laps_ahead=2"] if as_word else [])
    assert loaded.config.pipeline.lookahead == 2
    (warning,) = loaded.warnings
    assert "pipeline.laps_ahead is now called pipeline.lookahead" in warning
    assert warning.startswith("command line" if as_word else str(path))


def test_a_setting_under_both_of_its_names_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[pipeline]\nlaps_ahead = 2\nlookahead = 1\n")
    with pytest.raises(ConfigError, match=r"sets pipeline\.lookahead and its older name"):
        load_config(path)
