"""Curves over the time of a run, against what was put into its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpipipe.report.charts import LaneChart, LineChart
from mpipipe.report.experiment_files import find_experiments
from mpipipe.report.experiment_section import section_charts
from mpipipe.report.run_files import read_run
from mpipipe.report.timeline import busy_shares, occupancy_charts, rate_curve
from tests.unit import made_experiments
from tests.unit.made_experiments import Planted


def test_rates_stand_in_the_middle_of_their_intervals() -> None:
    curve = rate_curve("run", [(0.0, 0), (5.0, 100), (10.0, 400), (10.0, 400)], 0)
    assert curve is not None
    assert curve.x == (2.5, 7.5)
    assert curve.y == (20.0, 60.0)
    assert rate_curve("run", [(0.0, 0)], 0) is None


def test_a_run_without_samples_has_no_curve_and_its_report_is_made(tmp_path: Path) -> None:
    assert rate_curve("run", [], 0) is None
    folder = made_experiments.write(tmp_path, "weak", [Planted("weak", 1, 10.0, batch=1)])
    for path in (folder / "records").iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), "samples": []}))
    (found,) = find_experiments(folder)
    titles = [chart.title for chart in section_charts(found.section)]
    assert "Tokens per second over time" not in titles
    assert titles


def test_a_long_run_has_no_more_points_than_can_be_seen_and_loses_no_token() -> None:
    points = [(5.0 * n, 10.0 * n * n) for n in range(7001)]
    curve = rate_curve("run", points, 0)
    assert curve is not None
    assert 150 < len(curve.x) <= 200
    lengths = [2 * curve.x[0]]  # an interval is twice as long as from its start to its middle
    for before, after in zip(curve.x, curve.x[1:], strict=False):
        lengths.append(2 * (after - before) - lengths[-1])
    tokens = sum(length * rate for length, rate in zip(lengths, curve.y, strict=True))
    assert tokens == pytest.approx(points[-1][1])


def test_a_bin_is_as_busy_as_the_spans_in_it() -> None:
    assert busy_shares([(0.0, 0.5), (1.0, 3.0), (3.75, 9.0)], 0.0, 4.0, 4) == pytest.approx(
        [0.5, 1.0, 1.0, 0.25]
    )


def test_occupancy_is_on_the_heads_clock(tmp_path: Path) -> None:
    run = read_run(made_experiments.make_run_folder(tmp_path / "run"))
    shares, lanes = occupancy_charts(run, "this run")
    assert isinstance(shares, LineChart)
    assert [curve.label for curve in shares.curves] == ["stage 0", "stage 1"]
    for curve in shares.curves:  # 30 ms of each 40 ms, but for the ends
        assert curve.y[3:-3] == pytest.approx((75.0,) * (len(curve.y) - 6), abs=8)
        assert max(curve.x) < 2.5  # the second rank's clock is 5 s ahead
    assert isinstance(lanes, LaneChart)
    first, second = (
        [span for span in lanes.spans if span.lane == lane][1] for lane in (0, 1)
    )  # fmt: skip
    assert first.length_s == second.length_s == pytest.approx(0.03)
    # 10 ms idle and wait, 20 ms later on the second stage
    assert (first.start_s - 0.01) % 0.04 == pytest.approx(0.0, abs=1e-6) or (
        first.start_s - 0.01
    ) % 0.04 == pytest.approx(0.04, abs=1e-6)
    assert abs(second.start_s - first.start_s) % 0.04 == pytest.approx(0.02, abs=1e-6)


def test_a_run_without_steps_has_no_occupancy(tmp_path: Path) -> None:
    folder = made_experiments.make_run_folder(tmp_path / "run")
    for path in folder.glob("steps_*"):
        path.unlink()
    assert occupancy_charts(read_run(folder), "this run") == []
