"""Bad input: one sentence with cause and remedy, the documented exit code, no rank left hanging."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import BESIDE, Outcome, execute, mpipipe, run


def assert_one_sentence(outcome: Outcome, exit_code: int, *words: str) -> None:
    """One line on standard error that has all `words`, no traceback, the exit code."""
    assert outcome.exit_code == exit_code, outcome.stderr
    assert "Traceback" not in outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("mpipipe: error:")]
    assert len(lines) == 1, outcome.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    ("num_ranks", "words", "exit_code", "expected"),
    [
        (0, ["model.path=/no/such/model"], 3, ["/no/such/model"]),
        (2, ["model.path=/no/such/model"], 3, ["/no/such/model"]),
        (0, ["model.path=some-org/some-model"], 3, ["some-org/some-model", "downloaded"]),
        (0, ["model.pth=x"], 2, ["model.pth", "model.path"]),
        (3, ["model.pth=x"], 2, ["model.pth", "model.path"]),
        (0, ["generation.temperature=-1"], 2, ["temperature", "-1"]),
        (2, ["pipeline.split=3,2"], 2, ["split"]),
        (0, ["pipeline.num_stages=3"], 5, ["pipeline.num_stages", "3"]),
        (0, ["prompts.path=/no/such/file.jsonl"], 2, ["/no/such/file.jsonl"]),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    num_ranks: int,
    words: list[str],
    exit_code: int,
    expected: list[str],
    tiny_config: Path,
    tmp_path: Path,
) -> None:
    outcome = run(num_ranks, tiny_config, tmp_path / "run", *words)
    assert_one_sentence(outcome, exit_code, *expected)


def test_debug_shows_the_traceback(tiny_config: Path, tmp_path: Path) -> None:
    outcome = run(0, tiny_config, tmp_path / "run", "model.path=/no/such/model", "--debug")
    assert "Traceback" in outcome.stderr


def damage_truncate(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])


def damage_index(folder: Path) -> None:
    listing = {
        "metadata": {},
        "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"},
    }
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))


def damage_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def damage_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))


@pytest.mark.parametrize(
    ("num_ranks", "damage", "expected"),
    [
        (2, damage_truncate, ["model.safetensors"]),
        (2, damage_index, ["model-00002-of-00002.safetensors"]),
        (0, damage_tokenizer, ["tokenizer"]),
        (2, damage_family, ["t5"]),
    ],
)
def test_a_half_copied_or_foreign_model_is_one_sentence(
    num_ranks: int,
    damage: Callable[[Path], None],
    expected: list[str],
    tiny_model: Path,
    tiny_config: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    outcome = run(num_ranks, tiny_config, tmp_path / "run", f"model.path={folder}")
    assert_one_sentence(outcome, 3, *expected)


def test_the_folder_of_another_run_is_refused_and_left_alone(
    tiny_config: Path, tiny_alone: Outcome, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_alone.folder, folder)
    before = (folder / "completions.jsonl").read_text()
    assert_one_sentence(run(2, tiny_config, folder), 2, str(folder), "output.overwrite")
    assert (folder / "completions.jsonl").read_text() == before


def test_only_some_ranks_started_ends_with_a_sentence(tiny_config: Path, tmp_path: Path) -> None:
    """One of the two launched processes never joins: the launch must not hang."""
    words = ["run", str(tiny_config), f"output.dir={tmp_path / 'run'}"]
    outcome = execute(
        [*mpipipe(1, *words), ":", "-n", "1", sys.executable, "-c", "import time; time.sleep(60)"],
        tmp_path / "run",
        MPIPIPE_INIT_TIMEOUT_S="3",
    )
    assert outcome.exit_code != 0
    assert "mpipipe" in outcome.stderr
    assert "ranks" in outcome.stderr


def test_ranks_with_different_settings_are_told_apart(tiny_config: Path, tmp_path: Path) -> None:
    one = mpipipe(1, "run", str(tiny_config), "generation.seed=1")
    two = mpipipe(0, "run", str(tiny_config), "generation.seed=2")
    outcome = execute([*one, ":", "-n", "1", *two], tmp_path / "run")
    assert_one_sentence(outcome, 5, "configuration")


def test_the_command_is_installed() -> None:
    outcome = execute([str(BESIDE / "mpipipe"), "--help"], Path())
    assert outcome.exit_code == 0
    assert "Exit codes" in outcome.stdout
