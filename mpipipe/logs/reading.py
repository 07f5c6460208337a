"""The files of a run folder, read line by line, whatever state the run left them in.

A torn or damaged line is counted and left out; a file that is not there has no lines. Nothing is
held in memory, so a file may be larger than that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpipipe.errors import OutputError
from mpipipe.plain_values import json_object
from mpipipe.run_folder.files import holds_run
from mpipipe.run_folder.status import find_runs

__all__ = ["Line", "RunFiles", "find_run", "number", "rows", "text", "whole"]

Line = dict[str, Any]
_RANK = re.compile(r"(?:steps_|samples_|messages_)?rank_(\d+)\.")
_EXPECTED = {
    "steps_rank_0.jsonl": "no steps (nothing was generated, log.steps = none, or an older version)"
    ": nothing per step",
    "samples_rank_0.jsonl": "no samples (nothing was generated, or an older version): no figures "
    "over time, no CPU use",
    "requests.jsonl": "no requests.jsonl (no prompt has ended, or an older version): nothing per "
    "prompt",
    "clock.jsonl": "no clock.jsonl (nothing was generated, or an older version): ranks on their "
    "own clocks",
    "metrics.json": "no metrics.json (the run did not end in order): sums are of the lines that it "
    "wrote, and what came after the last step counts as shutdown",
    "manifest.json": "no manifest.json (the run ended before it had its folder): no configuration",
}


def find_run(place: Path) -> RunFiles:
    """The run at `place`: a run folder, or a folder with runs, of which the latest counts.

    Raises:
        OutputError: there is no run.
    """
    try:
        if not place.is_dir():
            raise OutputError(f"there is no folder {place}: give a run folder")
        if holds_run(place):
            return RunFiles(place)
        found = find_runs(place)
    except OSError as error:
        raise OutputError(
            f"{place} cannot be looked at ({error.strerror}): give a run folder"
        ) from error
    if not found:
        raise OutputError(
            f"{place} holds no run, and no folder right below it does: give the run folder, which "
            "`mpipipe run` prints at its end"
        )
    return RunFiles(found[-1])


class RunFiles:
    """The files of one run.

    Attributes:
        folder: where they are.
        torn: by file name, how many lines could not be used so far.
        remarks: what a reader has to say of the answers, a sentence each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.torn: dict[str, int] = {}
        self.remarks: list[str] = []

    def ranks(self) -> list[int]:
        """The ranks that have left a log, steps or samples."""
        found = (_RANK.match(path.name) for path in self.folder.glob("*rank_*"))
        return sorted({int(match[1]) for match in found if match})

    def lines(self, name: str, attempt: int | None = None) -> Iterator[Line]:
        """The lines of a file, in its order; of one attempt, or of all.

        Raises:
            OutputError: it is there, but cannot be read.
        """
        path = self.folder / name
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                for row in file:
                    if (line := json_object(row)) is None:
                        self.add_torn(name)
                    elif attempt is None or line.get("attempt", 1) == attempt:
                        yield line
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(
                f"{path} cannot be read ({error.strerror}): copy the run folder to a place where "
                "it can"
            ) from error

    def log_lines(self, rank: int, attempt: int | None = None) -> Iterator[Line]:
        """The events of a rank."""
        return self.lines(f"rank_{rank}.log", attempt)

    def step_lines(self, rank: int, attempt: int | None = None) -> Iterator[tuple[str, Line]]:
        """The steps of a rank with the file they are in, the oldest file first."""
        kept_all = sorted(path.name for path in self.folder.glob(f"steps_rank_{rank}.all*.jsonl"))
        for name in (*kept_all, f"steps_rank_{rank}.1.jsonl", f"steps_rank_{rank}.jsonl"):
            for line in self.lines(name, attempt):
                yield name, line

    def sample_lines(self, rank: int, attempt: int | None = None) -> Iterator[Line]:
        """The samples of a rank."""
        return self.lines(f"samples_rank_{rank}.jsonl", attempt)

    def message_lines(self, rank: int, attempt: int | None = None) -> Iterator[Line]:
        """The control messages of a rank, the oldest first."""
        for mark in (".1", ""):
            yield from self.lines(f"messages_rank_{rank}{mark}.jsonl", attempt)

    def document(self, name: str) -> Line:
        """A JSON file; empty when it is missing or damaged (then it is counted as torn)."""
        try:
            document = json_object((self.folder / name).read_text("utf-8", errors="replace"))
        except OSError:
            return {}
        if document is None:
            self.add_torn(name)
            return {}
        return document

    def add_torn(self, name: str) -> None:
        """Count a line of a file that is of no use."""
        self.torn[name] = self.torn.get(name, 0) + 1

    def remark(self, sentence: str) -> None:
        """Have `sentence` told beside the answers, once."""
        if sentence not in self.remarks:
            self.remarks.append(sentence)

    def notes(self) -> list[str]:
        """The remarks, what is missing and what was left out, a sentence each."""
        notes = [*self.remarks]
        notes += [
            sentence for name, sentence in _EXPECTED.items() if not (self.folder / name).exists()
        ]
        notes += [
            f"{name}: {count} torn or damaged line{'s' if count > 1 else ''} left out"
            for name, count in sorted(self.torn.items())
        ]
        return notes


def number(line: Line, name: str) -> float | None:
    """A field that is a number; None for anything else."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e18 else None  # no infinity, and not what is not a number


def whole(line: Line, name: str, default: int = 0) -> int:
    """A field that is an integer; `default` for anything else."""
    value = line.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def text(line: Line, name: str) -> str:
    """A field that is a text; empty for anything else."""
    value = line.get(name)
    return value if isinstance(value, str) else ""


def rows(document: Line, name: str) -> list[Line]:
    """The objects of a list in `document`; empty for anything else."""
    value = document.get(name)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
