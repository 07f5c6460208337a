"""The experiments below a folder: the folder itself, or the folders in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.errors import OutputError
from mpipipe.experiments.folder import ExperimentFolder
from mpipipe.report.rows import Section, make_section
from mpipipe.report.run_files import RunLines, read_run

if TYPE_CHECKING:
    from pathlib import Path

    from mpipipe.experiments.record import ExperimentName, Record

__all__ = ["FoundExperiment", "find_experiments"]

_ORDER: tuple[ExperimentName, ...] = ("strong", "weak", "batch", "arrangements")


@dataclass(frozen=True, slots=True)
class FoundExperiment:
    """An experiment and where it is."""

    folder: Path
    section: Section

    def run_of(self, record: Record) -> RunLines | None:
        """The record's run folder, where it is still there."""
        folder = self.folder / record.run_folder
        return read_run(folder) if record.run_folder and folder.is_dir() else None


def find_experiments(folder: Path) -> list[FoundExperiment]:
    """Of `folder` itself and of the folders in it: strong, weak, batch, arrangements.

    Raises:
        OutputError: there is no such folder, or a record of another version.
    """
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be read ({error.strerror}): give a folder that `mpipipe bench "
            "strong`, `weak`, `batch` or `arrangements` has written, or a run folder"
        ) from error
    places = [(folder, ""), *((path, path.name) for path in below)]
    found = [one for path, label in places if (one := _read(path, label)) is not None]
    return sorted(found, key=lambda one: _ORDER.index(one.section.matrix.experiment))


def _read(path: Path, label: str) -> FoundExperiment | None:
    folder = ExperimentFolder(path)
    matrix = folder.read_matrix()
    if matrix is None:
        return None
    return FoundExperiment(path, make_section(label, matrix, folder.records()))
