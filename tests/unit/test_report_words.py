"""Verdicts in words, changes against older records, and what ends a report with a sentence."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpipipe.cli.main import app
from mpipipe.errors import EXIT_REGRESSION, ConfigError, OutputError
from mpipipe.report import make, page
from mpipipe.report.charts import BarChart, LineChart
from mpipipe.report.experiment_files import find_experiments
from mpipipe.report.experiment_section import section_charts
from mpipipe.report.make import make_report
from tests.unit import made_experiments
from tests.unit.made_experiments import Planted


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib is not there where these tests run alone."""
    monkeypatch.setattr(make, "can_draw", lambda: False)


def verdicts(folder: Path) -> dict[str, str]:
    document = json.loads(make_report(folder).files["report.json"])
    return {verdict["arm"]: verdict["text"] for verdict in document["verdicts"]}


# ---- verdicts ------------------------------------------------------------------------------------


def test_no_verdict_inside_of_the_noise(tmp_path: Path) -> None:
    found = verdicts(made_experiments.write(tmp_path, "strong", made_experiments.strong()))
    assert "speedup 1.50 (1.46–1.57), above the 1.3 supposed" in found["memory-filling"]
    assert (
        "speedup 1.29 (1.25–1.34), which cannot be told apart from the 1.3 supposed; parallel "
        "efficiency 0.644 (0.625–0.670), which cannot be told apart from the 0.65 supposed"
    ) in found["fixed-total"]
    assert "the stages shared one node" in found["memory-filling"]
    assert "some are flagged" not in found["memory-filling"]  # 4 stages, of which nothing was said


def test_the_batch_sweep_has_a_verdict_for_each_supposed_size(tmp_path: Path) -> None:
    text = verdicts(made_experiments.write(tmp_path, "batch", made_experiments.batch()))["batch"]
    assert "For a batch of 2: batch efficiency 0.891 (0.865–0.928), which cannot be told" in text
    assert "For a batch of 4: batch efficiency 0.730 (0.723–0.753), below the 0.8 sup" in text
    assert "For a batch of 8: batch efficiency 0.473 (0.459–0.478), above the 0.43 sup" in text


def test_arrangements_are_told_by_replicas_stages_and_lanes(tmp_path: Path) -> None:
    folder = made_experiments.write(tmp_path, "arrangements", made_experiments.arrangements())
    files = make_report(folder).files
    text = files["report.md"].decode()
    assert "## Replicas, stages and lanes" in text
    assert (
        "r2_n2_t1 (replicas × stages × lanes: 2 × 2 × 1) had the highest throughput: 150.0 "
        "tokens/s. That is 1.49 (1.47–1.53) times the tokens per second of r1_n4_t1, faster beyond "
        "the noise."
    ) in text
    assert "2 stages of 2 lanes" in text
    assert "2 replicas of 2 stages" in text
    rows = {row["case"]: row for row in json.loads(files["report.json"])["rows"]}
    assert (rows["r1_n2_t2"]["size"], rows["r1_n2_t2"]["num_lanes"]) == (4, 2)
    assert rows["r1_n2_t2"]["efficiency"]["median"] == pytest.approx(0.8, rel=0.03)
    (found,) = find_experiments(folder)
    charts = {chart.title: chart for chart in section_charts(found.section)}
    titles = [*charts]
    assert "Where the time of each stage went" in titles
    bars = charts["Throughput by arrangement of ranks"]
    assert isinstance(bars, BarChart)
    assert [name for name, _ in bars.groups] == ["1 × 4 × 1", "1 × 2 × 2", "2 × 2 × 1"]
    assert bars.parts[0].values == pytest.approx((100, 80, 150))
    assert not any("over stages" in title for title in titles)


def test_other_tokens_too_few_runs_and_failures_get_no_verdict(tmp_path: Path) -> None:
    planted = made_experiments.weak()
    planted[1] = dataclasses.replace(planted[1], tokens={2: "other"})
    made_experiments.write(tmp_path / "tokens", "weak", planted)
    assert "made different tokens, so there is no verdict" in verdicts(tmp_path / "tokens")["weak"]

    planted[1] = dataclasses.replace(
        planted[1], tokens={}, outcome="failed", reason="a rank was lost.", failed_repeats=(1, 2)
    )
    made_experiments.write(tmp_path / "few", "weak", planted)
    assert (
        "For 2 nodes not all runs of weak_n2 and weak_n1 came to a result with the same tokens, so "
        "there is no verdict."
    ) in verdicts(tmp_path / "few")["weak"]

    planted[1] = dataclasses.replace(planted[1], failed_repeats=(1, 2, 3, 4, 5))
    made_experiments.write(tmp_path / "none", "weak", planted)
    text = verdicts(tmp_path / "none")["weak"]
    assert "the case weak_n2 came to no result: a rank was lost." in text


def test_beside_a_base_that_means_nothing_there_is_no_verdict(tmp_path: Path) -> None:
    planted = [dataclasses.replace(case, tokens={}) for case in made_experiments.weak()]
    planted[0] = dataclasses.replace(planted[0], tokens={3: "f00d"})
    report = make_report(made_experiments.write(tmp_path, "weak", planted), hypotheses=True)
    text = report.files["report.md"].decode()
    assert "Too few cases came to a result for a comparison." in text
    assert "For 2 nodes not all runs of weak_n2 and weak_n1 came to a result with the same" in text
    assert "supposed 0.9" not in text
    assert text.count("**no verdict on the speedup over weak_n1**") == 2


def test_rows_have_the_bases_of_the_verdict(tmp_path: Path) -> None:
    planted = [
        Planted("weak", 2, 90.0, batch=8, num_nodes=2, label="two_nodes"),
        Planted("weak", 2, 100.0, batch=8, label="one_node"),
        Planted("weak", 4, 190.0, batch=16),
    ]
    (one,) = find_experiments(made_experiments.write(tmp_path, "weak", planted))
    assert {row.case.name: row.base for row in one.section.rows} == {
        "two_nodes": "one_node",
        "one_node": "one_node",
        "weak_n4": "one_node",
    }
    speedups = {row.case.name: row.speedup for row in one.section.rows}
    assert {name: round(found.median, 1) for name, found in speedups.items() if found} == {
        "two_nodes": 0.9,
        "one_node": 1.0,
        "weak_n4": 1.9,
    }


def test_how_many_are_in_flight_is_said_as_it_was_asked_for(tmp_path: Path) -> None:
    made_experiments.write(tmp_path / "memory", "strong", made_experiments.strong())
    filling = "Memory-filling, the same prompts, "
    text = make_report(tmp_path / "memory").files["report.md"].decode()
    assert f"{filling}as many in flight as memory holds:" in text
    planted = [
        dataclasses.replace(case, batch=6 * case.num_stages)
        if case.arm == "memory-filling"
        else case
        for case in made_experiments.strong()
    ]
    made_experiments.write(tmp_path / "asked", "strong", planted)
    text = make_report(tmp_path / "asked").files["report.md"].decode()
    assert f"{filling}6 in flight on each stage:" in text
    assert "as memory holds" not in text


def test_curves_that_are_left_out_are_told(tmp_path: Path) -> None:
    planted = [Planted("batch", 1, 10.0 * size, batch=size) for size in range(1, 10)]
    for num in (7, 9):
        made_experiments.write(tmp_path / str(num), "batch", planted[:num])
        (one,) = find_experiments(tmp_path / str(num))
        (chart,) = [c for c in section_charts(one.section) if c.title.startswith("Tokens per sec")]
        assert isinstance(chart, LineChart)
        assert len(chart.curves) == 7
        assert ("the first 7 of 9 cases" in chart.caption) == (num == 9)
        assert "of 7 cases" not in chart.caption


def test_launches_are_called_interleaved_only_where_they_were(tmp_path: Path) -> None:
    folder = made_experiments.write(tmp_path, "weak", made_experiments.weak())
    text = make_report(folder).files["report.md"].decode()
    assert "15 launches, cases and arms interleaved at random, seed 7" in text
    for hour, case in enumerate(("weak_n4", "weak_n1", "weak_n2")):  # as a job array does it
        for path in (folder / "records").glob(f"{case}_*"):
            record = json.loads(path.read_text())
            started = record["started"].replace("T09", f"T1{hour}")
            path.write_text(json.dumps({**record, "started": started}))
    text = make_report(folder).files["report.md"].decode()
    assert "15 launches, each case in the order given by seed 7" in text
    assert "interleaved" not in text


def test_a_node_for_each_stage_is_what_was_supposed(tmp_path: Path) -> None:
    planted = [
        Planted("weak", 1, 100.0, batch=8),
        Planted("weak", 2, 110.0, batch=16, label="one_node"),
        Planted("weak", 2, 199.0, batch=16, num_nodes=2, label="two_nodes"),
    ]
    text = verdicts(made_experiments.write(tmp_path, "weak", planted))["weak"]
    assert "For 2 nodes: weak-scaling efficiency 0.985 (0.975–1.02), above the 0.9" in text


def test_an_experiment_without_any_result_is_reported_with_its_reasons(tmp_path: Path) -> None:
    planted = [
        dataclasses.replace(
            case, outcome="infeasible", reason="too large", failed_repeats=(1, 2, 3, 4, 5)
        )
        for case in made_experiments.strong()
    ]
    report = make_report(made_experiments.write(tmp_path, "strong", planted), hypotheses=True)
    text = report.files["report.md"].decode()
    assert text.count("**cannot be planned (5 of 5 runs): too large") == 6
    assert "Too few cases came to a result for a comparison." in text
    assert "shared one node" not in text
    (section,) = [one.section for one in find_experiments(tmp_path)]
    assert section_charts(section) == []


def test_a_flagged_run_behind_a_verdict_is_told(tmp_path: Path) -> None:
    planted = made_experiments.weak()
    planted[0] = dataclasses.replace(planted[0], flags={2: ("throttled",), 4: ("throttled",)})
    text = verdicts(made_experiments.write(tmp_path, "weak", planted))["weak"]
    assert "Of the 10 runs behind it some are flagged: throttled (2)." in text


def test_supposed_values_stand_in_the_table_on_request_only(tmp_path: Path) -> None:
    made_experiments.write(tmp_path, "batch", made_experiments.batch())
    without = make_report(tmp_path).files["report.md"].decode()
    with_them = make_report(tmp_path, hypotheses=True).files["report.md"].decode()
    assert "| 0.473 (0.459–0.478) |" in without
    assert "| 0.473 (0.459–0.478, supposed 0.43) |" in with_them


def test_without_a_case_of_size_one_nothing_supposed_is_compared(tmp_path: Path) -> None:
    made_experiments.write(tmp_path, "batch", made_experiments.batch()[1:])
    assert "no result of size 1 to compare with" in verdicts(tmp_path)["batch"]
    assert "supposed 0" not in make_report(tmp_path, hypotheses=True).files["report.md"].decode()


def test_what_the_sweep_found_is_said_in_words(tmp_path: Path) -> None:
    made_experiments.write(tmp_path, "batch", made_experiments.batch())
    text = make_report(tmp_path).files["report.md"].decode()
    assert "The highest throughput was 152 tokens/s (149–155), at a batch of 16." in text
    assert "The knee is at batch 8" in text
    assert "The largest batch that is safe is 16. A batch of 32 did not fit into memory." in text


# ---- against older records -----------------------------------------------------------------------


def test_a_regression_beyond_the_noise_is_named_and_has_its_exit_code(tmp_path: Path) -> None:
    old = made_experiments.write(tmp_path / "old", "batch", made_experiments.batch())
    new = made_experiments.write(tmp_path / "new", "batch", made_experiments.batch(0.95))
    ended = CliRunner().invoke(app, ["report", str(new), "--against", str(old)])
    assert ended.exit_code == EXIT_REGRESSION == 7
    assert (
        "worse: batch batch_4: Throughput (tokens/s): 118 (116–120) → 112 (110–114), -5.0 %"
    ) in ended.output
    assert "worse, not counted: batch batch_4: TTFT p50 (s)" in ended.output
    assert "worse: batch batch_4: TTFT" not in ended.output
    assert "Memory" not in ended.output
    text = (new / "report.md").read_text()
    assert "**worse**" in text
    assert "What has changed" in text

    ended = CliRunner().invoke(app, ["report", str(old), "--against", str(new)])
    assert ended.exit_code == 0
    assert "better: batch batch_4: Throughput" in ended.output
    assert "no regression beyond the noise" in ended.output


def test_what_else_differs_is_told_beside_a_change(tmp_path: Path) -> None:
    old = made_experiments.write(tmp_path / "old", "batch", made_experiments.batch())
    new = made_experiments.write(tmp_path / "new", "batch", made_experiments.batch(0.9))
    same = make_report(new, against=old).files["report.md"].decode()
    assert "differ:" not in same
    for path in (new / "records").iterdir():
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "commit": "7654321", "config_hash": "beef"}))
    text = make_report(new, against=old).files["report.md"].decode()
    assert "> **Note.** the commits differ: 1234567 → 7654321." in text
    assert "> **Note.** the configurations (by their hashes) differ: c0ffee → beef." in text
    assert "the hosts differ" not in text


def test_two_folders_of_one_experiment_are_told_apart(tmp_path: Path) -> None:
    for name, scale in (("first", 1.0), ("second", 2.0)):
        made_experiments.write(tmp_path / "new" / name, "batch", made_experiments.batch(scale))
        made_experiments.write(tmp_path / "old" / name, "batch", made_experiments.batch(scale))
    report = make_report(tmp_path / "new", against=tmp_path / "old")
    assert {change.kind for change in report.changes} == {"same"}
    assert "## Batch size (second)" in report.files["report.md"].decode()


def test_changes_inside_of_the_noise_are_none(tmp_path: Path) -> None:
    old = made_experiments.write(tmp_path / "old", "batch", made_experiments.batch())
    new = made_experiments.write(tmp_path / "new", "batch", made_experiments.batch(0.985))
    assert make_report(new, against=old).regressions == []


def test_a_case_that_came_to_no_result_any_more_is_a_regression(tmp_path: Path) -> None:
    planted = made_experiments.weak()
    old = made_experiments.write(tmp_path / "old", "weak", planted)
    planted[2] = dataclasses.replace(
        planted[2], outcome="failed", reason="a rank was lost", failed_repeats=(1, 2, 3, 4, 5)
    )
    new = made_experiments.write(tmp_path / "new", "weak", planted)
    assert [change.sentence for change in make_report(new, against=old).regressions] == [
        "weak weak_n4: came to no result any more: a rank was lost"
    ]


def without_repeats(folder: Path, *repeats: int, case: str = "*") -> None:
    for repeat in repeats:
        for path in (folder / "records").glob(f"{case}_r{repeat}.json"):
            path.unlink()


def test_where_nothing_could_be_judged_it_is_said_and_has_an_exit_code(tmp_path: Path) -> None:
    old = made_experiments.write(tmp_path / "old", "batch", made_experiments.batch())
    new = made_experiments.write(tmp_path / "new", "batch", made_experiments.batch(0.5))
    without_repeats(new, 4, 5)
    report = make_report(new, against=old)
    assert report.regressions == []
    assert {change.kind for change in report.changes} == {"too few runs"}
    ended = CliRunner().invoke(app, ["report", str(new), "--against", str(old)])
    assert ended.exit_code == 4
    # of 5 batches: wall clock, throughput, TTFT, 2 × ITL, memory, energy
    assert "35 figures could not be judged (fewer than 5 runs)" in ended.output
    assert "no figure could be judged" in ended.output
    assert "no regression" not in ended.output


def test_where_no_case_had_a_result_before_and_now_nothing_is_judged(tmp_path: Path) -> None:
    planted = made_experiments.batch()[-1:]  # does not fit into memory
    folder = made_experiments.write(tmp_path, "batch", planted)
    ended = CliRunner().invoke(app, ["report", str(folder), "--against", str(folder)])
    assert ended.exit_code == 4
    assert "no figure could be judged" in ended.output


def test_where_some_figures_could_be_judged_the_others_are_told(tmp_path: Path) -> None:
    old = made_experiments.write(tmp_path / "old", "batch", made_experiments.batch())
    new = made_experiments.write(tmp_path / "new", "batch", made_experiments.batch())
    without_repeats(new, 4, 5, case="batch_4")
    ended = CliRunner().invoke(app, ["report", str(new), "--against", str(old)])
    assert ended.exit_code == 0
    assert "7 figures could not be judged (fewer than 5 runs)" in ended.output
    assert "no regression beyond the noise in the other 28 figures" in ended.output


def test_fewer_ok_runs_are_a_regression(tmp_path: Path) -> None:
    planted = made_experiments.weak()[:2]
    old = made_experiments.write(tmp_path / "old", "weak", planted)
    planted[1] = dataclasses.replace(
        planted[1], outcome="failed", reason="a rank was lost", failed_repeats=(1, 2, 3, 4)
    )
    new = made_experiments.write(tmp_path / "new", "weak", planted)
    assert [change.sentence for change in make_report(new, against=old).regressions] == [
        "weak weak_n2: 1 of 5 runs are ok, and before 5 of 5: a rank was lost"
    ]
    ended = CliRunner().invoke(app, ["report", str(old), "--against", str(new)])
    assert ended.exit_code == 0
    assert "better: weak weak_n2: 5 of 5 runs are ok, and before 1 of 5\n" in ended.output


def test_a_case_that_is_gone_is_a_regression_and_a_figure_that_is_gone_is_listed(
    tmp_path: Path,
) -> None:
    planted = made_experiments.weak()
    old = made_experiments.write(tmp_path / "old", "weak", planted)
    new = made_experiments.write(tmp_path / "new", "weak", planted[:2])
    for path in (new / "records").glob("weak_n2_*"):
        record = json.loads(path.read_text())
        del record["metrics"]["itl_p95_s"]
        path.write_text(json.dumps(record))
    ended = CliRunner().invoke(app, ["report", str(new), "--against", str(old)])
    assert ended.exit_code == EXIT_REGRESSION
    assert "worse: weak weak_n4: the case is not among the new records" in ended.output
    assert (
        "not recorded: weak weak_n2: Inter-token p95 (ms) was 33.1, and is not recorded any more"
    ) in ended.output
    assert "no regression" not in ended.output


def test_runs_that_do_not_make_the_same_tokens_any_more_are_a_regression(tmp_path: Path) -> None:
    planted = [dataclasses.replace(case, tokens={}) for case in made_experiments.weak()]
    agreeing = made_experiments.write(tmp_path / "agreeing", "weak", planted)
    planted[1] = dataclasses.replace(planted[1], speed=20.0, tokens={3: "f00d"})
    differing = made_experiments.write(tmp_path / "differing", "weak", planted)
    report = make_report(differing, against=agreeing)
    assert [change.sentence for change in report.regressions] == [
        "weak weak_n2: its runs made different tokens, and before they made the same"
    ]
    kinds = {
        change.figure: change.kind for change in report.changes if change.case == "weak weak_n2"
    }
    assert kinds["Throughput (tokens/s)"] == "other tokens"
    assert kinds["Memory (GiB)"] == "same"
    ended = CliRunner().invoke(app, ["report", str(agreeing), "--against", str(differing)])
    assert ended.exit_code == 0
    assert "5 figures could not be judged (different tokens)" in ended.output
    assert "better" not in ended.output


def test_other_tokens_than_before_are_told(tmp_path: Path) -> None:
    planted = [dataclasses.replace(case, tokens={}) for case in made_experiments.weak()]
    old = made_experiments.write(tmp_path / "old", "weak", planted)
    planted[1] = dataclasses.replace(planted[1], tokens=dict.fromkeys(range(1, 6), "f00d"))
    new = made_experiments.write(tmp_path / "new", "weak", planted)
    text = make_report(new, against=old).files["report.md"].decode()
    assert "> **Note.** the tokens differ from those before: weak weak_n2." in text
    assert "the tokens differ" not in make_report(old, against=old).files["report.md"].decode()


def test_only_throughput_and_memory_of_the_figures_decide_the_exit_code(tmp_path: Path) -> None:
    old = made_experiments.write(tmp_path / "old", "weak", made_experiments.weak())
    new = made_experiments.write(tmp_path / "new", "weak", made_experiments.weak())
    for path in (new / "records").glob("weak_n2_*"):
        record = json.loads(path.read_text())
        record["metrics"]["itl_p95_s"] *= 2
        path.write_text(json.dumps(record))
    ended = CliRunner().invoke(app, ["report", str(new), "--against", str(old)])
    assert ended.exit_code == 0
    assert "worse, not counted: weak weak_n2: Inter-token p95 (ms)" in ended.output
    for path in (new / "records").glob("weak_n2_*"):
        record = json.loads(path.read_text())
        record["metrics"]["ranks"][1]["peak_rss_bytes"] *= 2
        path.write_text(json.dumps(record))
    ended = CliRunner().invoke(app, ["report", str(new), "--against", str(old)])
    assert ended.exit_code == EXIT_REGRESSION
    assert (
        "worse: weak weak_n2: Memory (GiB): 3.00 (no interval) → 6.00 (no interval)" in ended.output
    )


def test_records_of_other_cases_cannot_be_compared(tmp_path: Path) -> None:
    old = made_experiments.write(tmp_path / "old", "weak", made_experiments.weak())
    new = made_experiments.write(tmp_path / "new", "batch", made_experiments.batch())
    with pytest.raises(ConfigError, match="none of the cases of this folder"):
        make_report(new, against=old)


# ---- a single run, and what is no report ---------------------------------------------------------


def test_ranks_that_share_a_stage_are_told_apart(tmp_path: Path) -> None:
    folder = made_experiments.make_run_folder(tmp_path / "run")
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text())
    for report in metrics["ranks"]:
        report["stage"]["stage"] = 0
    path.write_text(json.dumps(metrics))
    text = make_report(folder).files["report.md"].decode()
    assert "| stage 0, rank 0 | " in text
    assert "| stage 0, rank 1 | " in text


def test_a_run_has_a_page_with_its_figures(tmp_path: Path) -> None:
    folder = made_experiments.make_run_folder(tmp_path / "run")
    files = make_report(folder).files
    figures = json.loads(files["report.json"])["figures"]
    assert figures["throughput_tokens_per_s"] == 100.0
    assert figures["cpu_percent"] == 90.0
    assert figures["gpu_percent"] == 60.0
    assert figures["wall_clock_s"] == pytest.approx(80.0)
    text = files["report.md"].decode()
    assert "| Batch size | 8 | prompts in flight at most |" in text
    assert "| read weights | 1.25 | 2.25 |" in text
    assert "| stage 1 | node0 | 42.0 | 6.00 | 3.00 | 1.80 | 4.20 | 3.00 | 2.50 | 30.0 |" in text
    assert "1234567 (changed)" in text
    assert "EPYC, 2 cores, 16.0 GiB, Linux 6.1" in text


def test_a_killed_run_has_a_page_of_what_is_left(tmp_path: Path) -> None:
    folder = made_experiments.make_run_folder(tmp_path / "run", killed=True)
    report = make_report(folder)
    text = report.files["report.md"].decode()
    assert "there is no metrics.json: the run still goes on, or it was killed" in text
    figures = json.loads(report.files["report.json"])["figures"]
    assert figures["cpu_percent"] == 90.0
    assert figures["wall_clock_s"] is None
    # 60 whole steps of 40 ms, 30 of them compute, and a torn line
    first = json.loads(report.files["report.json"])["stage_parts_s"][0]
    assert first["compute"] == pytest.approx(60 * 0.03)
    assert first["idle"] == pytest.approx(60 * 0.005)


def test_a_single_run_has_no_interval_to_compare_by(tmp_path: Path) -> None:
    folder = made_experiments.make_run_folder(tmp_path / "run")
    with pytest.raises(ConfigError, match="single run, which has no interval"):
        make_report(folder, against=folder)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no records of an experiment and no run"):
        make_report(tmp_path)
    with pytest.raises(OutputError, match="cannot be read"):
        make_report(tmp_path / "gone")
    made_experiments.write(tmp_path, "weak", made_experiments.weak())
    (tmp_path / "records" / "weak_n1_r1.json").write_text("{}")
    with pytest.raises(OutputError, match=r"weak_n1_r1\.json is not a record of this version"):
        make_report(tmp_path)


def test_without_matplotlib_there_are_tables_and_a_sentence(tmp_path: Path) -> None:
    folder = made_experiments.write(tmp_path, "weak", [Planted("weak", 1, 10.0, batch=1)])
    ended = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "out")])
    assert ended.exit_code == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "pip install &#x27;mpipipe[report]&#x27;" in text
    assert "<svg" not in text
    assert "<table>" in text


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    folder = made_experiments.write(tmp_path, "weak", made_experiments.weak())
    (tmp_path / "file").touch()
    ended = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "file")])
    assert isinstance(ended.exception, OutputError)
    assert "cannot be written" in str(ended.exception)


# ---- colours -------------------------------------------------------------------------------------


def test_each_colour_of_a_plot_stands_out_from_its_card_in_light_and_dark() -> None:
    light, dark = page.STYLE.split("@media (prefers-color-scheme: dark)")
    for sheet in (light, dark.split("} }")[0]):
        colors = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", sheet))
        for name in [f"c{number}" for number in range(7)]:
            assert contrast(colors[name], colors["card"]) >= 3, name
        for name in ("text", "quiet"):
            assert contrast(colors[name], colors["card"]) >= 4.5, name
            assert contrast(colors[name], colors["page"]) >= 4.5, name
        assert contrast(colors["warn"], colors["warn-card"]) >= 4.5


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(color: str) -> float:
    parts = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
