"""The pages of planted experiments and of a run, in headless Chromium."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mpipipe.report.make import make_report
from tests.page.browser import lay_out, visit
from tests.unit import made_experiments

EXPERIMENT_PLOTS = [
    "Speedup over stages, strong scaling",
    "Parallel efficiency over stages, strong scaling",
    "Where the time of each stage went, memory-filling",
    "Where the time of each stage went, fixed-total",
    "Tokens per second over time",
    "Pipeline occupancy over time",
    "Steps in the pipeline",
    "Speedup over stages, weak scaling",
    "Parallel efficiency over stages, weak scaling",
    "Where the time of each stage went",
    "Tokens per second over time",
    "Throughput over batch size",
    "Latency over batch size",
    "Where the time of each stage went",
    "Tokens per second over time",
]
RUN_PLOTS = [
    "Where the time of each stage went",
    "Tokens per second over time",
    "Pipeline occupancy over time",
    "Steps in the pipeline",
]
PLOTS = {"experiments": EXPERIMENT_PLOTS, "run": RUN_PLOTS}
Box = list[float]  # left, top, right, bottom
LaidOut = Callable[[str, int], dict[str, Any]]


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with three experiments, and one of a run."""
    folder = tmp_path_factory.mktemp("records")
    experiments = folder / "experiments"
    made_experiments.write(experiments / "strong", "strong", made_experiments.strong())
    made_experiments.write(experiments / "weak", "weak", made_experiments.weak())
    made_experiments.write(experiments / "batch", "batch", made_experiments.batch())
    made_experiments.make_run_folder(experiments / "strong/runs/memory-filling_n4_r1")
    return {"experiments": experiments, "run": made_experiments.make_run_folder(folder / "run")}


@pytest.fixture(scope="session")
def pages(records: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their pages."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, place in records.items():
        found[name] = folder / f"{name}.html"
        report = make_report(place, hypotheses=True)
        found[name].write_bytes(report.files["report.html"])
    return found


@pytest.fixture(scope="session")
def laid_out(pages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> LaidOut:
    """What a page measures in a light window of some width; each is opened once."""
    scratch = tmp_path_factory.mktemp("browser")
    return functools.cache(lambda name, width: lay_out(pages[name], scratch, width=width))


@pytest.mark.parametrize("name", PLOTS)
def test_the_page_is_silent_and_asks_the_network_for_nothing(
    name: str, pages: dict[str, Path], tmp_path: Path
) -> None:
    seen = visit(pages[name], tmp_path)
    assert seen.console == []
    assert seen.requests == []
    titles = re.findall(r"<svg[^>]*>\s*<title>(.*?)</title>", seen.dom)
    assert titles == PLOTS[name]
    ids = re.findall(r'\bid="([^"]+)"', seen.dom)
    assert len(ids) == len(set(ids))


def test_what_the_page_must_not_do_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<body><script>console.error('so'); gone();</script>"
        "<img src='http://127.0.0.1:9/x.png'></body>"
    )
    seen = visit(page, tmp_path)
    assert ["gone is not defined" in line for line in seen.console[:2]] == [False, True]
    assert seen.requests == ["http://127.0.0.1:9/x.png"]


@pytest.mark.parametrize("width", [1280, 2560, 600])  # 2560: as at 50 % zoom
@pytest.mark.parametrize("name", PLOTS)
def test_nothing_is_wider_than_the_window(name: str, width: int, laid_out: LaidOut) -> None:
    measured = laid_out(name, width)
    content, window = measured["page"]
    assert window == width
    assert content <= window
    assert [plot["title"] for plot in measured["plots"]] == PLOTS[name]
    for plot in measured["plots"]:
        assert 0 <= plot["box"][0] < plot["box"][2] <= width
    if width >= 1280:  # narrower windows scroll tables inside of their cards
        assert all(content <= shown for content, shown in measured["scrolled"])


@pytest.mark.parametrize("name", PLOTS)
def test_no_text_of_a_plot_is_cut_off_or_covered_by_another(name: str, laid_out: LaidOut) -> None:
    for plot in laid_out(name, 1280)["plots"]:
        left, top, right, bottom = plot["box"]
        assert plot["texts"], plot["title"]
        for text in plot["texts"]:
            assert left <= text[0] + 1, plot["title"]
            assert top <= text[1] + 1, plot["title"]
            assert text[2] <= right + 1, plot["title"]
            assert text[3] <= bottom + 1, plot["title"]
        covered = [pair for pair in combinations(plot["texts"], 2) if overlap(*pair)]
        assert not covered, plot["title"]


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes share more than a pixel's edge."""
    return (
        min(one[2], other[2]) - max(one[0], other[0]) > 1
        and min(one[3], other[3]) - max(one[1], other[1]) > 1
    )


def test_plots_are_drawn_in_the_colour_of_the_text(
    pages: dict[str, Path], laid_out: LaidOut, tmp_path: Path
) -> None:
    inks = [laid_out("run", 1280)["ink"], lay_out(pages["run"], tmp_path, dark=True)["ink"]]
    assert inks == ["rgb(27, 31, 36)", "rgb(230, 237, 243)"]
    text = pages["run"].read_text()
    assert not re.search(r"<svg.*?(fill|stroke): #", text, re.DOTALL)


def test_the_same_records_give_the_same_bytes_anywhere(
    records: dict[str, Path], tmp_path: Path
) -> None:
    contents = []
    for number, hash_seed in enumerate(("1", "2")):
        folder = tmp_path / str(number)
        subprocess.run(
            [sys.executable, "-m", "mpipipe", "report", str(records["experiments"]),
             "--hypotheses", "--out", str(folder)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "TZ": f"UTC-{number}"},
            capture_output=True, timeout=120, check=True,
        )  # fmt: skip
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert sorted(contents[0]) == ["report.csv", "report.html", "report.json", "report.md"]
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0]["report.html"]
