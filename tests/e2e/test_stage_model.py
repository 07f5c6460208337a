"""`mpipipe stage-model`: killed, stopped and gone on with; from a hub; then a run from the copy."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from mpipipe.checkpoint.staged import MANIFEST_NAME, UNFINISHED_NAME
from mpipipe.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_ENVIRONMENT, EXIT_OK, EXIT_REQUEUE
from tests.e2e.conftest import Outcome, execute, mpipipe, run
from tests.e2e.fake_hub import COMMIT, fake_hub

KILLED = Path(__file__).with_name("killed_staging.py")
SHARDS = "--shard-size=60MB"


def call(*words: str, **environment: str) -> Outcome:
    return execute(mpipipe(0, *words), Path(words[-1]), **environment)


def killed(number: str, file: int, *words: str) -> Outcome:
    return execute([sys.executable, str(KILLED), number, str(file), *words], Path())


def test_a_copy_that_was_killed_and_stopped_goes_on_and_runs(
    demo_model: Path, tmp_path: Path
) -> None:
    staged = tmp_path / "staged"
    words = ("stage-model", str(demo_model), str(staged), SHARDS)

    outcome = killed("SIGKILL", 7, *words)
    assert outcome.exit_code == -9, outcome.stderr
    assert (staged / UNFINISHED_NAME).exists()
    (half_written,) = staged.glob("*.partial")
    first = {path.name: path.stat().st_mtime_ns for path in staged.glob("model-*.safetensors")}
    assert len(first) == 1

    outcome = call("run", str(staged))
    assert outcome.exit_code == EXIT_CHECKPOINT
    assert "is not finished (6 of " in outcome.stderr
    assert " ".join(words) in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1

    outcome = killed("SIGTERM", 2, *words)
    assert outcome.exit_code == EXIT_REQUEUE, outcome.stderr
    assert "stopped (SIGTERM): what is complete is kept" in outcome.stderr
    assert not half_written.exists()

    outcome = call(*words)
    assert outcome.exit_code == EXIT_OK, outcome.stderr
    assert "7 of them kept" in outcome.stdout
    assert (
        first.items() <= {path.name: path.stat().st_mtime_ns for path in staged.iterdir()}.items()
    )
    assert not (staged / UNFINISHED_NAME).exists()
    found: dict[str, torch.Tensor] = {}
    for path in staged.glob("*.safetensors"):
        found |= load_file(path)
    wanted = load_file(demo_model / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    outcome = call(*words)
    assert outcome.exit_code == EXIT_OK
    assert "nothing to do" in outcome.stdout
    assert call("stage-model", "--verify", str(staged)).exit_code == EXIT_OK

    outcome = run(
        0,
        "configs/demo.toml",
        tmp_path / "run",
        f"model.path={staged}",
        "prompts.limit=2",
        "generation.max_new_tokens=4",
    )
    assert outcome.exit_code == EXIT_OK, outcome.stderr
    assert len(outcome.completions()) == 2


def test_a_model_comes_from_a_hub_and_is_compared_with_its_hashes(
    tiny_model: Path, tmp_path: Path
) -> None:
    staged = tmp_path / "staged"
    with fake_hub(tiny_model) as hub:
        online = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        words = ("stage-model", "hf:some-org/some-model", str(staged))
        hub.damaged = {"model.safetensors"}
        outcome = call(*words, **online)
        assert outcome.exit_code == EXIT_CHECKPOINT, outcome.stderr
        assert "the hub says" in outcome.stderr
        assert not (staged / "model.safetensors").exists()

        hub.damaged, hub.broken_off = set(), {"model.safetensors": 1000}
        outcome = call(*words, **online)
        assert outcome.exit_code == EXIT_OK, outcome.stderr
        assert hub.fetched.count("model.safetensors") == 3  # the rest came with the third
        for path in tiny_model.iterdir():
            assert (staged / path.name).read_bytes() == path.read_bytes(), path.name
        names = {path.name for path in tiny_model.iterdir()}
        assert {path.name for path in staged.iterdir()} == {*names, MANIFEST_NAME}
        assert COMMIT in (staged / MANIFEST_NAME).read_text()

        fetched = len(hub.fetched)
        at_commit = call("stage-model", f"{words[1]}@{COMMIT}", str(staged), HF_HUB_OFFLINE="1")
        assert at_commit.exit_code == EXIT_OK, at_commit.stderr
        assert "nothing to do" in at_commit.stdout
        again = call(*words, **online)
        assert again.exit_code == EXIT_OK, again.stderr
        assert "nothing to do" in again.stdout
        assert {path.name for path in staged.iterdir()} == {*names, MANIFEST_NAME}
        assert len(hub.fetched) == fetched

        wrong = call("stage-model", "hf:some-org/other", str(tmp_path / "other"), **online)
        assert wrong.exit_code == EXIT_CHECKPOINT
        assert "the hub has no hf:some-org/other" in wrong.stderr
        assert not (tmp_path / "other").exists()
    offline = call("stage-model", words[1], str(tmp_path / "other"), HF_HUB_OFFLINE="1")
    assert offline.exit_code == EXIT_ENVIRONMENT
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    for outcome in (wrong, offline):
        assert len(outcome.stderr.strip().splitlines()) == 1, outcome.stderr


def test_wrong_words_are_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    for words, expected in (
        (("--dtype=int4",), "--dtype int4"),
        (("--shard-size=5XB",), '--shard-size "5XB" has the unit "XB"'),
    ):
        outcome = call("stage-model", *words, str(tiny_model), str(tmp_path / "staged"))
        assert outcome.exit_code == EXIT_CONFIG
        assert expected in outcome.stderr
    assert not (tmp_path / "staged").exists()
