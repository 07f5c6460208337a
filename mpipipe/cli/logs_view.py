"""How the answers of `mpipipe logs` look: tables on the terminal, or JSON."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpipipe.logs.difference import Difference
from mpipipe.logs.facts import RunFacts
from mpipipe.logs.problems import Problem
from mpipipe.logs.prompts import MEASURES, RequestFigures
from mpipipe.logs.rates import Interval
from mpipipe.logs.reading import RunFiles
from mpipipe.logs.step_report import StepReport
from mpipipe.logs.summary import RankTime, RunTime
from mpipipe.logs.tail import LogFollower, told_line
from mpipipe.run_folder.status import duration

__all__ = [
    "show_differences",
    "show_problems",
    "show_requests",
    "show_rows",
    "show_samples",
    "show_steps",
    "show_summary",
    "show_tail",
    "show_written",
]

_POLL_S = 0.5
_MOST_COLUMNS = 8  # of ranks, side by side
_LEAST_WIDTH = 200  # of what no person reads, or a pipe: no cell is cut
_STYLES = {"error": "red", "critical": "red", "warning": "yellow", "prompt": "yellow"}


# ---- summary -------------------------------------------------------------------------------------


def show_summary(files: RunFiles, run: RunFacts, found: RunTime, *, as_json: bool) -> None:
    """Show where the time went."""
    notes = [*files.notes(), *_coverage(found)]
    if as_json:
        _print_json({"folder": str(files.folder), **found.to_dict(), "notes": notes})
        return
    hosts = dict.fromkeys(rank.host for rank in found.ranks if rank.host)
    attempt = f"attempt {found.attempt} of {found.num_attempts}"
    state = found.state or "no word of its end"
    _print(f"run       {files.folder} ({found.run or 'no id'}), {attempt}, {state}")
    _print(f"ranks     {len(found.ranks)} on {', '.join(hosts) or 'an unknown host'}")
    unexplained = found.shares["unexplained"]
    _print(
        f"time      {_seconds(found.wall_s)} wall clock, {_seconds(found.generate_s)} of them "
        f"generating; {unexplained:.1%} unexplained"
    )
    told = {name.removesuffix("_s"): value for name, value in found.time.items()}
    _print("          " + " · ".join(f"{name} {_seconds(value)}" for name, value in told.items()))
    for label, words in found.spared.words().items():
        _print(f"{label:<10}{' · '.join(words)}")
    _print(f"culprit   {found.culprit.sentence}")
    _print("")
    _show_times(found)
    _show_boot(found.ranks)
    _show_clocks(run)
    _show_notes(notes)


def _show_times(found: RunTime) -> None:
    """The seconds of each rank, by what they were used for."""
    spent = {
        name: {rank.rank: rank.seconds[name] for rank in found.ranks}
        for name in found.shares
        if any(rank.seconds[name] for rank in found.ranks)
    }
    shares = {name: f"{found.shares[name]:.1%}" for name in spent}
    walls = {rank.rank: rank.wall_s for rank in found.ranks}
    _show_by_rank("seconds", {**spent, "wall clock": walls}, {**shares, "wall clock": "100.0%"})


def _show_boot(ranks: Sequence[RankTime]) -> None:
    names = dict.fromkeys(name for rank in ranks for name in rank.boot)
    spent = {name: {rank.rank: rank.boot.get(name, 0.0) for rank in ranks} for name in names}
    if spent:
        _print("")
        _show_by_rank("boot event", spent, {})


def _show_by_rank(
    title: str, spent: Mapping[str, Mapping[int, float]], shares: Mapping[str, str]
) -> None:
    """A column per rank; of many ranks those that spent the least and the most."""
    ranks = list(next(iter(spent.values()), {}))
    if few := len(ranks) <= _MOST_COLUMNS:
        columns = [f"rank {rank}" for rank in ranks]
    else:
        columns = ["least", "median", "most", "on rank"]
    table = _table(title, *columns, *(["share"] if shares else []), left=(title,))
    for name, seconds in spent.items():
        if few:
            cells = [_seconds(seconds[rank]) for rank in ranks]
        else:
            slowest = max(ranks, key=lambda rank: seconds[rank])
            figures = (min(seconds.values()), median(seconds.values()), seconds[slowest])
            cells = [*map(_seconds, figures), str(slowest)]
        table.add_row(name, *cells, *([shares.get(name, "")] if shares else []))
    _show(table)


def _show_clocks(run: RunFacts) -> None:
    measured = {rank.rank: run.clocks.error_s(rank.rank) for rank in run.ranks if rank.rank}
    told = [f"rank {rank} ± {error * 1e6:.0f} µs" for rank, error in measured.items() if error]
    if told:
        _print("")
        _print(f"clocks    {', '.join(told)}")


def _coverage(found: RunTime) -> list[str]:
    return [
        f"rank {rank.rank}: {rank.num_steps_kept:,} of {rank.num_steps:,} steps are on record "
        "(log.steps = all keeps every one; a kill loses those of the last moment)"
        for rank in found.ranks
        if 0 < rank.num_steps_kept < rank.num_steps
    ]


# ---- the others ----------------------------------------------------------------------------------


def show_requests(files: RunFiles, figures: RequestFigures, *, whole: bool, as_json: bool) -> None:
    """Show the slowest requests; `whole`: one request with all its fields."""
    if as_json:
        _print_json({**figures.to_dict(), "notes": files.notes()})
        return
    if whole:
        for line in figures.slowest:
            for name, value in line.items():
                _print(f"{name:<19}{value}")
        if not figures.slowest:
            _print(
                "no such request has ended: without --id, `--slowest N` lists N of those that "
                "have, and `mpipipe status` tells how many are left"
            )
        return
    _print(
        f"{figures.num_completed:,} completed, {figures.num_failed:,} failed, "
        f"{figures.num_output_tokens:,} output tokens, {figures.num_preemptions:,} preemptions"
    )
    percentiles = figures.percentiles()
    table = _table("seconds", *percentiles[MEASURES[0]], left=("seconds",))
    for name, values in percentiles.items():
        table.add_row(name.removesuffix("_s"), *(_exact(value) for value in values.values()))
    _show(table)
    names = ("id", "attempt", "slot", "latency_s", "queue_s", "ttft_s", "itl_p50_s", "itl_p95_s",
             "num_prompt_tokens", "num_output_tokens", "num_preemptions")  # fmt: skip
    if figures.slowest:
        _print("")
        titles = [name.removeprefix("num_").removesuffix("_s") for name in names]
        table = _table(*titles, "ended", left=("id", "ended"))
        for line in figures.slowest:
            ended = line.get("error_kind") or line.get("finish_reason")
            table.add_row(*(_exact(line.get(name)) for name in names), str(ended))
        _show(table)
    _show_notes(files.notes())


def show_steps(files: RunFiles, report: StepReport, *, as_json: bool) -> None:
    """Show how long steps take and where they stalled."""
    if as_json:
        _print_json({**dataclasses.asdict(report), "notes": files.notes()})
        return
    _print(f"{report.num_steps:,} steps, of which {report.num_steps_kept:,} were kept")
    table = _table("rank", "stage", "phase", "steps", "tokens", "p50", "p95", "max", "compute p50",
                   "transfer p50", "bytes in/step", left=("phase",))  # fmt: skip
    several = any(row.replica for row in report.phases)
    for row in report.phases:
        times = (row.p50_s, row.p95_s, row.max_s, row.compute_p50_s, row.transfer_p50_s)
        table.add_row(
            str(row.rank),
            f"{row.replica}.{row.stage}" if several else str(row.stage),
            row.phase,
            f"{row.num_steps:,}",
            f"{row.num_tokens:,}",
            *(_milliseconds(seconds) for seconds in times),
            f"{row.bytes_in_per_step:,.0f}",
        )
    _show(table)
    _print("")
    for stall in report.stalls:
        _print(
            f"{stall.seconds:.1f} s stall at step {stall.step} ({stall.phase}, usually "
            f"{_milliseconds(stall.usual_s)}): rank {stall.rank} {stall.cause}"
        )
    if not report.stalls:
        _print("no stalls")
    _show_notes(files.notes())


def show_samples(files: RunFiles, found: Sequence[Interval], *, as_json: bool) -> None:
    """Show how the run went over time."""
    if as_json:
        _print_json({"samples": [dataclasses.asdict(one) for one in found], "notes": files.notes()})
        return
    if not found:
        _print("no samples")
        _show_notes(files.notes())
        return
    names = [name for name in found[0].values if any(one.values[name] is not None for one in found)]
    gpu = any(one.gpu for one in found)
    titles = [_title(name) for name in names]
    table = _table("rank", "from", "to", *titles, *(("GPU %", "power W") if gpu else ()))
    origin_s = min((one.since_s for one in found), default=0.0)
    for one in found:
        cells = [_amount(name, one.values[name]) for name in names]
        card = one.gpu or {}
        cells += [_exact(card.get(name)) for name in ("utilisation", "power_w")] if gpu else []
        span = (_seconds(one.since_s - origin_s), _seconds(one.until_s - origin_s))
        table.add_row(str(one.rank), *span, *cells)
    _show(table)
    _show_notes(files.notes())


def show_problems(files: RunFiles, found: Sequence[Problem], *, as_json: bool) -> None:
    """Show errors and warnings."""
    if as_json:
        _print_json({"errors": [dataclasses.asdict(one) for one in found], "notes": files.notes()})
        return
    for one in found:
        clock = one.time.replace("T", " ")[:19]
        told = Text(f"{clock} attempt {one.attempt} rank {one.rank} ")
        told.append(one.level, style=_STYLES.get(one.level, ""))
        told.append(f" {one.event}: {one.message}" if one.message else f" {one.event}")
        _show(told)
        for row in one.trace.splitlines():
            _print(f"    {row}")
    if not found:
        _print("no errors")
    _show_notes(files.notes())


def show_written(files: RunFiles, path: Path, num_events: int) -> None:
    """Say what was written."""
    _print(f"{num_events:,} events in {path}: open it at https://ui.perfetto.dev")
    _show_notes(files.notes())


def show_tail(follower: LogFollower, *, follow: bool, as_json: bool) -> None:
    """Print new events; `follow`: until interrupted."""
    while True:
        for line in follower.poll():
            _print(json.dumps(line, ensure_ascii=False) if as_json else told_line(line))
        sys.stdout.flush()
        if not follow:
            return
        time.sleep(_POLL_S)


def show_differences(
    both: Sequence[RunFiles], found: Sequence[Difference], *, as_json: bool
) -> None:
    """Show what is different."""
    notes = [f"{files.folder}: {note}" for files in both for note in files.notes()]
    if as_json:
        rows = [{**dataclasses.asdict(one), "ratio": one.ratio} for one in found]
        _print_json({"differences": rows, "notes": notes})
        return
    first, second = (str(files.folder) for files in both)
    table = _table("", "name", first, second, "ratio", left=("", "name", first, second))
    for one in found:
        ratio = "" if one.ratio is None or one.group != "figures" else f"{one.ratio:.2f}"
        digits = 4 if one.group == "figures" else 10
        told = (_told(value, digits) for value in (one.first, one.second))
        table.add_row(one.group, one.name, *told, ratio)
    _show(table) if found else _print("no differences")
    _show_notes(notes)


def show_rows(columns: Sequence[str], found: Sequence[Sequence[Any]], *, as_json: bool) -> None:
    """Show the rows of a query."""
    if as_json:
        _print_json([dict(zip(columns, row, strict=True)) for row in found])
        return
    table = _table(*columns)
    for row in found:
        table.add_row(*(_told(value) for value in row))
    _show(table)


# ---- parts ---------------------------------------------------------------------------------------


def _table(*columns: str, left: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(
            name, justify="left" if name in left else "right", overflow="fold", no_wrap=False
        )
    return table


def _show(shown: Table | Text) -> None:
    """Print without the spaces that fill each line, in colour on a terminal only."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else _LEAST_WIDTH
    console = Console(width=width, force_terminal=terminal, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(shown, soft_wrap=isinstance(shown, Text))
    _print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _print(line: str) -> None:
    print(line.encode("utf-8", "backslashreplace").decode())  # half of a surrogate pair


def _print_json(document: Any) -> None:
    _print(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def _show_notes(notes: Sequence[str]) -> None:
    if notes:
        _print("")
    for note in notes:
        _print(f"note: {note}")


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds >= 120:
        return duration(seconds)
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.3f} s"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _exact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1 else f"{value:,.2f}"
    return "-" if value is None else str(value)


def _told(value: Any, digits: int = 10) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _title(name: str) -> str:
    return name.removeprefix("num_").replace("_bytes", "").replace("_per_s", "/s").replace("_", " ")


def _amount(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if "bytes" in name:
        return f"{value / 1e6:,.1f} MB"
    is_count = name.startswith("num_") or name == "kv_pages_used"
    return f"{value:,.0f}" if is_count else f"{value:,.1f}"
