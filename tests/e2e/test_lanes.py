"""Ranks that share a stage: the same completions as one rank, from a part of the weights each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.conftest import Outcome, run

LANES = "pipeline.tensor_parallel=2"


def tokens_of(outcome: Outcome) -> dict[str, list[int]]:
    assert outcome.exit_code == 0, outcome.stderr
    return {record["id"]: record["token_ids"] for record in outcome.completions()}


def ranks_of(outcome: Outcome) -> list[dict[str, Any]]:
    ranks: list[dict[str, Any]] = outcome.json("metrics.json")["ranks"]
    return ranks


def test_two_lanes_of_one_stage(tiny_config: Path, tiny_alone: Outcome, tmp_path: Path) -> None:
    outcome = run(2, tiny_config, tmp_path / "run", LANES)
    assert tokens_of(outcome) == tokens_of(tiny_alone)
    (stage,) = outcome.json("manifest.json")["plan"]["stages"]
    assert stage["lane_ranks"] == [0, 1]
    assert "ranks 0, 1 on" in outcome.stderr + outcome.stdout
    ranks, (alone,) = ranks_of(outcome), ranks_of(tiny_alone)
    assert [(rank["rank"], rank["stage"]["stage"]) for rank in ranks] == [(0, 0), (1, 0)]
    # The embedding and the norms are whole on both, the rest is halved: 366 KiB are 212.
    assert [rank["loaded_bytes"] for rank in ranks] == [ranks[0]["loaded_bytes"]] * 2
    assert ranks[0]["loaded_bytes"] < 0.6 * alone["loaded_bytes"]
    assert [2 * rank["kv_bytes"] for rank in ranks] == [alone["kv_bytes"]] * 2
    assert ranks[0]["stage"]["num_steps"] == ranks[1]["stage"]["num_steps"]


def test_two_stages_of_two_lanes_draw_the_same_tokens(tiny_config: Path, tmp_path: Path) -> None:
    words = ["generation.temperature=0.9", "generation.seed=5", "generation.num_logprobs=1"]
    alone = run(0, tiny_config, tmp_path / "alone", *words)
    outcome = run(4, tiny_config, tmp_path / "run", LANES, *words)
    assert tokens_of(outcome) == tokens_of(alone)
    both = (alone.completions(), outcome.completions())
    for expected, record in zip(*both, strict=True):
        pairs = zip(expected["logprobs"], record["logprobs"], strict=True)
        assert all(abs(a["logprob"] - b["logprob"]) < 1e-3 for a, b in pairs)
    stages = [rank["stage"]["stage"] for rank in ranks_of(outcome)]
    assert stages == [0, 0, 1, 1]


def test_lanes_that_do_not_fit_the_model_are_refused(tiny_config: Path, tmp_path: Path) -> None:
    outcome = run(3, tiny_config, tmp_path / "run", "pipeline.tensor_parallel=3")
    assert outcome.exit_code == 2
    assert "does not divide the model's 4 attention heads: set it to 1 or 2" in outcome.stderr
