"""The launches of an experiment, one after the other: those that have no record yet.

Warm-up: one launch that is not measured for each arrangement of ranks that still has cells to run.
It fills the machine's file cache and the caches of compiled kernels; CUDA graphs are captured by
each run itself, before it generates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mpipipe.errors import StoppedError
from mpipipe.experiments.folder import ExperimentFolder
from mpipipe.experiments.launch import RankLauncher
from mpipipe.experiments.outcome import was_stopped
from mpipipe.experiments.record import Case, Matrix, Record, RunSlot
from mpipipe.experiments.recording import Launched, build_record
from mpipipe.experiments.run_files import read_run_files

__all__ = [
    "ExperimentView",
    "Launch",
    "Launching",
    "missing_slots",
    "run_experiment",
    "warm_ups",
]

Launch = Callable[[Sequence[str], Path, float], Launched]


class ExperimentView(Protocol):
    """What is shown while an experiment runs."""

    def planned(self, matrix: Matrix, num_missing: int) -> None:
        """The matrix is as it should be; so many cells have no record."""
        ...

    def launching(self, slot: RunSlot) -> None:
        """A launch begins; repeat 0 is a warm-up."""
        ...

    def measured(self, record: Record, num_left: int) -> None:
        """A launch has ended and its record is written."""
        ...


@dataclass(frozen=True, slots=True)
class Launching:
    """How cells are run."""

    launcher: RankLauncher
    launch: Launch
    only_case: str = ""  # empty: all
    keep_runs: bool = False  # else the run folders of repeats 2, 3 … are removed, if all went well


def missing_slots(folder: ExperimentFolder, matrix: Matrix, only_case: str = "") -> list[RunSlot]:
    """The cells without a record, in the order of the matrix."""
    return [
        slot
        for slot in matrix.order
        if slot.case == (only_case or slot.case) and not folder.has_record(slot)
    ]


def run_experiment(
    folder: ExperimentFolder,
    matrix: Matrix,
    launching: Launching,
    view: ExperimentView,
) -> None:
    """Run what is missing, and keep a record of each.

    Raises:
        MpipipeError: ranks cannot be started, or a file cannot be written.
        OutputError: another process runs one of the cases.
        StoppedError: a launch was told to stop; it has no record, and runs again next time.
    """
    with ExitStack() as locks:
        wanted = missing_slots(folder, matrix, launching.only_case)
        for case in dict.fromkeys(slot.case for slot in wanted):
            locks.callback(folder.lock_case(case).close)
        _run_missing(folder, matrix, launching, view)


def _run_missing(
    folder: ExperimentFolder, matrix: Matrix, launching: Launching, view: ExperimentView
) -> None:
    missing = missing_slots(folder, matrix, launching.only_case)
    view.planned(matrix, len(missing))
    cells = _Cells(folder, matrix, launching, view)
    for slot in warm_ups(matrix, missing):
        cells.run(slot)
        folder.remove_run(slot)
    for number, slot in enumerate(missing, 1):
        launched = cells.run(slot)
        record = build_record(matrix, slot, launched, read_run_files(folder.run_folder(slot)))
        folder.keep_record(record)
        if record.outcome == "ok" and slot.repeat > 1 and not launching.keep_runs:
            folder.remove_run(slot)
        view.measured(record, len(missing) - number)


def warm_ups(matrix: Matrix, missing: Sequence[RunSlot]) -> list[RunSlot]:
    """One launch for each number of stages, lanes, replicas and nodes that has something to run."""
    of_case = {case.name: case for case in matrix.cases}
    first: dict[tuple[str, int], str] = {}
    for slot in missing:
        case = of_case[slot.case]
        first.setdefault((case.arrangement, case.num_nodes), case.name)
    return [RunSlot(name, 0) for name in first.values()]


@dataclass(frozen=True, slots=True)
class _Cells:
    folder: ExperimentFolder
    matrix: Matrix
    launching: Launching
    view: ExperimentView

    def run(self, slot: RunSlot) -> Launched:
        """Launch one cell in a folder of its own."""
        self.view.launching(slot)
        self.folder.remove_run(slot)  # of a launch that was interrupted
        case = next(case for case in self.matrix.cases if case.name == slot.case)
        launcher, log = self.launching.launcher, self.folder.launch_log(slot)
        command = launcher.command(case.num_ranks, case.num_nodes, self._words(case, slot))
        launched = self.launching.launch(command, log, self.matrix.timeout_s)
        if was_stopped(launched.exit_code):
            raise StoppedError(
                f"the run {slot.case}, repeat {slot.repeat}, was told to stop (exit code "
                f"{launched.exit_code}): give the same command again to go on"
            )
        return launched

    def _words(self, case: Case, slot: RunSlot) -> tuple[str, ...]:
        return (
            sys.executable,
            "-m",
            "mpipipe",
            "run",
            self.matrix.config,
            *self.matrix.words,
            *case.words,
            f"output.dir={self.folder.run_folder(slot).absolute()}",
            "output.resume=false",
        )
