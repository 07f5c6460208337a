"""`mpipipe doctor`: prints what the doctor found; the head does, all ranks exit alike."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from mpipipe.clock import MonotonicClock
from mpipipe.doctor.examine import run_doctor
from mpipipe.doctor.finding import DoctorReport, Finding, Severity
from mpipipe.progress import run_async

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["doctor_command", "print_report"]

_MARKS = {
    Severity.OK: ("ok", "green"),
    Severity.WARNING: ("warning", "yellow"),
    Severity.FATAL: ("fatal", "bold red"),
}
_NARROWEST = 40  # columns for the text, however narrow the terminal


def doctor_command(
    config: Path | None, overrides: Sequence[str], *, as_json: bool, quick: bool, debug: bool
) -> int:
    """Examine and print; returns the exit code.

    Raises:
        MpipipeError: a rank was lost on the way.
    """
    report, exit_code = run_async(
        run_doctor(config, overrides, MonotonicClock(), quick=quick, debug=debug)
    )
    if report is not None and as_json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False), flush=True)
    elif report is not None:
        print_report(report, Console(highlight=False))
    return exit_code


@dataclass(slots=True)
class _Row:
    """Equal findings of several ranks."""

    finding: Finding
    ranks: list[int] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)

    def where(self, report: DoctorReport) -> str:
        """The ranks or hosts concerned; empty: all of them, or the job as a whole."""
        if self.ranks and len(self.ranks) < report.num_ranks:
            who = f"rank{'s' * (len(self.ranks) > 1)} {_ranges(self.ranks)}"
            return f"{who} on {self.hosts[0]}" if len(self.hosts) == 1 else who
        if self.ranks or len(self.hosts) == len(report.hosts):
            return ""
        return ", ".join(self.hosts[:4]) + (" …" if len(self.hosts) > 4 else "")


def print_report(report: DoctorReport, console: Console) -> None:
    """One line per finding that is OK; cause and remedy below the others; a verdict at the end."""
    rows = _rows(report.findings)
    mark_width = max(len(mark) for mark, _ in _MARKS.values())
    check_width = max((len(row.finding.check) for row in rows), default=0)
    indent = mark_width + check_width + 4
    for row in rows:
        mark, style = _MARKS[row.finding.severity]
        where = row.where(report)
        lines = [f"{where}: {row.finding.what}" if where else row.finding.what]
        if row.finding.severity is not Severity.OK:
            lines += [f"cause: {row.finding.cause}"] if row.finding.cause else []
            lines += [f"remedy: {row.finding.remedy}"] if row.finding.remedy else []
        console.print(
            Text(mark.ljust(mark_width), style=style)
            .append(f"  {row.finding.check:<{check_width}}  ", style="default")
            .append(_indented(lines, indent, console), style="default"),
            soft_wrap=True,
        )
    console.print(_verdict(report, rows), soft_wrap=True)


def _indented(lines: Sequence[str], indent: int, console: Console) -> str:
    """The lines below each other; wrapped on a terminal, whole in a job's output file."""
    if console.is_terminal:
        width = max(_NARROWEST, console.width - indent)
        lines = [
            part
            for line in lines
            for part in textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        ]
    return f"\n{' ' * indent}".join(lines)


def _rows(findings: Iterable[Finding]) -> list[_Row]:
    """Findings that say the same of several ranks or hosts become one row, at the first's place."""
    rows: dict[tuple[str, ...], _Row] = {}
    for finding in findings:
        key = (finding.check, finding.severity.value, finding.what, finding.cause, finding.remedy)
        row = rows.setdefault(key, _Row(finding))
        if finding.rank is not None and finding.rank not in row.ranks:
            row.ranks.append(finding.rank)
        if finding.host and finding.host not in row.hosts:
            row.hosts.append(finding.host)
    groups = list(dict.fromkeys(row.finding.group for row in rows.values()))
    return sorted(rows.values(), key=lambda row: groups.index(row.finding.group))


def _ranges(numbers: Sequence[int]) -> str:
    """`0–3, 5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)


def _verdict(report: DoctorReport, rows: Sequence[_Row]) -> Text:
    counts = [
        f"{sum(row.finding.severity is severity for row in rows)} {_MARKS[severity][0]}"
        for severity in Severity
    ]
    verdicts = {
        Severity.OK: "All is well.",
        Severity.WARNING: "It will run; see the warnings.",
        Severity.FATAL: "A job would be lost here.",
    }
    word, style = verdicts[report.worst], _MARKS[report.worst][1]
    text = Text(word, style=style)
    return text.append(f" {', '.join(counts)}, in {report.elapsed_s:.1f} s.", style="default")
