"""Stages that are not in the order of ranks: what a cyclic distribution over hosts gives."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.conftest import ROOT, Outcome, execute, mpiexec
from tests.e2e.warm_server import warm_python

DEALT = Path(__file__).with_name("dealt_rank.py")


def test_ranks_dealt_round_two_hosts_give_the_same_tokens(
    tiny_config: Path, tiny_alone: Outcome, tmp_path: Path
) -> None:
    """With lookahead; without it, on two real nodes: `cyclic` of tests/slurm."""
    command = [*mpiexec(4), *warm_python(), str(DEALT), "run", str(tiny_config)]
    words = [f"output.dir={tmp_path / 'run'}", "pipeline.lookahead=1"]
    dealt = execute([*command, *words], tmp_path / "run", PYTHONPATH=str(ROOT))
    assert dealt.exit_code == 0, dealt.stderr
    assert tokens(dealt) == tokens(tiny_alone)
    plan = dealt.json("manifest.json")["plan"]
    assert [(stage["rank"], stage["host"]) for stage in plan["stages"]] == [
        (0, "node0"),
        (2, "node0"),
        (1, "node1"),
        (3, "node1"),
    ]
    assert [rank["rank"] for rank in dealt.json("metrics.json")["ranks"]] == [0, 2, 1, 3]
    first_line = (dealt.folder / "rank_1.log").read_text().splitlines()[0]
    assert json.loads(first_line)["stage"] == 2


def tokens(outcome: Outcome) -> dict[str, list[int]]:
    found = {line["id"]: line["token_ids"] for line in outcome.completions()}
    assert len(found) == 3
    return found
