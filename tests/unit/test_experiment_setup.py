"""From the words of the command to a matrix: what is fixed, what is refused, prompts, best.toml."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mpipipe.config.load import load_config
from mpipipe.errors import ConfigError
from mpipipe.experiments.best import best_config
from mpipipe.experiments.folder import ExperimentFolder
from mpipipe.experiments.record import ExperimentName, Matrix
from mpipipe.experiments.setup import experiment_matrix, possible_arrangements
from mpipipe.experiments.verdict import judge
from tests.unit.experiment_records import an_experiment, options_of

SHAPE = Path(__file__).parents[2] / "configs/shapes/openllama_3b"
WORDS = ("model.weights=random", "generation.max_new_tokens=8")


def a_config(folder: Path, *lines: str) -> Path:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": i, "prompt": f"{i} is"}) + "\n" for i in range(8)))
    config = folder / "exp.toml"
    text = [f'model.path = "{SHAPE}"', 'model.weights = "random"', f'prompts.path = "{prompts}"']
    config.write_text("\n".join([*text, *lines]) + "\n")
    return config


def matrix_of(
    folder: Path,
    config: Path,
    *words: str,
    experiment: ExperimentName = "strong",
    threads: int | None = None,
    **options: Any,
) -> Matrix:
    return experiment_matrix(
        ExperimentFolder(folder / "out"),
        config,
        words,
        options_of(experiment, **options),
        ("mpipipe",),
        threads=threads,
    )


def test_runs_are_greedy_and_of_fixed_length_unless_words_say_otherwise(tmp_path: Path) -> None:
    config = a_config(tmp_path, "generation.temperature = 0.7")
    matrix = matrix_of(tmp_path, config)
    assert matrix.settings["generation.temperature"] == 0.0
    assert matrix.settings["generation.ignore_eos"] is True
    assert "generation.ignore_eos=true" in matrix.cases[0].words
    other = matrix_of(tmp_path / "b", config, "generation.temperature=0.5")
    assert other.settings["generation.temperature"] == 0.5
    assert not any(word.startswith("generation.temperature") for word in other.cases[0].words)


def test_every_rank_gets_the_same_threads_in_every_case(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    matrix = matrix_of(tmp_path, config, threads=1)
    assert all("pipeline.threads_per_rank=1" in case.words for case in matrix.cases)
    asked = matrix_of(tmp_path / "b", config, "pipeline.threads_per_rank=3", threads=1)
    assert not any("pipeline.threads_per_rank=1" in case.words for case in asked.cases)


def test_made_prompts_are_token_ids_of_one_length_and_the_same_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_prompts": 3, "prompt_tokens": 5}
    matrix = matrix_of(tmp_path, SHAPE, *WORDS, experiment="weak", **options)
    path = tmp_path / "out/prompts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert {len(line["prompt"]) for line in lines} == {5}
    assert f"prompts.path={path}" in matrix.cases[0].words
    again = matrix_of(tmp_path / "b", SHAPE, *WORDS, experiment="strong", **options)
    shorter = (tmp_path / "b/out/prompts.jsonl").read_text()
    assert path.read_text().startswith(shorter)
    assert len(shorter.splitlines()) == 3
    assert again.prompts_hash != matrix.prompts_hash


def test_the_same_command_finds_its_matrix_and_an_edited_file_is_told(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    assert matrix_of(tmp_path, config) == matrix_of(tmp_path, config)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('"one more"\n')
    with pytest.raises(ConfigError, match="content of the prompts"):
        matrix_of(tmp_path, config, num_prompts=8)
    a_config(tmp_path, "generation.max_new_tokens = 9")
    with pytest.raises(ConfigError, match=r"generation.max_new_tokens: \d+ → 9"):
        matrix_of(tmp_path, config)


@pytest.mark.parametrize(
    ("words", "options", "told"),
    [
        (("pipeline.num_slots=2",), {}, "pipeline.num_slots is what the experiment sets"),
        (("output.dir=x",), {}, "output.dir is what the experiment sets"),
        (("pipeline.split=13,13",), {}, "set pipeline.split=auto"),
        (("pipeline.tensor_parallel=2",), {}, "pipeline.tensor_parallel is what the experiment"),
        (("prompts.path=-",), {}, "write them to a file"),
        (("prompts.path=x.jsonl",), {"prompt_tokens": 4, "num_prompts": 1}, "leave one of them"),
        ((), {"prompt_tokens": 4}, "add --prompts"),
        ((), {"prompt_tokens": 2048, "num_prompts": 1}, "the model takes 2048"),
        ((), {"num_prompts": 9}, "needs 9 prompts, and there are 8"),
    ],
)
def test_a_request_that_makes_no_experiment_is_refused(
    tmp_path: Path, words: tuple[str, ...], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        matrix_of(tmp_path, a_config(tmp_path), *words, **options)
    assert not (tmp_path / "out").exists()


def test_lanes_of_the_configuration_are_not_overruled_in_silence(tmp_path: Path) -> None:
    config = a_config(tmp_path, "[pipeline]\ntensor_parallel = 3")
    with pytest.raises(ConfigError, match="give --tensor-parallel 3, or set"):
        matrix_of(tmp_path, config)
    matrix = matrix_of(tmp_path, config, lanes=3)
    assert {case.num_ranks for case in matrix.cases} == {3, 6}


def test_arrangements_are_those_that_the_models_shapes_allow(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    assert possible_arrangements(config, (), 2) == ((1, 2, 1), (1, 1, 2), (2, 1, 1))
    assert possible_arrangements(config, (), 3) == ((1, 3, 1), (3, 1, 1)), "32 heads"


def test_the_best_arrangement_is_a_configuration_too(tmp_path: Path) -> None:
    config, cuts = a_config(tmp_path), ((1, 2, 1), (2, 1, 1))
    matrix = matrix_of(tmp_path, config, experiment="arrangements", arrangements=cuts, batches=(8,))
    verdict = judge(matrix, an_experiment(matrix, {"r1_n2_t1": [5.0] * 5, "r2_n1_t1": [9.0] * 5}))
    place = tmp_path / "out/best.toml"
    place.write_text(best_config(matrix, verdict, place, extends=config) or "")
    found = load_config(place).config.pipeline
    assert (found.replicas, found.num_stages, found.tensor_parallel) == (2, 1, 1)
    assert (found.num_slots, found.max_sequences_per_slot) == (1, 4)
    assert "`mpipipe bench arrangements`: r2_n1_t1 made 9.0 tokens/s" in place.read_text()


def test_a_prompt_that_cannot_complete_is_named(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"id": "good", "prompt": "a"}\n{"id": "bad"}\n')
    with pytest.raises(ConfigError, match="'bad' would become an error record"):
        matrix_of(tmp_path, config)


def test_the_best_batch_is_a_configuration_that_builds_on_the_given_one(tmp_path: Path) -> None:
    config = a_config(tmp_path, "generation.max_new_tokens = 12")
    words = ("generation.seed=3", "memory.page_size_tokens=32")
    matrix = matrix_of(tmp_path, config, *words, experiment="batch", stages=(2,), batches=(1, 8))
    speeds = {"batch_1": [1.0] * 5, "batch_8": [9.0] * 5}
    verdict = judge(matrix, an_experiment(matrix, speeds))
    place = tmp_path / "out/best.toml"
    place.write_text(best_config(matrix, verdict, place, extends=config) or "")
    found = load_config(place).config
    pipeline = found.pipeline
    assert (pipeline.num_stages, pipeline.num_slots, pipeline.max_sequences_per_slot) == (2, 2, 4)
    assert (found.generation.seed, found.memory.page_size_tokens) == (3, 32)
    assert (found.generation.max_new_tokens, found.generation.ignore_eos) == (12, False)
    assert found.prompts.path == str(tmp_path / "prompts.jsonl")
    assert place.read_text().splitlines()[0].endswith("batch_8 made 9.0 tokens/s (9.0 to 9.0).")


def test_the_best_batch_of_a_model_folder_names_the_model_and_the_prompts(tmp_path: Path) -> None:
    a_config(tmp_path)
    prompts = str(tmp_path / "prompts.jsonl")
    matrix = matrix_of(tmp_path, SHAPE, prompts, *WORDS, experiment="batch", batches=(1,))
    verdict = judge(matrix, an_experiment(matrix, {"batch_1": [1.0] * 5}))
    place = tmp_path / "out/best.toml"
    place.write_text(best_config(matrix, verdict, place, extends=None) or "")
    found = load_config(place).config
    assert (found.model.path, found.model.weights) == (str(SHAPE), "random")
    assert found.prompts.path == prompts
    nothing = dataclasses.replace(verdict, best=None)
    assert best_config(matrix, nothing, place, extends=None) is None
