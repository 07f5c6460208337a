"""A folder's report: its files as bytes, a function of what is in the folder and of nothing else.

No time of now, no path of this machine: the same records give the same files anywhere. The plots
need matplotlib; without it the tables and a sentence are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipipe.errors import ConfigError, OutputError
from mpipipe.report.charts import Chart
from mpipipe.report.document import Block, Document, Drawing, Heading, Notice, Text
from mpipipe.report.experiment_files import FoundExperiment, find_experiments
from mpipipe.report.experiment_section import (
    TITLES,
    blocks_after_plots,
    blocks_before_plots,
    section_charts,
)
from mpipipe.report.figures import FIGURES
from mpipipe.report.hypotheses import verdict
from mpipipe.report.markdown import markdown
from mpipipe.report.page import page
from mpipipe.report.plots import can_draw, draw
from mpipipe.report.regression import (
    Change,
    changes_between,
    changes_table,
    other_conditions,
    regressions,
)
from mpipipe.report.rows import Row
from mpipipe.report.run_files import RunLines, read_run
from mpipipe.report.run_section import (
    plain_run,
    run_blocks_after_plots,
    run_blocks_before_plots,
    run_charts,
)
from mpipipe.report.tables import csv_text, meanings_table, plain_row
from mpipipe.report.timeline import occupancy_charts

__all__ = ["Report", "make_report"]

_SCHEMA = 1
_NO_PLOTS = (
    "the plots are left out, as matplotlib is not installed: pip install 'mpipipe[report]', and "
    "make the report again from the same folder."
)
_READING = (
    "Each figure is the median over the runs of a case, with its interval. Nothing is called "
    "faster or slower inside of the intervals. The tables are also in report.csv and report.json."
)


@dataclass(frozen=True, slots=True)
class Report:
    """What `mpipipe report` writes and says."""

    files: Mapping[str, bytes]  # by their names
    changes: tuple[Change, ...]  # against the older records; empty without
    has_plots: bool

    @property
    def regressions(self) -> list[Change]:
        """What became worse beyond the noise."""
        return regressions(self.changes)


def make_report(folder: Path, *, against: Path | None = None, hypotheses: bool = False) -> Report:
    """The report of the experiments in `folder`, or of the run that it holds.

    Args:
        folder: written by `mpipipe bench strong | weak | batch | arrangements`, or several such
            folders in it, or a run folder.
        against: older records of the same experiments.
        hypotheses: show the supposed values in the tables.

    Raises:
        OutputError: `folder` or `against` holds neither, or cannot be read.
        ConfigError: the two have no case in common, or `folder` is one run.
    """
    found = find_experiments(folder)
    if found:
        comparison = _compare(found, against) if against is not None else _Comparison()
        return _experiments_report(found, comparison, hypotheses=hypotheses)
    if not any((folder / name).is_file() for name in ("manifest.json", "metrics.json")):
        raise OutputError(
            f"{folder} holds no records of an experiment and no run: give a folder that "
            "`mpipipe bench strong`, `weak`, `batch` or `arrangements` has written, or a run folder"
        )
    if against is not None:
        raise ConfigError(
            f"{folder} is a single run, which has no interval to compare by: compare two runs with "
            "`mpipipe logs diff`, or experiments with --against"
        )
    return _run_report(read_run(folder))


@dataclass(frozen=True, slots=True)
class _Comparison:
    """With older records; empty without."""

    changes: tuple[Change, ...] = ()
    remarks: tuple[str, ...] = ()

    def blocks(self) -> list[Block]:
        """What the page says of it."""
        if not self.changes:
            return []
        notices = [Notice(remark) for remark in self.remarks]
        return [Heading("What has changed"), *notices, changes_table(self.changes)]


def _compare(found: Sequence[FoundExperiment], against: Path) -> _Comparison:
    before, now = _named_rows(find_experiments(against)), _named_rows(found)
    if not before.keys() & now.keys():
        raise ConfigError(
            f"--against {against}: it has none of the cases of this folder ({', '.join(now)}), so "
            "there is nothing to compare: give records of the same experiments"
        )
    return _Comparison(tuple(changes_between(before, now)), tuple(other_conditions(before, now)))


def _named_rows(found: Sequence[FoundExperiment]) -> dict[str, Row]:
    """The rows by names that another folder of the same experiments has, too."""
    return {f"{one.section.name} {row.case.name}": row for one in found for row in one.section.rows}


def _experiments_report(
    found: Sequence[FoundExperiment], comparison: _Comparison, *, hypotheses: bool
) -> Report:
    sections = [one.section for one in found]
    blocks: list[Block] = [Text(_READING), *_plots_notice(), *comparison.blocks()]
    number = 0
    for one in found:
        charts = [*section_charts(one.section), *_occupancy(one)]
        blocks += blocks_before_plots(one.section, hypotheses=hypotheses)
        blocks += _drawings(charts, number)
        blocks += blocks_after_plots(one.section)
        number += len(charts)
    blocks += [Heading("Columns"), meanings_table()]
    names = dict.fromkeys(TITLES[section.matrix.experiment] for section in sections)
    document = Document(f"mpipipe: {', '.join(names)}", tuple(blocks))
    rows = [
        plain_row(section.matrix.experiment, row) for section in sections for row in section.rows
    ]
    verdicts = [
        {"experiment": section.matrix.experiment, "arm": arm, "text": verdict(name, found_rows)}
        for section in sections
        for name in [section.matrix.experiment]
        for arm, found_rows in section.arms.items()
    ]
    sentences = [change.sentence for change in regressions(comparison.changes)]
    values = {"schema": _SCHEMA, "rows": rows, "verdicts": verdicts, "regressions": sentences}
    return _report(document, values, csv_text(rows), comparison.changes)


def _occupancy(found: FoundExperiment) -> list[Chart]:
    """Of a run with the most stages, and of these the largest, whose folder is still there."""
    rows = sorted(found.section.rows, key=lambda row: (-row.case.num_stages, -row.size))
    for run in (run for row in rows for run in row.done):
        files = found.run_of(run)
        if files is not None and files.steps:
            return list(occupancy_charts(files, run.name))
    return []


def _run_report(run: RunLines) -> Report:
    blocks = [
        *_plots_notice(),
        *run_blocks_before_plots(run),
        *_drawings(run_charts(run), 0),
        *run_blocks_after_plots(run),
    ]
    name = run.manifest.get("run")
    document = Document(f"mpipipe: run {name}" if name else "mpipipe: a run", tuple(blocks))
    values = plain_run(run)
    found = values["figures"]
    lines = [",".join(figure.key for figure in FIGURES)]
    lines += [",".join("" if (v := found[f.key]) is None else repr(v) for f in FIGURES)]
    return _report(document, {"schema": _SCHEMA, **values}, "\n".join(lines) + "\n", ())


def _plots_notice() -> list[Block]:
    return [] if can_draw() else [Notice(_NO_PLOTS)]


def _drawings(charts: Sequence[Chart], first: int) -> list[Block]:
    if not can_draw():
        return []
    return [
        Drawing(chart.title, chart.caption, draw(chart, number))
        for number, chart in enumerate(charts, first)
    ]


def _report(
    document: Document, values: dict[str, Any], csv: str, changes: Sequence[Change]
) -> Report:
    texts = {
        "report.md": markdown(document),
        "report.csv": csv,
        "report.json": json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
        "report.html": page(document),
    }
    files = {name: text.encode() for name, text in texts.items()}
    return Report(files, tuple(changes), can_draw())
