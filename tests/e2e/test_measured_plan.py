"""`plan --measure` on two ranks, a run that goes by it, and a plan that learns from that run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.conftest import execute, mpipipe


def test_what_was_measured_is_used_compared_and_learnt_from(
    tiny_config: Path, tmp_path: Path
) -> None:
    cache, folder = str(tmp_path / "cache"), tmp_path / "run"
    words = ["plan", "--measure", str(tiny_config)]
    measured = execute(mpipipe(2, *words), folder, MPIPIPE_CACHE=cache)
    assert measured.exit_code == 0, measured.stderr
    (path,) = (tmp_path / "cache" / "profiles").iterdir()
    assert path.name in measured.stdout.replace("\n", "")
    profile = json.loads(path.read_text())
    assert profile["key"]["ranks_per_host"] == 2
    assert {hop["crosses_hosts"] for hop in profile["hops"]} == {False}
    assert min(hop["seconds"] for hop in profile["hops"]) > 0
    assert min(profile["start_s"], profile["load_bytes_per_s"]) > 0
    assert max(point["seconds"] for point in profile["decode"]["layer"]) > 0

    words = ["run", str(tiny_config), f"output.dir={folder}"]
    outcome = execute(mpipipe(2, *words), folder, MPIPIPE_CACHE=cache)
    assert outcome.exit_code == 0, outcome.stderr
    plan = outcome.json("manifest.json")["plan"]
    (note,) = (note for note in plan["resolved"] if note["setting"] == "forecast.times")
    assert note["reason"] == str(path)
    metrics = outcome.json("metrics.json")
    assert metrics["predicted"]["source"] == note["value"]
    assert metrics["predicted"]["num_output_tokens"] == metrics["requests"]["num_output_tokens"]
    named = {"tokens_per_s", "wall_s", "generate_s", "start_s", "load_s", "memory_bytes_0"}
    assert named | {"decode_step_s_1"} <= set(metrics["compared"])
    (line,) = (line for line in outcome.stdout.splitlines() if line.startswith("predicted "))
    assert f"measured {metrics['output_tokens_per_s']:,.1f} tokens/s" in line

    words = ["plan", str(tiny_config), "--stages", "2", "--from", str(folder), "--json"]
    learnt = execute(mpipipe(0, *words), folder, MPIPIPE_CACHE=cache)
    assert learnt.exit_code == 0, learnt.stderr
    forecast = json.loads(learnt.stdout)["forecast"]
    assert forecast["source"].startswith(f"{note['value']}; by the run run")
    assert forecast["startup_s"] == (metrics["compared"]["start_s"]["measured"]), (
        "the start of that run"
    )
