"""What a run folder tells of a run: progress, use, flags; torn and missing files included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpipipe.experiments import series
from mpipipe.experiments.run_files import read_run_files

NODE = {"host": "a", "num_cores": 4}
HOSTS = [{"rank": 0, "host": "a"}, {"rank": 1, "host": "a"}]


def write_lines(path: Path, lines: list[dict[str, Any]], torn: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)


def a_run(folder: Path, *, node_percent: float = 45.0, **gpu: Any) -> Path:
    """Two ranks of one node of four cores, which use 90 % of a core each."""
    (folder / "manifest.json").write_text(json.dumps({"hosts": HOSTS, "nodes": [NODE]}))
    metrics = {"phases": {"generate_s": 10.0}, "energy_j": 50.0}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_lines(folder / "rank_0.log", [{"event": "generating", "t_s": 100.0}])
    for rank in range(2):
        samples = [
            {
                "t_s": 99.0 + 5 * number,
                "num_output_tokens": 50 * number if rank == 0 else None,
                "cpu_percent": 90.0 if number else 300.0,
                "node_cpu_percent": node_percent,
                "gpu": gpu or None,
            }
            for number in range(3)
        ]
        write_lines(folder / f"samples_rank_{rank}.jsonl", samples, torn='{"t_s": 11')
    return folder


def test_nothing_is_known_of_a_run_that_left_nothing(tmp_path: Path) -> None:
    files = read_run_files(tmp_path)
    assert (files.metrics, files.tokens_hash, files.error, files.hosts) == (None, None, "", ())
    assert series.progress(files) == ()
    assert series.flags_of(files) == ()
    assert series.cpu_percent(files) is None
    assert series.energy_j(files) is None


def test_progress_counts_from_when_generating_began(tmp_path: Path) -> None:
    points = series.progress(read_run_files(a_run(tmp_path)))
    assert [(point.t_s, point.num_output_tokens) for point in points] == [(4.0, 50), (9.0, 100)]
    write_lines(tmp_path / "rank_0.log", [{"event": "generating", "t_s": 99.1}])
    points = series.progress(read_run_files(tmp_path))
    assert [point.t_s for point in points] == [0.0, 4.9, 9.9]


def test_use_of_the_cores_leaves_out_the_sample_of_the_boot(tmp_path: Path) -> None:
    files = read_run_files(a_run(tmp_path))
    assert series.cpu_percent(files) == 90.0
    assert series.gpu_percent(files) is None
    assert series.energy_j(files) == 50.0
    assert series.flags_of(files) == ()


def test_foreign_load_is_what_the_ranks_did_not_use(tmp_path: Path) -> None:
    # 4 cores x 60 % = 240 % of a core, the ranks used 180 %.
    files = read_run_files(a_run(tmp_path, node_percent=60.0))
    assert series.flags_of(files) == ("foreign load",)


def test_a_throttled_gpu_is_told_and_chosen_clocks_are_not(tmp_path: Path) -> None:
    gpu: dict[str, Any] = {
        "utilisation": 50,
        "sm_clock_mhz": 1400,
        "throttle": ["applications_clocks_setting"],
    }
    files = read_run_files(a_run(tmp_path, **gpu))
    assert series.flags_of(files) == ()
    assert series.gpu_percent(files) == 50.0
    assert series.sm_clock_mhz(files) == 1400
    files = read_run_files(a_run(tmp_path, throttle=["sw_thermal_slowdown"]))
    assert series.flags_of(files) == ("throttled",)


def test_a_run_of_a_moment_is_too_short(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    (folder / "metrics.json").write_text(json.dumps({"phases": {"generate_s": 1.5}}))
    assert series.flags_of(read_run_files(folder)) == ("too short",)


def test_the_hash_of_the_tokens_does_not_depend_on_the_order(tmp_path: Path) -> None:
    lines = [{"id": "a", "token_ids": [1]}, {"id": "b", "token_ids": [2, 3]}]
    path = tmp_path / "completions.jsonl"
    write_lines(path, lines)
    first = read_run_files(tmp_path).tokens_hash
    write_lines(path, lines[::-1])
    assert read_run_files(tmp_path).tokens_hash == first
    write_lines(path, [lines[0], {"id": "b", "token_ids": [2, 4]}])
    assert read_run_files(tmp_path).tokens_hash != first
    write_lines(path, [lines[0], {"id": "b", "error": {"kind": "too_long"}}])
    files = read_run_files(tmp_path)
    assert (files.tokens_hash, files.num_failed) == (None, 1)
    for lacking in ({"id": "b"}, {"id": "b", "token_ids": None}, {"id": "b", "token_ids": "2"}):
        write_lines(path, [lines[0], lacking])
        assert read_run_files(tmp_path).tokens_hash is None


def test_the_error_is_the_one_that_the_run_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "rank_0.log", [
        {"event": "handshake", "resources": [{"gpu": {"name": "NVIDIA H200"}}, {"gpu": {}}]},
        {"event": "ended early", "error": "too large", "kind": "PlanError"},
    ])  # fmt: skip
    files = read_run_files(tmp_path)
    assert (files.error, files.error_kind) == ("too large", "PlanError")
    assert files.gpu_names == ("NVIDIA H200",)


@pytest.mark.parametrize(
    ("clocks", "flags"), [((1980, 1980, 1635), ()), ((1980, 1600, 1635), ("throttled",))]
)
def test_the_power_cap_counts_where_it_holds_the_clock_down(
    tmp_path: Path, clocks: tuple[int, ...], flags: tuple[str, ...]
) -> None:
    lines = [
        {"t_s": float(place), "gpu": {"sm_clock_mhz": clock, "throttle": ["sw_power_cap"]}}
        for place, clock in enumerate((1200, *clocks))  # the first sample is left out
    ]
    write_lines(a_run(tmp_path) / "samples_rank_0.jsonl", lines)
    assert series.flags_of(read_run_files(tmp_path)) == flags


def test_a_line_separator_in_a_text_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "completions.jsonl").write_text(
        '{"id": "a", "text": "one\u2028two\u0085three", "token_ids": [1]}\n', encoding="utf-8"
    )
    assert read_run_files(tmp_path).tokens_hash is not None
