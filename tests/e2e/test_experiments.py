"""One small experiment as a user runs it: launches, records, going on, and the best batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mpipipe.config.load import load_config
from mpipipe.errors import EXIT_CONFIG, EXIT_OK, EXIT_PROMPTS
from mpipipe.experiments.folder import ExperimentFolder
from tests.e2e.conftest import Outcome, execute

CASES = ("batch_2", "batch_4")


def bench(config: Path, folder: Path, *words: str) -> Outcome:
    """The batch experiment on two stages: three launches."""
    command = [sys.executable, "-m", "mpipipe", "bench", "batch", str(config)]
    options = ["--stages=2", "--batch=2,4", "--repeat=1", "--prompts=4", "--prompt-tokens=16"]
    return execute([*command, *options, f"--out={folder}", *words], folder)


def test_a_batch_experiment_from_launches_to_the_best_configuration(
    tiny_config: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "batch"
    first = bench(tiny_config, folder, "generation.max_new_tokens=8")
    assert first.exit_code == EXIT_OK, first.stdout + first.stderr
    assert "2 of 2 launches are missing" in first.stdout
    assert "warm-up, not measured" in first.stdout
    records = ExperimentFolder(folder).records()
    assert [record.order for record in records] == [0, 1]
    assert {record.case.name for record in records} == set(CASES)
    for record in records:
        assert (record.outcome, record.num_places, len(record.hosts)) == (
            "ok",
            record.case.batch,
            2,
        )
        assert record.metrics is not None
        assert record.metrics["requests"]["num_output_tokens"] == 4 * 8
        assert record.metrics["requests"]["num_prompt_tokens"] == 4 * 16
        assert record.ceiling is not None
        assert record.command[-1] == "output.resume=false"
    # Greedy in float32: neither the batch nor chance decides the tokens.
    assert len({record.tokens_hash for record in records}) == 1

    best = load_config(folder / "best.toml").config
    assert best.pipeline.num_stages == best.pipeline.num_slots == 2
    assert best.pipeline.max_sequences_per_slot in {1, 2}
    assert (best.model.path, best.generation.max_new_tokens) == (str(tiny_model), 8)

    before = {path.name: path.read_bytes() for path in (folder / "records").iterdir()}
    again = bench(tiny_config, folder, "generation.max_new_tokens=8", "--json")
    assert again.exit_code == EXIT_OK, again.stderr
    assert "0 of 2 launches are missing" in again.stderr
    verdict = json.loads(again.stdout)
    assert [case["case"]["name"] for case in verdict["cases"]] == list(CASES)
    assert verdict["largest_safe_batch"] == 4
    assert {path.name: path.read_bytes() for path in (folder / "records").iterdir()} == before

    changed = bench(tiny_config, folder, "generation.max_new_tokens=9")
    assert changed.exit_code == EXIT_CONFIG
    assert "generation.max_new_tokens: 8 → 9" in changed.stderr

    (folder / "records" / "batch_2_r1.json").unlink()
    missing = bench(tiny_config, folder, "generation.max_new_tokens=8", "--table")
    assert missing.exit_code == EXIT_PROMPTS
    assert "1 of 2 launches are missing" in missing.stdout


def test_replicas_are_refused_in_a_sentence(tiny_config: Path, tmp_path: Path) -> None:
    refused = bench(tiny_config, tmp_path, "--replicas=2")
    assert refused.exit_code == EXIT_CONFIG
    assert "runs of one pipeline each" in refused.stderr
