"""`mpipipe bench throughput` and `bench transformers` on real ranks of a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import ROOT, Outcome, execute, mpipipe


def bench(num_ranks: int, config: Path, *words: str) -> Outcome:
    return execute(mpipipe(num_ranks, "bench", "throughput", str(config), *words), ROOT)


def records(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.stdout.splitlines() if line.startswith("{")]


@pytest.fixture
def random_config(tiny_model: Path, tmp_path: Path) -> Path:
    """A model without weight files and tokenizer."""
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    config = tmp_path / "random.toml"
    config.write_text(f'model.path = "{folder}"\nmodel.weights = "random"\n')
    return config


@pytest.mark.parametrize(
    ("num_ranks", "which", "weights"),
    [(0, "random_config", "random"), (2, "tiny_config", "checkpoint")],
)
def test_throughput_prints_a_table_and_a_json_line_per_work(
    num_ranks: int, which: str, weights: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = tmp_path / "records.jsonl"
    words = ["--work", "6x16x8", "--work", "1x20x12", "--json", str(path)]
    outcome = bench(num_ranks, request.getfixturevalue(which), *words)
    assert outcome.exit_code == 0, outcome.stderr
    found = records(outcome)
    assert {record["plan"]["weights"] for record in found} == {weights}
    assert [json.loads(line) for line in path.read_text().splitlines()] == found
    assert outcome.stdout.splitlines()[-2:] == path.read_text().splitlines()
    assert [record["work"] for record in found] == ["6x16x8", "1x20x12"]
    assert [record["num_output_tokens"] for record in found] == [48, 12]
    assert [record["num_prompt_tokens"] for record in found] == [96, 20]
    for record in found:
        elapsed_s = record["elapsed_s"]
        assert record["tokens_per_s"] == pytest.approx(record["num_output_tokens"] / elapsed_s)
        assert record["prefill_s"] + record["decode_s"] == pytest.approx(elapsed_s)
        assert 0 < record["share_of_floor"] < 1
        assert len(record["stages"]) == max(1, num_ranks)
        # The last step of a sequence makes its last token: 12 tokens are 12 steps of one row.
        assert record["boot"]["first_token_s"] > record["boot"]["load_s"] > 0
        assert "--work 6x16x8" in record["command"]
    assert [stage["num_steps"] for stage in found[1]["stages"]] == [12] * max(1, num_ranks)
    assert "of floor" in outcome.stdout


def test_latency_of_one_batch_and_a_trace_of_all_stages(tiny_config: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    words = ["--latency", "--prompts", "4", "--input", "10", "--output", "20", "--repeat", "2"]
    outcome = bench(2, tiny_config, *words, "--trace", str(path), "--trace-steps", "5")
    assert outcome.exit_code == 0, outcome.stderr
    found = records(outcome)
    assert [record["mode"] for record in found] == ["latency", "latency"]
    assert all(record["ms_per_token_p50"] > 0 < record["ttft_p50_s"] for record in found)
    events = json.loads(path.read_text())["traceEvents"]
    computed = [event for event in events if event.get("cat") == "compute"]
    assert sorted({event["pid"] for event in computed}) == [0, 1]
    for rank in (0, 1):
        mine = [event for event in computed if event["pid"] == rank]
        assert len(mine) == 5
        assert all(event["args"]["rows"] == 2 for event in mine)  # 4 prompts in 2 slots


def test_a_batch_that_cannot_run_at_once_has_no_latency(tiny_config: Path) -> None:
    outcome = bench(
        0, tiny_config, "--latency", "--work", "9x4x4", "pipeline.max_sequences_per_slot=8"
    )
    assert outcome.exit_code == 2
    assert "9x4x4 has more prompts than the 8" in outcome.stderr


def test_a_work_longer_than_the_model_goes_is_told_before_loading(tiny_config: Path) -> None:
    outcome = bench(2, tiny_config, "--work", "1x100x100")
    assert outcome.exit_code == 2
    assert "200 tokens" in outcome.stderr
    assert outcome.stderr.count("mpipipe: error") == 1


def test_transformers_is_timed_on_random_weights_too(random_config: Path) -> None:
    words = ["bench", "transformers", str(random_config), "--work", "3x8x4"]
    peer = execute(mpipipe(0, *words), ROOT)
    assert peer.exit_code == 0, peer.stderr
    (record,) = records(peer)
    assert record["tokens_per_s"] == pytest.approx(12 / record["elapsed_s"])


def test_the_suite_reads_what_a_whole_run_leaves(random_config: Path, tmp_path: Path) -> None:
    shape, out = random_config.parent / "shape", tmp_path / "out"
    script = [sys.executable, str(ROOT / "launch" / "bench_gpu.py")]
    words = ["--quick", "--only", "file_run", "--out", str(out), "--device", "cpu"]
    words += ["pipeline.device=cpu", "model.dtype=float32", f"model.path={shape}"]
    outcome = execute([*script, *words], ROOT, PYTHONPATH=str(ROOT))
    assert outcome.exit_code == 0, outcome.stdout
    (record,) = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert (record["work"], record["devices"]) == ("4x16x8", ["cpu", "cpu"])
    assert sum(record["start"].values()) == pytest.approx(record["first_token_s"], abs=1e-5)
    assert record["first_token_s"] > 0
    assert record["first_token_s"] < record["phases"]["wall_s"] < record["command_s"]
    assert record["predicted"]["tokens_per_s"] > 0
    assert sum(record["plan"]["split"]) == 4
    assert "| openllama_3b | 4x16x8 | 2 |" in (out / "table.md").read_text()
    compared = execute([*script, "--compare", str(out), str(out)], ROOT, PYTHONPATH=str(ROOT))
    assert "| openllama_3b | 4x16x8 of a file | 2 |" in compared.stdout
    assert "| +0.0% |" in compared.stdout


def test_a_wrong_device_is_one_sentence(tiny_config: Path) -> None:
    words = ["bench", "transformers", str(tiny_config), "--device", "tpu", "--work", "1x4x4"]
    outcome = execute(mpipipe(0, *words), ROOT)
    assert outcome.exit_code == 2
    assert outcome.stderr.strip() == "mpipipe: error: --device tpu is not known: use cpu or cuda"
