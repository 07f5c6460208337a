"""The command line of an experiment: its options, its table, its exit code; nothing is launched."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpipipe.cli.main import app
from mpipipe.errors import EXIT_OK, EXIT_PROMPTS, ConfigError, StoppedError
from mpipipe.experiments.folder import ExperimentFolder
from mpipipe.experiments.record import Matrix
from tests.unit.experiment_records import an_experiment

SHAPE = str(Path(__file__).parents[2] / "configs/shapes/openllama_3b")
WORDS = ("model.weights=random", "--prompts=4", "--prompt-tokens=8", "--repeat=5")


def run(folder: Path, *words: str, experiment: str = "batch") -> tuple[int, str]:
    command = ["bench", experiment, SHAPE, *WORDS, f"--out={folder}", "--table", *words]
    result = CliRunner().invoke(app, command)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def matrix_of(folder: Path) -> Matrix:
    matrix = ExperimentFolder(folder).read_matrix()
    assert matrix is not None
    return matrix


def keep_all(folder: Path, speeds: dict[str, float]) -> None:
    of_all = {name: [speed] * 5 for name, speed in speeds.items()}
    for record in an_experiment(matrix_of(folder), of_all):
        ExperimentFolder(folder).keep_record(record)


def test_the_exit_code_is_0_only_when_all_cells_have_results(tmp_path: Path) -> None:
    code, said = run(tmp_path, "--batch=1,4")
    assert code == EXIT_PROMPTS
    assert "10 of 10 launches are missing" in said
    keep_all(tmp_path, {"batch_1": 10.0})
    assert run(tmp_path, "--batch=1,4")[0] == EXIT_PROMPTS
    assert run(tmp_path, "--batch=1,4", "--case=batch_1")[0] == EXIT_OK
    assert run(tmp_path, "--batch=1,4", "--case=batch_4")[0] == EXIT_PROMPTS
    assert not (tmp_path / "best.toml").exists()
    keep_all(tmp_path, {"batch_4": 30.0})
    code, said = run(tmp_path, "--batch=1,4")
    assert code == EXIT_OK
    assert "30.0 to 30.0" in said
    assert "still grows at batch 4" in said
    assert "max_sequences_per_slot = 4" in (tmp_path / "best.toml").read_text()


def test_the_table_has_no_speedup_beside_a_base_with_other_tokens(tmp_path: Path) -> None:
    run(tmp_path, "--batch=1,4")
    keep_all(tmp_path, {"batch_4": 27.5})
    of_base = an_experiment(matrix_of(tmp_path), {"batch_1": [10.0] * 5})
    odd = dataclasses.replace(of_base.pop(), tokens_hash="different")
    for record in of_base:
        ExperimentFolder(tmp_path).keep_record(record)
    ExperimentFolder(tmp_path).keep_record(odd)
    assert "2.75" not in run(tmp_path, "--batch=1,4")[1]
    (tmp_path / "records" / f"{odd.name}.json").unlink()
    ExperimentFolder(tmp_path).keep_record(dataclasses.replace(odd, tokens_hash="same"))
    assert "2.75" in run(tmp_path, "--batch=1,4")[1]


def test_the_verdict_as_json(tmp_path: Path) -> None:
    run(tmp_path, "--batch=4")
    keep_all(tmp_path, {"batch_4": 30.0})
    code, said = run(tmp_path, "--batch=4", "--json")
    verdict = json.loads(said)
    assert code == EXIT_OK
    assert verdict["num_missing"] == 0
    assert verdict["cases"][0]["speed"]["median"] == 30.0


def test_the_words_that_are_kept_make_the_same_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    run(tmp_path, "--seed=3", "--timeout=77.5", experiment="weak")
    kept = matrix_of(tmp_path)
    assert "--nodes=1,1" in kept.command  # so that a job on more nodes makes it, too
    result = CliRunner().invoke(app, [*kept.command[3:], "--table"])
    assert result.exit_code == EXIT_PROMPTS, result.output
    assert matrix_of(tmp_path) == kept


@pytest.mark.parametrize(("experiment", "expected"), [("weak", True), ("batch", False)])
def test_cases_of_unlike_stages_on_a_node_get_equal_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str, expected: bool
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        "mpipipe.cli.experiments.choose_launcher",
        lambda *_, equal_cores: asked.append(equal_cores),
    )
    monkeypatch.setattr("mpipipe.cli.experiments.run_experiment", lambda *_: None)
    command = ["bench", experiment, SHAPE, *WORDS, f"--out={tmp_path}", "--nodes=1"]
    assert CliRunner().invoke(app, command).exit_code == EXIT_PROMPTS
    assert asked == [expected]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_experiment_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def told_to_stop(*_: object) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("it goes on")

    before = signal.signal(number, lambda *_: None)  # so that a fault does not end the tests
    monkeypatch.setattr("mpipipe.cli.experiments.choose_launcher", lambda *_, **__: None)
    monkeypatch.setattr("mpipipe.cli.experiments.run_experiment", told_to_stop)
    try:
        command = ["bench", "batch", SHAPE, *WORDS, f"--out={tmp_path}", "--batch=1"]
        result = CliRunner().invoke(app, command)
    finally:
        signal.signal(number, before)
    assert isinstance(result.exception, StoppedError), result.exception


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--ranks=2",), "--ranks: the batch experiment takes --stages, --replicas and --tensor"),
        (("--batch=1,x",), "--batch 1,x: give whole numbers from 1"),
        (("--stages=0",), "--stages 0: give whole numbers from 1"),
        (("--nodes=1,2",), "--nodes has 2 numbers and --stages 1"),
        (("--case=batch_3",), "the cases are batch_1, batch_2, batch_4"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(
    tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        run(tmp_path, *words)
