"""The folder of an experiment: its matrix, a record of each launch that has ended, the run folders.

Layout: `experiment.json`, `records/<case>_r<repeat>.json`, `runs/<case>_r<repeat>/` with what the
launch printed beside it as `.log`, `runs/<case>.lock` while a process runs that case,
`prompts.jsonl` where prompts were made, `best.toml` after a batch experiment. Invariants: matrix
and records are written whole, once; one process runs a case.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from mpipipe.errors import ConfigError, OutputError
from mpipipe.experiments.matrix import differences
from mpipipe.experiments.record import Matrix, Record, RunSlot, record_name
from mpipipe.experiments.recording import RUNS_FOLDER
from mpipipe.plain_values import from_json, to_json
from mpipipe.run_folder.files import sync_folder, told_as_output, write_whole
from mpipipe.run_folder.lock import FolderLock, lock_file
from mpipipe.topology.host import host_name

__all__ = ["ExperimentFolder"]

_MATRIX = "experiment.json"
_RECORDS = "records"
_AGAIN = "free space and give the same command again: what has a record is not run again"


class ExperimentFolder:
    """One experiment on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def prompts_path(self) -> Path:
        """Where generated prompts go."""
        return self.path / "prompts.jsonl"

    @property
    def best_path(self) -> Path:
        """Where the configuration of the best batch goes."""
        return self.path / "best.toml"

    def run_folder(self, slot: RunSlot) -> Path:
        """The run folder of a launch."""
        return self.path / RUNS_FOLDER / record_name(slot.case, slot.repeat)

    def launch_log(self, slot: RunSlot) -> Path:
        """What a launch printed."""
        folder = self.run_folder(slot)
        return folder.with_name(f"{folder.name}.log")

    def read_matrix(self) -> Matrix | None:
        """The matrix; None: there is none yet.

        Raises:
            OutputError: the file cannot be read, or is of another version.
        """
        path = self.path / _MATRIX
        try:
            return from_json(Matrix, path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{path} is not the matrix of an experiment of this version ({error}): choose "
                "another folder with --out"
            ) from error

    def keep_matrix(self, matrix: Matrix) -> None:
        """Write the matrix, or check that the one that is there is the same.

        Raises:
            ConfigError: another experiment is there; says what differs.
            OutputError: it cannot be read or written.
        """
        earlier = self.read_matrix()
        if earlier is None:
            self._make_folders()
            write_whole(self.path / _MATRIX, (to_json(matrix, indent=2) + "\n").encode())
        elif changed := differences(earlier, matrix):
            raise ConfigError(
                f"{self.path} holds another experiment ({'; '.join(changed[:5])}), and its records "
                "cannot be mixed with others: choose another folder with --out, or give the same "
                "command again"
            )
        else:
            self._make_folders()  # again: they may have been removed to repeat everything

    def _make_folders(self) -> None:
        for folder in (_RECORDS, RUNS_FOLDER):
            with told_as_output(self.path / folder, "made", _AGAIN):
                (self.path / folder).mkdir(parents=True, exist_ok=True)

    def records(self) -> list[Record]:
        """All records, in the order of their launches.

        Raises:
            OutputError: one cannot be read.
        """
        found = []
        for path in sorted((self.path / _RECORDS).glob("*.json")):
            try:
                found.append(Record.from_json(path.read_bytes()))
            except (OSError, ValueError) as error:
                raise OutputError(
                    f"{path} is not a record of this version ({error}): remove it, and give the "
                    "same command again to repeat its run"
                ) from error
        return sorted(found, key=lambda record: record.order)

    def has_record(self, slot: RunSlot) -> bool:
        """Whether the launch has ended with a result."""
        return (self.path / _RECORDS / f"{record_name(slot.case, slot.repeat)}.json").exists()

    def lock_case(self, case: str) -> FolderLock:
        """Keep other processes from launching `case` until the lock is closed.

        Raises:
            OutputError: another one runs it.
        """
        path = self.path / RUNS_FOLDER / f"{case}.lock"
        lock, held = lock_file(path)
        if held is False:
            holder = ""
            with contextlib.suppress(OSError):
                holder = path.read_text(encoding="utf-8", errors="replace")
            raise OutputError(
                f"{holder or 'another process'} runs the case {case} of {self.path}, and two would "
                "remove each other's run folders: wait until it has ended, or end it, and give "
                "the same command again"
            )
        job = os.environ.get("SLURM_JOB_ID")
        of_job = f" in the Slurm job {job}" if job else ""
        lock.tell(f"the process {os.getpid()} on {host_name()}{of_job}")
        return lock

    def keep_record(self, record: Record) -> None:
        """Write a record.

        Raises:
            OutputError: it cannot be written, or is there already.
        """
        path = self.path / _RECORDS / f"{record.name}.json"
        partial = path.with_name(f"{record.name}_{host_name()}_{os.getpid()}.partial")
        with told_as_output(path, remedy=_AGAIN):
            try:
                with partial.open("wb") as file:
                    file.write(record.to_json().encode())
                    file.flush()
                    os.fsync(file.fileno())
                os.link(partial, path)
            except FileExistsError as error:
                raise OutputError(
                    f"{path} exists: another process runs the same experiment; let it finish first"
                ) from error
            finally:
                with contextlib.suppress(OSError):  # it may be what fills the disk
                    partial.unlink(missing_ok=True)
            sync_folder(path.parent)

    def remove_run(self, slot: RunSlot) -> None:
        """Remove the run folder of a launch and what it printed, if they are there.

        Raises:
            OutputError: something in it cannot be removed.
        """
        folder = self.run_folder(slot)
        with told_as_output(folder, "removed", _AGAIN):
            if folder.exists():
                shutil.rmtree(folder)
            self.launch_log(slot).unlink(missing_ok=True)
