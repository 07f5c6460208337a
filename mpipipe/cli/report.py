"""`mpipipe report`: tables, plots and sentences from records; needs neither torch, MPI nor GPU."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mpipipe.errors import EXIT_OK, EXIT_PROMPTS, EXIT_REGRESSION, OutputError
from mpipipe.report.make import make_report
from mpipipe.report.numbers import count
from mpipipe.run_folder.accounts import follow_up_accounts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpipipe.report.regression import Change

__all__ = ["report_command"]


def report_command(
    folder: Path, *, out: Path | None, against: Path | None, hypotheses: bool
) -> int:
    """Write report.md, .csv, .json and .html; returns the exit code.

    Args:
        folder: records of experiments, or a run folder.
        out: where to write; None: into `folder`.
        against: older records of the same experiments; a regression is EXIT_REGRESSION, and
            EXIT_PROMPTS where no figure has runs enough to be judged.
        hypotheses: show the values that were supposed beside the measured ones.

    Raises:
        MpipipeError: there is nothing to report, or it cannot be read or written.
    """
    follow_up_accounts(folder)
    report = make_report(folder, against=against, hypotheses=hypotheses)
    place = out or folder
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, content in report.files.items():
            (place / name).write_bytes(content)
            print(place / name)
    except OSError as error:
        raise OutputError(
            f"the report cannot be written to {place} ({error.strerror}): give --out a folder that "
            "can be written"
        ) from error
    if not report.has_plots:
        print("mpipipe: warning: no plots without matplotlib (mpipipe[report])", file=sys.stderr)
    if against is None:
        return EXIT_OK
    _print_changes(report.changes)
    if report.regressions:
        return EXIT_REGRESSION
    return EXIT_OK if _num_judged(report.changes) else EXIT_PROMPTS


def _print_changes(changes: Sequence[Change]) -> None:
    """What has changed, and what could not be judged."""
    kinds = [change.kind for change in changes]
    for change in changes:
        if change.kind in {"worse", "worse, not counted", "better", "not recorded"}:
            print(f"{change.kind}: {change.sentence}")
    causes = {"too few runs": "fewer than 5 runs", "other tokens": "different tokens"}
    not_judged = {cause: kinds.count(kind) for kind, cause in causes.items() if kind in kinds}
    for cause, num in not_judged.items():
        print(f"{count(num, 'figure')} could not be judged ({cause})")
    num_judged = _num_judged(changes)
    if not num_judged:
        print("no figure could be judged, so nothing is said of regressions in speed and memory")
    elif "worse" not in kinds:
        of = f" in the other {count(num_judged, 'figure')}" if not_judged else ""
        print(f"no regression beyond the noise{of}")


def _num_judged(changes: Sequence[Change]) -> int:
    return sum(change.is_judged_figure for change in changes)
