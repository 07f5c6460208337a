"""Which start of a run its files are asked about: the last that generated, unless one is named."""

from __future__ import annotations

from pathlib import Path

from mpipipe.errors import ConfigError
from mpipipe.logs.reading import RunFiles, find_run, number, rows, text, whole

__all__ = ["choose_attempt", "find_attempt", "last_attempt", "told_state"]

_GENERATING = {"generating", "generated"}  # events of a rank's log


def last_attempt(files: RunFiles) -> int:
    """The number of the run's last attempt, from 1."""
    listed = rows(files.document("manifest.json"), "attempts")
    # A start that ended before the manifest has left lines in the logs only.
    logged = [
        whole(line, "attempt", 1) for rank in files.ranks()[:1] for line in files.log_lines(rank)
    ]
    return max([1, len(listed), *logged])


def find_attempt(folder: Path, attempt: int | None) -> RunFiles:
    """The run, as `find_run` does; of a start that it never had there are no zeros to show.

    Raises:
        ConfigError: there was no such attempt.
        OutputError: there is no run.
    """
    files = find_run(folder)
    if attempt is not None and attempt > (last := last_attempt(files)):
        have = "1 attempt" if last == 1 else f"{last} attempts"
        raise ConfigError(
            f"there is no attempt {attempt} of {files.folder}: it has {have}; give --attempt a "
            "number up to that, or leave it out"
        )
    return files


def choose_attempt(files: RunFiles) -> int:
    """The last attempt that generated, the last of all where none has; remarked in `files`."""
    last, chosen = last_attempt(files), _last_generating(files)
    if chosen in {0, last}:
        return last
    passed_over = range(chosen + 1, last + 1)
    one = len(passed_over) == 1
    numbers = f"attempt {last}" if one else f"attempts {chosen + 1} to {last}"
    files.remark(
        f"attempt {chosen} is shown: {numbers}, after it, generated nothing "
        f"({told_state(files, last, last) or 'no word of the end'}); "
        f"--attempt {last} shows {'it' if one else 'the last'}"
    )
    return chosen


def _last_generating(files: RunFiles) -> int:
    """0: none."""
    found = [
        whole(entry, "attempt", 1)
        for entry in rows(files.document("metrics.json"), "attempts")
        if (number(entry, "generate_s") or 0.0) > 0
    ]
    for rank in files.ranks()[:1]:
        # The log may not have the event (log.level); samples are taken while generating only.
        events = (line for line in files.log_lines(rank) if text(line, "event") in _GENERATING)
        found += [whole(line, "attempt", 1) for line in events]
        found += [whole(line, "attempt", 1) for line in files.sample_lines(rank)]
    return max(found, default=0)


def told_state(files: RunFiles, attempt: int, num_attempts: int) -> str:
    """How the attempt ended: as the run summed it up, else as it said last; empty: not known."""
    told = rows(files.document("metrics.json"), "attempts")
    known = {whole(line, "attempt", -1): text(line, "state") for line in told}
    if attempt in known or attempt != num_attempts:
        return known.get(attempt, "")
    return text(files.document("status.json"), "state")
