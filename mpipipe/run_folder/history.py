"""What earlier attempts of a run did; of one that was killed, from the files that it left.

The manifest's list of attempts is the memory: each attempt completes, when it starts, the entries
before it, from `metrics.json` where that attempt ended in order. Else it is recovered: the prompts
and tokens are those that came into the journal between its start and the next, so that each counts
once; its times end with the last line that the head wrote for it. Whatever cannot be read counts as
nothing: no run is refused for its history.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mpipipe.checkpoint.jsonfile import read_json_object
from mpipipe.errors import CheckpointError
from mpipipe.metrics.attempts import DONE, INTERRUPTED, STOPPED, AttemptState, AttemptTotals
from mpipipe.metrics.identity import is_run_id
from mpipipe.plain_values import json_object
from mpipipe.run_folder.lock import last_status
from mpipipe.run_folder.status_file import RunState

if TYPE_CHECKING:
    from pathlib import Path

    from mpipipe.run_folder.journal import KeptRecords

__all__ = ["finished_metrics", "generated_metrics", "kept_counts", "last_logged", "told_attempts"]

# Of rank 0, whose clock the attempt's start is told by; all of them are appended to.
_HEAD_LOG = "rank_0.log"
_HEAD_FILES = (_HEAD_LOG, "requests.jsonl", "samples_rank_0.jsonl")
_MOST = 1e15
_TAIL_BYTES = 1 << 20  # a line with the summary of many ranks may be long
_BEGAN = "generating"  # the event that begins the generate phase


def kept_counts(records: KeptRecords) -> dict[str, int]:
    """What an attempt finds in the journal when it starts: fields of its entry in the manifest."""
    return {
        "num_kept": len(records.checksums),
        "num_kept_failed": records.num_failed,
        "num_kept_output_tokens": records.num_output_tokens,
    }


def told_attempts(
    folder: Path, attempts: Sequence[Mapping[str, Any]], records: KeptRecords
) -> tuple[Mapping[str, Any], ...]:
    """The manifest's `attempts`, each with the fields of its `AttemptTotals`.

    Args:
        folder: of the run.
        attempts: as the manifest of the last attempt tells them.
        records: the journal as it is now.
    """
    ended = _ended_attempts(folder)
    told = []
    for position, entry in enumerate(attempts, 1):
        # A start that ended before its manifest has a number, and no entry.
        number = max(position, int(_number(entry.get("attempt"))))
        totals = AttemptTotals.from_plain(entry) or ended.get(number)
        if totals is None:
            is_last = position == len(attempts)
            after = kept_counts(records) if is_last else attempts[position]
            totals = _recovered(folder, number, entry, after, _state(folder, is_last=is_last))
        told.append({**entry, **dataclasses.asdict(totals)})
    if told and (error := _failure(folder, told[-1]["attempt"])):
        told[-1]["error"] = error
    return tuple(told)


def _failure(folder: Path, number: int) -> str:
    """What ended that attempt, the last, as its status tells: the next one's replaces that."""
    status, logged = last_status(folder), last_logged(folder)[0]
    is_its_own = logged in {0, number}  # and not that of a start that has no entry
    if not is_its_own or status.get("state") != RunState.FAILED.value:
        return ""
    return str(status.get("error", ""))


def last_logged(folder: Path) -> tuple[int, str]:
    """The attempt that wrote to the head's log last, and the run's id there; 0 and empty: none.

    A start that ended between opening its log and writing the manifest is known from there only.
    """
    tail = b""
    with suppress(OSError), (folder / _HEAD_LOG).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        tail = file.read(_TAIL_BYTES)
    for raw in reversed(tail.splitlines()):
        line = json_object(raw) or {}
        if attempt := int(_number(line.get("attempt"))):
            run = line.get("run")
            return attempt, run if is_run_id(run) else ""
    return 0, ""


def finished_metrics(folder: Path) -> dict[str, Any] | None:
    """`metrics.json` of the attempt that did the last of the run; None: it does not tell that."""
    metrics = generated_metrics(folder)
    return metrics if metrics is not None and metrics.get("state") == DONE else None


def generated_metrics(folder: Path) -> dict[str, Any] | None:
    """`metrics.json` if it has the figures of an attempt that has generated; else None."""
    with suppress(CheckpointError):
        metrics = read_json_object(folder / "metrics.json")
        ranks, phases = metrics.get("ranks"), metrics.get("phases")
        if isinstance(ranks, list) and ranks and isinstance(phases, dict):
            return metrics if _number(phases.get("generate_s")) > 0 else None
    return None


def _ended_attempts(folder: Path) -> dict[int, AttemptTotals]:
    """By number, what the attempts up to the last that ended in order have told."""
    with suppress(CheckpointError):
        entries = read_json_object(folder / "metrics.json").get("attempts")
        told = map(AttemptTotals.from_plain, entries if isinstance(entries, list) else ())
        return {totals.attempt: totals for totals in told if totals is not None}
    return {}


def _state(folder: Path, *, is_last: bool) -> AttemptState:
    """One that was told to stop while it booted has no metrics, but a status."""
    was_stopped = is_last and last_status(folder).get("state") == RunState.STOPPED.value
    return STOPPED if was_stopped else INTERRUPTED


def _recovered(
    folder: Path,
    number: int,
    entry: Mapping[str, Any],
    after: Mapping[str, Any],
    state: AttemptState,
) -> AttemptTotals:
    num_kept, num_failed, num_tokens = (
        max(0, _number(after.get(name)) - _number(entry.get(name)))
        for name in ("num_kept", "num_kept_failed", "num_kept_output_tokens")
    )
    started_s = _number(entry.get("t_s"))
    last_s, began_s = started_s, None
    for line in _lines_of(folder, number):
        last_s = max(last_s, _number(line.get("t_s")))
        if line.get("event") == _BEGAN:
            began_s = _number(line.get("t_s"))
    return AttemptTotals(
        attempt=number,
        state=state,
        wall_s=last_s - started_s if started_s else 0.0,
        generate_s=0.0 if began_s is None else last_s - began_s,
        num_completed=max(0, int(num_kept - num_failed)),
        num_failed=int(num_failed),
        num_output_tokens=int(num_tokens),
    )


def _lines_of(folder: Path, number: int) -> Iterator[Mapping[str, Any]]:
    """Of each file of the head the line that begins generating, and the last, of one attempt."""
    mark, began = b'"attempt": %d,' % number, b'"event": "%b"' % _BEGAN.encode()
    for name in _HEAD_FILES:
        last = b""
        with suppress(OSError), (folder / name).open("rb") as file:
            for raw in file:
                if mark not in raw or not raw.endswith(b"\n"):
                    continue
                last = raw
                if began in raw:
                    yield json_object(raw) or {}
        yield json_object(last) or {}


def _number(value: object) -> float:
    """0 for whatever no run has written; a number in a file may be of any size."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    return float(value) if 0 <= value < _MOST else 0.0
