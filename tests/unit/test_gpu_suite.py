"""The GPU benchmarks as parts to run, and the table of what they left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpipipe.bench import gpu_suite
from mpipipe.bench.gpu_suite import Part, Result, SuiteOptions, all_parts, run_part, table_lines
from mpipipe.bench.workloads import BenchWork

STAGE = {
    "gpu_peak_bytes": 3 << 30,
    "peak_rss_bytes": 1 << 30,
    "bubble": 0.1,
    "steady_bubble": 0.02,
    "cpu_us_per_step": 100.0,
    "head_us_per_step": None,
}


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SuiteOptions:
    monkeypatch.setattr(
        gpu_suite, "mpirun_command", lambda num_ranks: ["mpirun", "-n", str(num_ranks)]
    )
    return SuiteOptions(tmp_path, tmp_path, overrides=("model.dtype=float32",))


def record(work: str, ranks: int, speed: float, **more: Any) -> dict[str, Any]:
    """A record of `bench throughput`, as far as the table reads it."""
    boot = {"first_token_s": 20.0, "greet_s": 1.0, "import_s": 5.0, "load_s": 9.0}
    return {
        "part": "pipeline_llama3_8b",
        "shape": "llama3_8b",
        "work": work,
        "ranks": ranks,
        "variant": "",
        "tokens_per_s": speed,
        "floor": None,
        "share_of_floor": None,
        "share_of_decode_floor": 0.5,
        "ms_per_round": 12.0,
        "stages": [STAGE] * ranks,
        "boot": {**boot, "capture_s": None},
        "devices": ["H100"] * ranks,
        "versions": {"torch": "2.13"},
        "date": "2026-11-27",
        **more,
    }


def test_every_part_has_its_ranks_its_model_and_the_overrides(options: SuiteOptions) -> None:
    parts = {part.name: part for part in all_parts(options)}
    assert list(parts)[:2] == ["pipeline_openllama_3b", "pipeline_llama3_8b"]
    assert list(parts)[-3:] == ["transformers_1", "transformers_2", "tests"]
    chunks = parts["chunks_openllama_3b"]
    assert chunks.command[:3] == ["mpirun", "-n", "2"]
    assert {"pipeline.prefill=mixed", "model.dtype=float32"} <= set(chunks.command)
    assert f"model.path={options.root}/configs/shapes/openllama_3b" in chunks.command
    assert chunks.labels["variant"] == "prefill=mixed"
    for name, quantize, ranks in (
        ("int8", "int8", "1"),
        ("fp8", "fp8", "1"),
        ("fp8_pipeline", "fp8", "2"),
    ):
        part = parts[f"{name}_llama3_8b"]
        assert f"model.quantize={quantize}" in part.command
        assert part.command[2] == ranks
        assert part.labels["variant"] == f"quantize={quantize}"  # not held against bf16's targets
    lanes = parts["lanes_llama3_8b"]
    assert (lanes.command[2], lanes.labels["variant"]) == ("2", "tensor_parallel=2")
    assert "pipeline.tensor_parallel=2" in lanes.command
    shared, apart = parts["prefix_llama3_8b"].command, parts["apart_llama3_8b"].command
    assert [word.replace("false", "true") for word in apart if "jsonl" not in word] == [
        word for word in shared if "jsonl" not in word
    ]
    assert "512x1024+128x128" in shared
    for part in parts.values():
        for at, word in enumerate(part.command):
            if word == "--work":
                BenchWork.parse(part.command[at + 1])  # a work that there is
    limited = parts["offload_32_rows"]
    assert limited.labels == {
        "shape": "openllama_7b",
        "ranks": 1,
        "variant": "device_bytes=11.5GiB",
    }
    assert "pipeline.max_sequences_per_slot=32" in limited.command
    assert "--trace" in parts["pipeline_openllama_3b"].command
    assert "--trace" not in parts["single_openllama_3b"].command


def test_a_part_that_fails_is_told_and_keeps_the_records_it_left(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    script = f"echo '{{\"work\": \"x\"}}' > {path}; echo '{{' >> {path}; echo why; exit 3"
    part = Part("a", ["bash", "-c", script], 30.0, path, {"shape": "s"})
    with (tmp_path / "log.txt").open("w") as log:
        result = run_part(part, tmp_path, 30.0, log)
    assert (result.problem, result.last_lines) == ("exit code 3", ["why"])
    assert result.records == [{"part": "a", "shape": "s", "work": "x"}]
    assert not path.exists()


def test_the_table_holds_ours_beside_target_rival_and_scaling(options: SuiteOptions) -> None:
    ours = [record("64x512x128", 1, 3000.0), record("128x512x128", 2, 5700.0)]
    ours += [record("64x512x128", 2, 7000.0)]
    peer = {"peer": "transformers", "shape": "llama3_8b", "work": "64x512x128", "ranks": "1"}
    records = [*ours, {**peer, "tokens_per_s": 40.0}]
    result = Result(all_parts(options)[0], 12.0, "exit code 1", records, [])
    lines = table_lines([result], 12.0)
    row = next(line for line in lines if "| **7,000** |" in line)
    assert "| 6,800 | 5,478 |" in row  # the target, vLLM on two GPUs
    assert "| 40 | - |" in row  # transformers on one GPU; not measured over two
    assert "| 10%/10% | 2.0%/2.0% | 100/100 | 3.0/3.0 |" in row
    assert any("decode 1.000, whole job 0.950" in line for line in lines)
    assert any("| pipeline_openllama_3b | 12 | exit code 1 |" in line for line in lines)
