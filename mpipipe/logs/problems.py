"""The warnings and errors of all ranks, in the order in which they happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpipipe.logs.attempts import last_attempt
from mpipipe.logs.clocks import read_clocks
from mpipipe.logs.reading import Line, RunFiles, number, rows, text, whole

__all__ = ["Problem", "find_problems"]

_LEVELS = {"warning", "error", "critical"}
_KNOWN = {
    "time", "t_s", "level", "event", "host", "run", "attempt", "job", "replica", "rank", "stage",
    "exception", "error", "message", "kind",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """One warning or error, or one prompt that failed."""

    t_s: float  # on rank 0's clock
    time: str  # as the rank wrote it, UTC
    attempt: int
    rank: int
    level: str
    event: str
    message: str
    trace: str  # of the error, if it was logged with it


def find_problems(files: RunFiles, *, with_warnings: bool) -> list[Problem]:
    """All errors of the run, and the warnings too if wanted; those of all attempts."""
    found: list[Problem] = []
    for rank in files.ranks():
        for line in files.log_lines(rank):
            level, failed = text(line, "level"), line.get("error") is not None
            if level in _LEVELS and (with_warnings or level != "warning"):
                found.append(_problem(line, rank, level))
            elif failed and text(line, "event") == "completed":
                found.append(_problem(line, rank, "prompt"))
    found += _told_of_earlier_attempts(files, found)
    found += _told_of_the_run(files, found)
    clocks = {
        attempt: read_clocks(files.lines("clock.jsonl", attempt))
        for attempt in {problem.attempt for problem in found}
    }
    return sorted(
        found,
        key=lambda problem: (
            problem.attempt,
            clocks[problem.attempt].on_head(problem.rank, problem.t_s),
        ),
    )


def _told_of_the_run(files: RunFiles, found: Sequence[Problem]) -> list[Problem]:
    """What ended the run, where no rank lived to log it: its supervisor wrote it down."""
    status = files.document("status.json")
    message = text(status, "error")
    if text(status, "state") != "failed" or any(message in problem.message for problem in found):
        return []
    return [_end_of(files, last_attempt(files), message, text(status, "updated_at"))]


def _told_of_earlier_attempts(files: RunFiles, found: Sequence[Problem]) -> list[Problem]:
    """The same of attempts before: the manifest keeps it, as each has replaced the status."""
    ended = []
    for place, entry in enumerate(rows(files.document("manifest.json"), "attempts"), 1):
        attempt, message = whole(entry, "attempt", place), text(entry, "error")
        of_it = (problem.message for problem in found if problem.attempt == attempt)
        if message and not any(message in told for told in of_it):
            ended.append(_end_of(files, attempt, message, ""))
    return ended


def _end_of(files: RunFiles, attempt: int, message: str, time: str) -> Problem:
    """At the head's last sign of that attempt; `time`: as told, or empty: of that sign."""
    lines = list(files.log_lines(0, attempt))
    last_s = max((number(line, "t_s") or 0.0 for line in lines), default=0.0)
    time = time or (text(lines[-1], "time") if lines else "")
    return Problem(last_s, time, attempt, 0, "error", "run failed", message, "")


def _problem(line: Line, rank: int, level: str) -> Problem:
    message = text(line, "error") or text(line, "message")
    fields = {name: value for name, value in line.items() if name not in _KNOWN}
    if fields:
        told = ", ".join(f"{name}={value}" for name, value in fields.items())
        message = f"{message} ({told})" if message else told
    kind = text(line, "kind")
    return Problem(
        t_s=number(line, "t_s") or 0.0,
        time=text(line, "time"),
        attempt=whole(line, "attempt", 1),
        rank=rank,
        level=level,
        event=text(line, "event"),
        message=f"{kind}: {message}" if kind else message,
        trace=text(line, "exception"),
    )
