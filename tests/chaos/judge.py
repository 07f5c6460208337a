"""What must hold after a blow: pure checks of records and of ends. Nothing is started here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["End", "Expected", "completions_faults", "end_faults", "num_records"]

Tokens = Mapping[str, Sequence[int]]  # prompt id → token ids of the undisturbed run, in order


@dataclass(frozen=True, slots=True)
class Expected:
    """What may come after a blow.

    A run that has nothing left to do may always end with 0: the blow came too late.
    """

    exit_codes: frozenset[int]
    limit_s: float  # from the blow to the end of the last process


@dataclass(frozen=True, slots=True)
class End:
    """How one run ended."""

    exit_code: int | None  # negative: the signal that ended the launcher; None: it did not end
    seconds: float  # from the blow, or from the start where none was dealt
    left: Sequence[str] = ()  # processes of the run that were still there at the limit
    output: str = ""  # the end of what it said


def end_faults(end: End, expected: Expected, *, is_complete: bool) -> list[str]:
    """What is wrong with an end. `is_complete`: every prompt has its completion."""
    faults = []
    if end.exit_code is None:
        faults.append(f"no end within {end.seconds:.0f} s")
    elif end.exit_code == 0 and not is_complete:
        faults.append("exit code 0, but prompts are missing in completions.jsonl")
    elif end.exit_code not in expected.exit_codes | {0}:
        allowed = ", ".join(map(str, sorted(expected.exit_codes | {0})))
        faults.append(f"exit code {end.exit_code} instead of {allowed}")
    if end.exit_code is not None and end.seconds > expected.limit_s:
        faults.append(f"it took {end.seconds:.1f} s, {expected.limit_s:.0f} s allowed")
    if end.left:
        faults.append(f"{len(end.left)} processes are left: {', '.join(end.left)}")
    if "Traceback" in end.output:
        faults.append("a traceback was shown")
    return faults


def completions_faults(content: bytes, right: Tokens) -> list[str]:
    """What is wrong with a finished `completions.jsonl`: each prompt once, in order, unchanged."""
    lines = content.split(b"\n")
    faults = [] if lines[-1] == b"" else ["the last line has no end"]
    found: list[str] = []
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        record = _record(line)
        if record is None:
            faults.append(f"line {number} is damaged")
            continue
        name = record["id"]
        if name not in right:
            faults.append(f"{name} is no prompt of this run")
            continue
        if name in found:
            faults.append(f"{name} is there twice")
            continue
        found.append(name)
        if "error" in record:
            faults.append(f"{name} became an error record: {record['error']}")
        elif list(record["token_ids"]) != list(right[name]):
            faults.append(f"{name} has other tokens than in the undisturbed run")
    lost = [name for name in right if name not in found]
    if lost:
        faults.append(f"{len(lost)} of {len(right)} prompts are lost, first {lost[0]}")
    if found != [name for name in right if name in found]:
        faults.append("the prompts are in another order")
    return faults


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(record, dict) and isinstance(record.get("id"), str)
    return record if is_whole and isinstance(record.get("token_ids"), list) else None


def num_records(content: bytes) -> int:
    """How many prompts have a whole record, from the parts of a journal joined together."""
    records = (_record(line) for line in content.split(b"\n"))
    return len({record["id"] for record in records if record is not None})
