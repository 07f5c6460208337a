"""Tables of planted experiments: each figure against one computed by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from mpipipe.report import make
from mpipipe.report.make import make_report
from tests.unit import made_experiments
from tests.unit.made_experiments import GIB, NUM_TOKENS, Planted


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib is not there where these tests run alone."""
    monkeypatch.setattr(make, "can_draw", lambda: False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All three experiments."""
    made_experiments.write(tmp_path / "strong", "strong", made_experiments.strong())
    made_experiments.write(tmp_path / "weak", "weak", made_experiments.weak())
    made_experiments.write(tmp_path / "batch", "batch", made_experiments.batch())
    return tmp_path


def rows_of(folder: Path) -> dict[str, Any]:
    document = json.loads(make_report(folder).files["report.json"])
    return {row["case"]: row for row in document["rows"]}


def ends(found: dict[str, Any]) -> tuple[float, float, float]:
    return found["low"], found["median"], found["high"]


def test_a_median_has_the_whole_range_of_five_runs_around_it(folder: Path) -> None:
    rows = rows_of(folder)
    found = rows["memory-filling_n2"]["figures"]["throughput_tokens_per_s"]
    assert ends(found) == pytest.approx((152 * 0.98, 152, 152 * 1.02))
    assert found["num"] == 5
    # of 0.98, 0.99, 1, 1.01, 1.02: standard deviation 0.0158 with n - 1
    assert found["cv"] == pytest.approx(0.0158113883)


def test_speedup_and_efficiency_are_taken_repeat_by_repeat(folder: Path) -> None:
    rows = rows_of(folder)
    # repeats 1 to 5 of one stage: 0.98 1.01 1 0.99 1.02; of two: 1.01 1 0.99 1.02 0.98
    ratios = sorted(1.52 * a / b for a, b in zip(
        (1.01, 1.0, 0.99, 1.02, 0.98), (0.98, 1.01, 1.0, 0.99, 1.02), strict=True
    ))  # fmt: skip
    speedup = rows["memory-filling_n2"]["speedup"]
    assert ends(speedup) == pytest.approx((ratios[0], ratios[2], ratios[4]))
    assert ends(speedup) == pytest.approx((1.460392, 1.504950, 1.566531), rel=1e-5)
    assert ends(rows["memory-filling_n2"]["efficiency"]) == pytest.approx(
        (1.460392 / 2, 1.504950 / 2, 1.566531 / 2), rel=1e-5
    )
    assert ends(rows["memory-filling_n1"]["speedup"]) == (1, 1, 1)
    assert rows["weak_n4"]["base"] == "weak_n1"


def test_efficiency_of_a_batch_is_over_how_much_larger_it_is(folder: Path) -> None:
    row = rows_of(folder)["batch_4"]
    # turned by 2 against batch 1, where the median of the ratios of noise is 0.99
    assert row["size"] == 4
    assert row["efficiency"]["median"] == pytest.approx(row["speedup"]["median"] / 4)
    assert row["speedup"]["median"] == pytest.approx(118 / 40 * 0.99, rel=1e-3)


def test_the_other_columns_come_from_the_runs_own_metrics(folder: Path) -> None:
    row = rows_of(folder)["batch_8"]
    medians = {key: found and found["median"] for key, found in row["figures"].items()}
    generate_s = NUM_TOKENS / 150
    assert medians == pytest.approx(
        {
            "wall_clock_s": generate_s + 20,
            "throughput_tokens_per_s": 150.0,
            "gpu_percent": 80.0,
            "cpu_percent": 95.0,
            "io_s": 2.0,
            "communication_s": 0.08 * generate_s,
            "preprocessing_s": 0.25,
            "generate_s": generate_s,
            "bubble_percent": 30.0,
            "ttft_p50_s": 40 / 150,
            "itl_p50_ms": 4000 / 150,
            "itl_p95_ms": 6000 / 150,
            "memory_gib": 12.0,  # of the GPU
            "energy_j_per_token": 1200 / NUM_TOKENS,
        }
    )


def test_on_cpus_memory_is_of_the_fullest_rank_and_there_is_no_energy(folder: Path) -> None:
    row = rows_of(folder)["memory-filling_n4"]
    assert row["figures"]["memory_gib"]["median"] == pytest.approx(5.0)
    assert row["figures"]["gpu_percent"] is None
    assert row["figures"]["energy_j_per_token"] is None


def test_parts_of_each_stage_are_medians_and_reading_is_beside_them(folder: Path) -> None:
    first, second = rows_of(folder)["memory-filling_n2"]["stage_parts_s"]
    generate_s = NUM_TOKENS / 152
    assert first == pytest.approx(
        {
            "compute": 0.7 * generate_s, "wait": 0.1 * generate_s, "transfer": 0.05 * generate_s,
            "send": 0.03 * generate_s, "idle": 0.07 * generate_s, "overhead": 0.05 * generate_s,
            "I/O": 1.5,
        }
    )  # fmt: skip
    assert second["I/O"] == pytest.approx(2.5)


def test_runs_without_a_result_say_why_and_do_not_count(folder: Path) -> None:
    rows = rows_of(folder)
    assert rows["fixed-total_n4"]["failures"] == [
        {
            "outcome": "timeout",
            "reason": "it did not end within 600 s (--timeout)",
            "num_runs": 2,
        }
    ]
    assert (rows["fixed-total_n4"]["num_done"], rows["fixed-total_n4"]["num_runs"]) == (3, 5)
    # repeats 1, 3 and 5 of the sixth case, whose noise is turned by a whole round
    found = rows["fixed-total_n4"]["figures"]["throughput_tokens_per_s"]
    assert ends(found) == pytest.approx((140 * 0.98, 140.0, 140 * 1.02))
    assert rows["batch_32"]["figures"]["throughput_tokens_per_s"] is None
    text = make_report(folder).files["report.md"].decode()
    assert (
        "**out of memory (5 of 5 runs): memory ran out on rank 1 (CUDA): 2.0 GiB more were needed "
        "for the KV cache**"
    ) in text
    assert "**time limit (2 of 5 runs): it did not end within 600 s (--timeout)**" in text


def test_flags_stand_in_the_row_and_above_the_tables(folder: Path) -> None:
    rows = rows_of(folder)
    assert rows["memory-filling_n4"]["flags"] == {"foreign load": 1}
    assert rows["weak_n4"]["flags"] == {"other tokens": 1}
    text = make_report(folder).files["report.md"].decode()
    weak = text[text.index("## Weak scaling") : text.index("## Batch size")]
    warning = "> **Note.** other tokens: these made other tokens than most runs of the case"
    assert weak.index(warning) < weak.index("| Case |")
    assert "**other tokens (1 of 5 runs)**" in weak


def test_columns_are_those_of_the_student_report_in_its_order(folder: Path) -> None:
    text = make_report(folder).files["report.md"].decode()
    assert text.count(
        "| Case | Nodes | Prompts | Batch size | Speedup | Wall clock (s) | Throughput (tokens/s) "
        "| Parallel efficiency | GPU (%) | CPU (%) | I/O time (s) | Communication time (s) "
        "| Preprocessing cost (s) | Validity |"
    ) == 2  # fmt: skip
    assert "| Throughput (tokens/s) | Batch efficiency |" in text
    assert (
        "| batch_2 | 2 (2 stages) | 60 | 2 | 1.78 (1.73–1.86) | 103 (102–105) "
        "| 72.0 (70.6–73.4) | 0.891 (0.865–0.928) | 80.0 | 95.0 (93.1–96.9) "
        "| 2.00 | 6.67 (6.54–6.80) | 0.250 | ok |"
    ) in text


def test_csv_has_a_line_for_each_case_with_all_figures(folder: Path) -> None:
    text = make_report(folder).files["report.csv"].decode()
    lines = {line["case"]: line for line in csv.DictReader(io.StringIO(text))}
    assert len(lines) == 6 + 3 + 6
    line = lines["memory-filling_n2"]
    assert float(line["throughput_tokens_per_s"]) == pytest.approx(152)
    assert float(line["throughput_tokens_per_s_low"]) == pytest.approx(152 * 0.98)
    assert float(line["speedup_high"]) == pytest.approx(1.566531, rel=1e-5)
    assert float(line["cv"]) == pytest.approx(0.0158113883)
    assert lines["batch_32"]["throughput_tokens_per_s"] == ""
    assert lines["batch_32"]["failures"].startswith("out_of_memory: memory ran out on rank 1")
    assert lines["weak_n4"]["flags"] == "other tokens: 1"


def test_an_experiment_that_is_not_complete_says_what_lacks(tmp_path: Path) -> None:
    made_experiments.write(tmp_path, "weak", made_experiments.weak())
    for repeat in (4, 5):
        (tmp_path / "records" / f"weak_n2_r{repeat}.json").unlink()
    text = make_report(tmp_path).files["report.md"].decode()
    assert "the experiment is not complete: 2 launches of 15 have no record yet" in text
    assert "**3 of 5 runs were made**" in text
    assert "too few runs for an interval of 90 %" in text


def test_figures_that_were_not_recorded_are_no_zeros(tmp_path: Path) -> None:
    made_experiments.write(tmp_path, "batch", [Planted("batch", 2, 100.0, batch=1)])
    for path in (tmp_path / "records").iterdir():
        record = json.loads(path.read_text())
        del record["metrics"]["time"], record["metrics"]["itl_p50_s"]
        record["metrics"]["ranks"][0]["peak_rss_bytes"] = 2 * GIB
        path.write_text(json.dumps(record))
    figures = rows_of(tmp_path)["batch_1"]["figures"]
    for key in ("io_s", "communication_s", "preprocessing_s", "itl_p50_ms"):
        assert figures[key] is None, key
    assert figures["itl_p95_ms"] is not None


def test_commands_to_repeat_it_can_be_copied(folder: Path) -> None:
    text = make_report(folder).files["report.md"].decode()
    assert "\nmpipipe bench batch configs/demo.toml --out runs/batch\n" in text
    assert (
        "\nmpiexec -n 4 mpipipe run configs/demo.toml output.dir=runs/memory-filling_n4_r1\n"
        in text
    )
