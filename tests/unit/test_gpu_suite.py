"""The GPU benchmarks as parts to run, and the table of what they left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpipipe.bench import gpu_parts
from mpipipe.bench.gpu_parts import all_parts
from mpipipe.bench.gpu_suite import Part, Result, SuiteOptions, run_part
from mpipipe.bench.gpu_suite_table import compare_lines, table_lines
from mpipipe.bench.whole_run import KernelCache, WholeRun
from mpipipe.bench.workloads import BenchWork, bench_requests
from mpipipe.checkpoint.vocabulary import Vocabulary
from mpipipe.config.load import load_config
from mpipipe.config.prompts import configured_prompts
from mpipipe.errors import ConfigError, OutputError
from mpipipe.planning.model_facts import read_model

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
        gpu_parts, "mpirun_command", lambda num_ranks: ["mpirun", "-n", str(num_ranks)]
    )
    return SuiteOptions(
        tmp_path, tmp_path, tmp_path / "scratch", overrides=("model.dtype=float32",)
    )


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
    assert list(parts)[-2:] == ["tests_cold", "tests_warm"]
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
    each = parts["prefix_each_llama3_8b"].command
    assert {"memory.read_prefixes_once=false", "512x1024+128x128"} <= set(each)
    for part in parts.values():
        for at, word in enumerate(part.command):
            if word == "--work":
                BenchWork.parse(part.command[at + 1])  # a work that there is
    # The start with a warm kernel cache is the one with a cold cache again, behind it.
    names = list(parts)
    assert names.index("boot_warm_openllama_3b") == names.index("boot_cold_openllama_3b") + 1
    cold, warm = parts["boot_cold_openllama_3b"], parts["boot_warm_openllama_3b"]
    assert [word.replace("_warm_", "_cold_") for word in warm.command] == cold.command
    assert cold.whole_run is not None
    assert warm.whole_run is not None
    assert warm.whole_run.environ == cold.whole_run.environ
    assert warm.whole_run.environ["TRITON_CACHE_DIR"].startswith(str(options.scratch))
    # A file of prompts is the work of its bench, with the same settings.
    whole, bench = parts["file_run_openllama_3b"], parts["file_bench_openllama_3b"]
    assert whole.whole_run is not None
    assert bench.command[bench.command.index("--work") + 1] == whole.whole_run.work
    assert whole.labels == bench.labels
    assert not whole.whole_run.environ
    for part in (cold, whole):
        assert part.command[:3] == ["mpirun", "-n", "2"]
        assert "model.dtype=float32" in part.command
        assert f"output.dir={options.scratch / part.name}" in part.command
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


@pytest.mark.parametrize(("labels", "works"), [({}, []), ({"shape": "s"}, ["x"])])
def test_a_line_of_a_log_is_no_record(
    tmp_path: Path, labels: dict[str, Any], works: list[str]
) -> None:
    script = """echo '{"event": "e"}'; echo '{"work": "x"}'"""
    part = Part("tests", ["bash", "-c", script], 30.0, labels=labels)
    with (tmp_path / "log.txt").open("w") as log:
        result = run_part(part, tmp_path, 30.0, log)
    assert [record["work"] for record in result.records] == works


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


# ---- whole runs ----------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ROOT / "configs" / "shapes" / "smollm2_135m"


@pytest.fixture
def whole_run(tmp_path: Path) -> WholeRun:
    # What the tree has comes first: libraries that take no time.
    (tmp_path / "torch.py").write_text("print(file=open('imported', 'a'))")
    (tmp_path / "transformers.py").touch()
    settings = (f"model.path={SHAPE}", "pipeline.device=cpu")
    config = ROOT / "configs" / "bench_gpu.toml"
    return WholeRun("3x5x2", config, settings, tmp_path / "boot", "cold")


def ended(run: WholeRun, ids: Sequence[str] = ("0", "1", "2"), num_tokens: int = 2) -> None:
    """The files of a run that has made `num_tokens` of each prompt."""
    run.folder.mkdir()
    metrics = {
        "output_tokens_per_s": 12.0,
        "phases": {
            "boot_s": 3.0, "load_s": 2.0, "generate_s": 0.5, "shutdown_s": 0.25, "wall_s": 5.75
        },
        "requests": {"ttft_min_s": 0.125, "ttft_p50_s": 0.2},
        "start": {"imports": 3.0, "read weights": 2.0, "first step": 0.125},
        "predicted": {"tokens_per_s": 13.0, "start_s": 6.0, "generate_s": 0.4, "wall_s": 6.4},
    }  # fmt: skip
    stages = [{"first_layer": 0, "last_layer": 16}, {"first_layer": 16, "last_layer": 30}]
    manifest = {
        "plan": {"stages": stages},
        "hashes": {"plan": "p"},
        "versions": {"torch": "2.13"},
        "started": "2026-11-27",
    }
    handshake = {"event": "handshake", "resources": [{"gpu": {"name": "H100"}}, {"gpu": None}]}
    lines = [{"id": prompt_id, "num_output_tokens": num_tokens} for prompt_id in ids]
    for name, content in (
        ("metrics.json", [metrics]),
        ("manifest.json", [manifest]),
        ("rank_0.log", [{"event": "boot"}, handshake]),
        ("completions.jsonl", lines),
    ):
        (run.folder / name).write_text("".join(json.dumps(line) + "\n" for line in content))


def test_a_whole_run_reads_the_prompts_of_the_bench(whole_run: WholeRun) -> None:
    kernels = Path(whole_run.environ["TRITON_CACHE_DIR"])
    for folder in (kernels, whole_run.folder):
        folder.mkdir()
        (folder / "old").touch()
    whole_run.prepare()
    assert not list(kernels.iterdir())
    assert not whole_run.folder.exists()
    path = next(word.partition("=")[2] for word in whole_run.words if word.startswith("prompts."))
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    facts = read_model(load_config(whole_run.config, whole_run.settings))
    asked = bench_requests(BenchWork.parse("3x5x2"), Vocabulary.of(facts.folder, facts.spec), 0)
    assert [tuple(line["prompt"]) for line in lines] == [request.prompt_ids for request in asked]
    assert {line["max_new_tokens"] for line in lines} == {2}
    # As the run reads them: no line is an error, nothing ends at an end-of-sequence token.
    read = configured_prompts(load_config(whole_run.config, whole_run.words[2:]))
    assert [line.token_ids for line in read] == [request.prompt_ids for request in asked]
    assert all(line.sampling is not None and line.sampling.ignore_eos for line in read)


def test_a_warm_start_finds_what_the_cold_one_left(whole_run: WholeRun) -> None:
    warm = replace(whole_run, kernels="warm", folder=whole_run.folder.with_name("again"))
    kernels = Path(whole_run.environ["TRITON_CACHE_DIR"])
    assert Path(warm.environ["TRITON_CACHE_DIR"]) == kernels
    with pytest.raises(ConfigError, match="so the kernel cache would be cold"):
        warm.prepare()
    whole_run.prepare()
    (kernels / "kernel").touch()
    warm.prepare()
    ended(warm)
    assert warm.record(9.0)["num_cached_kernels"] == 1


def test_the_record_of_a_whole_run_has_its_times_and_its_prediction(whole_run: WholeRun) -> None:
    whole_run.prepare()
    ended(whole_run)
    record = whole_run.record(7.0)
    assert record["first_token_s"] == 5.125
    assert record["first_token_s"] == sum(record["start"].values())
    assert record["merged_per_s"] == 4.0
    assert record["predicted"] == {"tokens_per_s": 13.0, "start_s": 6.0, "generate_s": 0.4}
    assert (record["devices"], record["plan"]["split"]) == (["H100", "cpu"], [16, 14])
    assert record["num_cached_kernels"] == 0
    assert record["first_token_of"] == "first prompt"


def test_a_start_that_tells_only_the_median_prompt_says_so(
    whole_run: WholeRun, options: SuiteOptions
) -> None:
    whole_run.prepare()
    ended(whole_run)
    path = whole_run.folder / "metrics.json"
    path.write_text(path.read_text().replace("ttft_min_s", "ttft_first_s"))
    labels = {"part": "boot", "shape": "openllama_3b", "ranks": 2, "variant": ""}
    record = {**labels, **whole_run.record(7.0)}
    assert record["first_token_s"] == pytest.approx(5.2)
    lines = table_lines([Result(all_parts(options)[0], 12.0, "", [record], [])], 12.0)
    assert any("| cold | 2 | **5.2** (median prompt's) | 15 |" in line for line in lines)
    lines = compare_lines([record], [{**record, "first_token_of": "first prompt"}])
    assert sum("kernel cache" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("ids", "num_tokens"),
    [(("0", "1"), 2), (("0", "2", "1"), 2), (("0", "1", "2"), 1), (("0", "1", "2", "3"), 2)],
)
def test_a_run_that_lacks_a_completion_is_no_measurement(
    whole_run: WholeRun, ids: Sequence[str], num_tokens: int
) -> None:
    ended(whole_run, ids, num_tokens)
    with pytest.raises(OutputError, match="is not the completion that was asked for, of 3"):
        whole_run.record(7.0)


def test_a_part_that_is_a_whole_run_is_told_by_its_files(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    script = "import os; print(os.environ['TRITON_CACHE_DIR'], os.environ['PYTHONPATH'])"
    part = Part("boot", [sys.executable, "-c", script], 30.0, None, {"ranks": 2}, whole_run)
    with (tmp_path / "log.txt").open("w") as log:
        result = run_part(part, tmp_path, 30.0, log)
    assert "metrics.json" in result.problem
    assert result.records == []
    kernels, python_path = result.last_lines[0].split()
    assert kernels == whole_run.environ["TRITON_CACHE_DIR"]
    assert python_path.split(os.pathsep)[0] == str(tmp_path)  # the tree that is measured


@pytest.mark.parametrize("lacks", ["phases", "requests", "output_tokens_per_s"])
def test_a_run_of_a_tree_that_lacks_a_figure_loses_only_its_own(
    whole_run: WholeRun, tmp_path: Path, lacks: str
) -> None:
    ended(whole_run)
    metrics = json.loads((whole_run.folder / "metrics.json").read_text())
    del metrics[lacks]
    (whole_run.folder / "metrics.json").write_text(json.dumps(metrics))
    left = tmp_path / "left"
    whole_run.folder.rename(left)  # as the preparation removes what was there
    part = Part("boot", ["cp", "-r", str(left), str(whole_run.folder)], 30.0, whole_run=whole_run)
    with (tmp_path / "log.txt").open("w") as log:
        result = run_part(part, tmp_path, 30.0, log)
    assert (result.problem, result.records) == (f"not measured, KeyError: '{lacks}'", [])


@pytest.mark.parametrize(
    ("command", "problem", "last_lines"),
    [
        (["printf", "%b", r"half \xe2\x82"], "", ["half \ufffd"]),
        (["/no/such/mpirun"], "not measured, FileNotFoundError: ", []),
    ],
)
def test_no_output_and_no_missing_program_ends_the_suite(
    tmp_path: Path, command: list[str], problem: str, last_lines: list[str]
) -> None:
    with (tmp_path / "log.txt").open("w", encoding="utf-8") as log:
        result = run_part(Part("tests", command, 30.0), tmp_path, 30.0, log)
    assert result.problem.startswith(problem)
    assert result.last_lines == last_lines


def test_an_interrupt_leaves_no_rank_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []
    communicate = subprocess.Popen.communicate

    def interrupted(process: subprocess.Popen[str], *args: Any, **named: Any) -> Any:
        if not started:
            started.append(process)
            raise KeyboardInterrupt
        return communicate(process, *args, **named)

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    part = Part("tests", ["bash", "-c", "sleep 60 & wait"], 30.0)
    with (tmp_path / "log.txt").open("w") as log, pytest.raises(KeyboardInterrupt):
        run_part(part, tmp_path, 30.0, log)
    assert started[0].returncode == -signal.SIGTERM


def test_a_tree_without_mpipipe_is_one_sentence(tmp_path: Path) -> None:
    command = [str(ROOT / "launch" / "bench_gpu.sh"), "--tree", "typo"]  # from where it is called
    environ = {**os.environ, "PYTHON": sys.executable}
    said = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert said.returncode == 1
    there = tmp_path / "typo" / "mpipipe"
    assert said.stderr == f"bench_gpu: there is no {there}: give a checkout as --tree\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kernels", "imports"), [("cold", 1), ("", 0)])
def test_a_start_finds_the_libraries_in_memory(
    whole_run: WholeRun, tmp_path: Path, kernels: KernelCache, imports: int
) -> None:
    run = replace(whole_run, kernels=kernels)
    part = Part("boot", ["bash", "-c", "touch imported; wc -l < imported"], 30.0, whole_run=run)
    with (tmp_path / "log.txt").open("w") as log:
        result = run_part(part, tmp_path, 30.0, log)
    assert result.last_lines == [str(imports)]


def test_behind_a_cold_start_that_failed_there_is_no_warm_one(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    warm = replace(whole_run, kernels="warm", folder=whole_run.folder.with_name("again"))
    with (tmp_path / "log.txt").open("w") as log:
        for run, problem in ((whole_run, "exit code 3"), (warm, "so the kernel cache would be")):
            part = Part("boot", ["bash", "-c", "exit 3"], 30.0, whole_run=run)
            assert problem in run_part(part, tmp_path, 30.0, log).problem


def run_record(**more: Any) -> dict[str, Any]:
    """As `WholeRun.record` makes it."""
    return {
        "mode": "run", "part": "boot_cold_openllama_3b", "shape": "openllama_3b", "ranks": 2,
        "variant": "", "work": "32x128x8",
        "kernels": "cold", "tokens_per_s": 100.0, "first_token_s": 14.5,
        "start": {"imports": 4.0, "handshake": 10.0, "plan": 0.25, "first step": 0.25},
        "phases": {
            "boot_s": 10.0, "load_s": 4.25, "generate_s": 2.0, "shutdown_s": 0.5, "wall_s": 16.75
        },
        "command_s": 18.0, "merged_per_s": 12.0, "num_cached_kernels": 22,
        "predicted": {"tokens_per_s": 105.0, "start_s": 15.0, "generate_s": 1.9},
        "plan": {"split": [13, 13], "hash": "p"},
        "devices": ["H100", "H100"], "versions": {"torch": "2.13"}, "date": "2026-11-27", **more,
    }  # fmt: skip


def test_the_table_says_where_a_start_went(options: SuiteOptions) -> None:
    warm = run_record(kernels="warm", first_token_s=8.25)
    result = Result(all_parts(options)[0], 12.0, "", [run_record(), warm], [])
    lines = table_lines([result], 12.0)
    row = next(line for line in lines if "| cold |" in line)
    assert "| **14.5** | 15 | 15.0 | 14.2 | 1.2 | 22 |" in row  # within the target; foretold; real
    assert row.endswith("| handshake 10.0, imports 4.0, the rest 0.5 |")
    assert any("| warm | 2 | 8.2 | 8 |" in line for line in lines)
    assert any("2026-11-27, H100; torch 2.13." in line for line in lines)


def test_the_table_holds_a_file_against_the_bench_of_its_work(options: SuiteOptions) -> None:
    run = run_record(kernels="", work="10000x128x32", tokens_per_s=9600.0)
    bench = record("10000x128x32", 2, 10000.0, shape="openllama_3b", plan={"hash": "p"})
    bench["part"] = "file_bench_openllama_3b"
    other = {**bench, "part": "pipeline_openllama_3b", "tokens_per_s": 11000.0}
    part = all_parts(options)[0]
    lines = table_lines([Result(part, 1.0, "", [other, bench, run], [])], 1.0)
    assert any("| 9,600 | 10,000 | **96.0%** | 95% | 105 | 18.0 |" in line for line in lines)
    unlike = {**bench, "plan": {"hash": "q"}}
    lines = table_lines([Result(part, 1.0, "", [unlike, run], [])], 1.0)
    assert any("| 10,000 (another plan) | 96.0% |" in line for line in lines)  # not bold
    unlike["tokens_per_s"] = 12000.0
    lines = table_lines([Result(part, 1.0, "", [unlike, run], [])], 1.0)
    assert any("| 12,000 (another plan) | 80.0% |" in line for line in lines)
    assert any(
        "| 9,600 | - | - |" in line for line in table_lines([Result(part, 1, "", [run], [])], 1)
    )


def test_before_and_after_stand_side_by_side() -> None:
    before = [record("64x512x128", 2, speed) for speed in (6000.0, 6400.0, 6200.0)]
    before += [run_record(first_token_s=17.8), {**run_record(), "error": "out of memory"}]
    after = [record("64x512x128", 2, 6820.0), run_record(first_token_s=8.9)]
    after += [run_record(kernels="", work="10000x128x32", tokens_per_s=9600.0)]
    after += [record("64x512x128", 1, 3000.0, variant="quantize=int8")]
    after += [record("64x512x128", 2, 5000.0, part="tail_llama3_8b")]  # another plan
    lines = compare_lines(before, after)
    ours = "| pipeline_llama3_8b | llama3_8b"
    assert f"{ours} | 64x512x128 | 2 | 6,200 | 6,820 | +10.0% |" in lines
    assert "| tail_llama3_8b | llama3_8b | 64x512x128 | 2 | - | 5,000 | - |" in lines
    start = "| boot_cold_openllama_3b | openllama_3b | first token s, cold kernel cache | 2"
    assert f"{start} | 17.8 | 8.9 | -50.0% |" in lines
    assert any(line.endswith("| 10000x128x32 of a file | 2 | - | 9,600 | - |") for line in lines)
    assert f"{ours}, quantize=int8 | 64x512x128 | 1 | - | 3,000 | - |" in lines
    assert lines[-1] == "After: 2026-11-27, H100; torch 2.13."
