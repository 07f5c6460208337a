"""`mpipipe report`: tables, plots and sentences from records; needs neither torch, MPI nor GPU."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mpipipe.errors import EXIT_OK, EXIT_REGRESSION, OutputError
from mpipipe.report.make import make_report
from mpipipe.run_folder.accounts import follow_up_accounts

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["report_command"]


def report_command(
    folder: Path, *, out: Path | None, against: Path | None, hypotheses: bool
) -> int:
    """Write report.md, .csv, .json and .html; returns the exit code.

    Args:
        folder: records of experiments, or a run folder.
        out: where to write; None: into `folder`.
        against: older records of the same experiments; a regression is EXIT_REGRESSION.
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
    for change in report.changes:
        if change.kind in {"worse", "better"}:
            print(f"{change.kind}: {change.sentence}")
    if against is not None and not report.regressions:
        print("no regression beyond the noise")
    return EXIT_REGRESSION if report.regressions else EXIT_OK
