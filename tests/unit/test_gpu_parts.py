"""Parts of the GPU suite by what a machine has, and the tables of those that are pairs."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mpipipe.bench import gpu_parts
from mpipipe.bench.cold_disk import ColdFiles, disk_record, plain_rates
from mpipipe.bench.gpu_parts import all_parts
from mpipipe.bench.gpu_suite import Part, Result, SuiteOptions, run_part
from mpipipe.bench.gpu_suite_pairs import lines_of_tests, pair_lines
from mpipipe.bench.prediction_table import error_lines, prediction_row
from mpipipe.bench.workloads import BenchWork, quick_work

ROOT = Path(__file__).resolve().parents[2]


def parts_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **options: Any) -> dict[str, Part]:
    monkeypatch.setattr(gpu_parts, "mpirun_command", lambda number: ["mpirun", "-n", str(number)])
    found = all_parts(SuiteOptions(ROOT, tmp_path, tmp_path / "scratch", **options))
    return {part.name: part for part in found}


def works_of(part: Part) -> list[str]:
    words = part.command
    return [words[at + 1] for at, word in enumerate(words) if word == "--work"]


@pytest.mark.parametrize(
    ("num_gpus", "there", "not_there", "ranks"),
    [
        (1, "single_llama3_8b", "pipeline_llama3_8b", "1"),
        (2, "pipeline_llama3_8b", "four_llama3_8b", "2,1"),
        (4, "four_llama3_8b", "disk", "4,2,1"),
    ],
)
def test_parts_that_need_more_gpus_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    num_gpus: int,
    there: str,
    not_there: str,
    ranks: str,
) -> None:
    parts = parts_of(monkeypatch, tmp_path, num_gpus=num_gpus)
    assert there in parts
    assert not_there not in parts
    words = parts["predictions_llama32_3b"].command
    assert words[words.index("--ranks") + 1] == ranks
    assert "--measure-once" in words
    assert {"tests_cold", "tests_warm", "predictions_openllama_3b"} <= set(parts)
    assert all(0 < part.about_s <= part.limit_s for part in parts.values())


def test_the_disk_is_read_where_a_folder_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = parts_of(monkeypatch, tmp_path, disk=tmp_path)["disk"]
    before, _, behind = (part.command[:7], None, part.command[7:])
    assert before[1:] == [
        str(ROOT / "launch" / "bench_disk.py"), str(tmp_path), "--size", "4GiB", "--json",
        str(part.json_path),
    ]  # fmt: skip
    assert behind[0] == "--"
    assert {f"memory.offload_dir={tmp_path}", "memory.host_bytes=1GiB"} <= set(behind)
    assert works_of(part) == ["32x128x8"]


def test_drafts_are_tried_on_text_that_repeats_and_on_text_that_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = parts_of(monkeypatch, tmp_path)
    for name in ("openllama_3b", "copying"):
        on, off = parts[f"drafts_{name}"], parts[f"undrafted_{name}"]
        assert works_of(on) == works_of(off)
        assert "pipeline.num_speculative_tokens=0" in off.command
        assert "pipeline.num_speculative_tokens=0" not in on.command
        # One that repeats: `bench throughput` makes no drafts for others alone.
        assert any(BenchWork.parse(work).repeats for work in works_of(on))
    assert "1x512x128" in works_of(parts["drafts_openllama_3b"])
    copying = parts["drafts_copying"]
    assert copying.before is not None
    assert f"model.path={tmp_path / 'scratch' / 'copying_model'}" in copying.command
    assert "model.weights=checkpoint" in copying.command
    assert copying.labels["shape"] == "copying"


@pytest.mark.parametrize(
    ("text", "quick"),
    [
        ("10000x128x32", "4x16x8"),
        ("512x1024+128x128", "4x32+16x8"),
        ("512xmixedxeven", "1xmixedxeven"),
        ("2000x512x64xtail", "4x16x8xtail"),
        ("1x512x128xrepeat", "1x16x64xrepeat"),
    ],
)
def test_a_quick_work_is_of_the_same_kind(text: str, quick: str) -> None:
    assert quick_work(BenchWork.parse(text)).name == quick


# ---- tests with a cold and a warm kernel cache ---------------------------------------------------


def test_a_cold_cache_is_empty_and_a_warm_one_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = parts_of(monkeypatch, tmp_path)
    cold, warm = parts["tests_cold"], parts["tests_warm"]
    kernels = Path(cold.environ["TRITON_CACHE_DIR"])
    assert warm.environ == cold.environ
    with (tmp_path / "log.txt").open("w") as log:
        assert (
            "let tests_cold with the same --scratch go before"
            in run_part(warm, tmp_path, 30.0, log).problem
        )
        assert cold.before is not None
        assert warm.before is not None
        kernels.mkdir(parents=True)
        (kernels / "old").touch()
        cold.before()
        assert not list(kernels.iterdir())
        (kernels / "new").touch()
        warm.before()
        assert list(kernels.iterdir())


def test_failed_tests_are_named_also_where_a_limit_ends_them(tmp_path: Path) -> None:
    said = (
        "[gw1] [  3%] PASSED tests/gpu/test_a.py::test_well[x]",
        "[gw0] [  7%] FAILED tests/gpu/test_a.py::test_one[2-True]",
        "tests/gpu/test_b.py::test_two FAILED                       [ 50%]",
        "tests/gpu/test_b.py::test_well PASSED                      [ 60%]",
        "[gw3] [ 70%] ERROR tests/contract/test_c.py::test_three",
        "== 2 failed, 1 passed in 3.21s ==",
        "FAILED tests/gpu/test_a.py::test_one[2-True] - AssertionError: 1",
    )
    (tmp_path / "said").write_text("\n".join(said) + "\n")
    command = ["bash", "-c", f"cat {tmp_path / 'said'}; echo $WORD; exit 1"]
    environ = {"WORD": "3 passed in 1.00s"}
    part = Part("tests_cold", command, 30.0, environ=environ, has_tests=True)
    with (tmp_path / "log.txt").open("w") as log:
        result = run_part(part, tmp_path, 30.0, log)
    names = ("gpu/test_a.py::test_one[2-True]", "gpu/test_b.py::test_two")
    assert result.failed_tests == (*(f"tests/{name}" for name in names),
                                   "tests/contract/test_c.py::test_three")  # fmt: skip
    assert result.test_counts == ("2 failed, 1 passed in 3.21s", "3 passed in 1.00s")
    lines = lines_of_tests([result, Result(Part("other", [], 1.0), 1.0, "", [], [])])
    assert lines[0].endswith("s, 2 failed, 1 passed in 3.21s; 3 passed in 1.00s")
    assert lines[1:3] == ["  exit code 1", "  failed: tests/gpu/test_a.py::test_one[2-True]"]
    assert len(lines) == 5


# ---- the disk ------------------------------------------------------------------------------------


def test_files_without_a_name_are_found_by_their_process(tmp_path: Path) -> None:
    processes, folder, file = tmp_path / "proc", tmp_path / "disk", tmp_path / "real"
    folder.mkdir()
    file.write_bytes(b"x")
    for number, links in (("12", [f"{folder}/job-1.weights (deleted)", "/dev/null"]), ("13", [])):
        (processes / number / "fd").mkdir(parents=True)
        (processes / number / "io").write_text("rchar: 9\nread_bytes: 4096\nwrite_bytes: 1\n")
        for place, target in enumerate(links):
            (processes / number / "fd" / str(place)).symlink_to(target)
    # As the kernel's links do, this one leads to the file whatever it says.
    (folder / "job-1.weights (deleted)").symlink_to(file)
    files = ColdFiles(folder, processes)
    assert files.forget() == 1
    assert files.read_bytes == 4096


def test_an_open_file_of_this_process_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "a.weights"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        path.unlink()
        assert ColdFiles(tmp_path).forget() == 1
    finally:
        os.close(descriptor)
    assert ColdFiles(tmp_path).forget() == 0


def test_a_record_holds_what_was_read_against_the_disk(tmp_path: Path) -> None:
    offload = {"bytes_per_step": 100, "disk_bytes": 1500}
    stages = [{"num_steps": 8, "offload": offload}, {"num_steps": 8, "offload": None}]
    found = disk_record(
        {"stages": stages, "elapsed_s": 4.0}, {"1_threads": 180.0, "8_threads": 250.0}, 750
    )
    assert (found["rate"], found["of_plain"]) == (200.0, 0.8)
    assert (found["passes_before"], found["from_disk"]) == (7.0, 0.5)
    assert all(rate > 0 for rate in plain_rates(tmp_path, 1 << 20).values())
    assert not list(tmp_path.iterdir())


# ---- tables --------------------------------------------------------------------------------------


def record(part: str, work: str, speed: float, **more: Any) -> dict[str, Any]:
    shape = part.partition("_")[2]
    return {"part": part, "shape": shape, "work": work, "tokens_per_s": speed, **more}


def test_what_is_held_against_each_other_stands_side_by_side() -> None:
    tokens = {"num_shared_tokens": 1024, "num_prompt_tokens": 2304}
    nothing = {"num_shared_tokens": 0, "num_prompt_tokens": 2304}
    drafts = {"drafts": {"num_drafted": 20, "num_accepted": 15}}
    lines = pair_lines(
        [
            record("prefix_x", "2x1024+128x8", 410.0, **tokens),
            record("prefix_x", "2x1152x8", 98.0, **nothing),
            record("prefix_each_x", "2x1024+128x8", 500.0, **tokens),
            record("apart_x", "2x1024+128x8", 100.0),
            record("apart_x", "2x1152x8", 100.0),
            record("drafts_copying", "1x8x8xrepeat", 140.0, **drafts),
            record("undrafted_copying", "1x8x8xrepeat", 100.0),
            record("drafts_x", "1x8x8", 98.0, **drafts),
            record("undrafted_x", "1x8x8", 100.0),
            record("tail_x", "9xmixed", 90.0),
            record("tail_x", "9xmixedxeven", 100.0),
        ]
    )
    assert "| x | 2x1024+128x8 | 410 | 100 | **4.100** | 4 | 1,024 of 2,304 |" in lines
    each = "| read by each row, x | 2x1024+128x8 | 500 | 100 | **5.000** | 4 | 1,024 of 2,304 |"
    assert each in lines
    assert "| x | 2x1152x8 | 98 | 100 | 0.980 | 0.99 | 0 of 2,304 |" in lines
    assert "| copying | 1x8x8xrepeat | 140 | 100 | 1.400 | 1.5 | 15 of 20 |" in lines
    assert "| x | 1x8x8 | 98 | 100 | **0.980** | 0.97 | 15 of 20 |" in lines
    assert "| x | 9xmixed | 90 | 100 | 0.900 | 0.97 |" in lines
    disk = {
        "bytes_per_step": 13 << 30,
        "rate": 1.9e9,
        "plain": {"1_threads": 1e9, "8_threads": 2e9},
    }
    disk |= {"of_plain": 0.95, "from_disk": 0.99, "passes_before": 7.1}
    row = "| y | 1x1x1 | 2.5 | 13.00 | 1.90 | 1.00 · 2.00 | **95.0%** | 90% | 99% | 7.1 |"
    assert row in pair_lines([record("disk", "1x1x1", 2.5, disk=disk) | {"shape": "y"}])


def predicted(work: str = "4x16x8") -> dict[str, Any]:
    """A record of `bench throughput` with its forecast by rates."""
    compared = {
        "tokens_per_s": {"predicted": 108.0, "measured": 100.0},
        "memory_bytes_0": {"predicted": 90.0, "measured": 100.0},
        "memory_bytes_1": {"predicted": 101.0, "measured": 100.0},
    }
    return {
        "model": "m", "ranks": 2, "work": work, "compared": compared, "elapsed_s": 6.0,
        "boot": {"greet_s": 1.0, "import_s": 1.0, "load_s": 2.0},
        "predicted": {"start_s": 5.0, "generate_s": 4.0, "source": "measured today on cards"},
        "plan": {"split": [1, 1]},
        "by_rates": {"forecast": {"tokens_per_s": 70.0}, "wall_clock_s": 11.0},
    }  # fmt: skip


def test_errors_of_forecasts_are_told_in_all() -> None:
    lines = error_lines([predicted()])
    assert "| tokens/s by rates | 1 | 30.0% | -30.0% | 25% | 0 |" in lines
    assert "| tokens/s by profile | 1 | 8.0% | +8.0% | 10% | 1 |" in lines
    assert "| wall-clock by rates | 1 | 10.0% | +10.0% | 25% | 1 |" in lines
    assert "| wall-clock by profile | 1 | 10.0% | -10.0% | 10% | 1 |" in lines
    assert "| memory | 2 | 5.5% | -10.0% | 5% | 1 |" in lines


def test_a_run_that_found_no_profile_says_nothing_of_profiles() -> None:
    record = predicted()
    record["predicted"]["source"] = "cards: rates of a data sheet"
    assert not [line for line in error_lines([record]) if "by profile" in line]
    assert prediction_row(record).count("| no profile | - |") == 2
    assert "108.0 | +8.0%" in prediction_row(predicted())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "bench_predictions", ROOT / "launch" / "bench_predictions.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_work_that_fails_loses_only_its_own_line(
    tmp_path: Path,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured: list[int] = []

    def one(_: object, model: str, num_ranks: int, work: str) -> dict[str, Any]:
        if work == "1x1x1":
            raise script.ProcessFailedError("exit code 3 of bench")
        return predicted(work) | {"ranks": num_ranks, "model": model}

    monkeypatch.setattr(script.Bench, "measure", lambda _, __, number: measured.append(number))
    monkeypatch.setattr(script.Bench, "record", one)
    words = ["--ranks", "2,1", "--models", "m", "--works", "1x1x1,2x2x2", "--measure-once"]
    monkeypatch.setattr("sys.argv", ["bench_predictions.py", *words, "--out", str(tmp_path)])
    assert script.main() == 1
    assert measured == [2]  # a GPU's profile holds for any number of ranks
    kept = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [(line["ranks"], line["work"]) for line in kept] == [(2, "2x2x2"), (1, "2x2x2")]
    said = capsys.readouterr().out
    assert "m, 2 ranks: exit code 3 of bench; see log.txt" in said
    assert "| tokens/s by profile | 2 |" in said


def test_after_its_limit_no_process_is_started(tmp_path: Path, script: ModuleType) -> None:
    with (tmp_path / "log.txt").open("w") as log:
        bench = script.Bench("c", (), tmp_path, log, ends_s=0.0)
        with pytest.raises(script.ProcessFailedError, match="no time left for plan"):
            bench.run([], ["plan"])
