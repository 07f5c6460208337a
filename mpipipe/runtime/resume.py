"""Going on with an earlier run: what it has completed stays, only the rest is done.

Head only, and files only. A run may be resumed when what decides its completions is the same:
model, prompts and generation settings; ranks, stages and memory may differ. Invariants: a prompt
that has a record is never run again, so no prompt has two; a torn line counts as never written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpipipe.checkpoint.jsonfile import read_json_object
from mpipipe.config.schema import AUTO
from mpipipe.errors import CheckpointError, OutputError
from mpipipe.runtime.folder_lock import last_words
from mpipipe.runtime.output import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mpipipe.topology.slurm import SlurmJob

__all__ = ["DTYPE", "Earlier", "check_basis", "earlier_basis", "read_earlier", "wants_resume"]

DTYPE = "model.dtype"  # in a basis: the one that was computed in, never "auto"


@dataclass(frozen=True, slots=True)
class Earlier:
    """What earlier attempts left in the run folder."""

    kept_ids: frozenset[str] = frozenset()  # prompts with a record, whether completed or failed
    num_failed: int = 0  # error records among them
    num_torn: int = 0  # lines that were cut, as they were not written to their end
    basis: Mapping[str, Any] | None = None  # what decided their completions; None: nothing earlier
    attempts: tuple[Mapping[str, Any], ...] = ()


def wants_resume(setting: bool | str, folder: Path, job: SlurmJob | None) -> bool:
    """`output.resume`, with `auto` decided: whether Slurm has requeued the job that `folder` is of.

    Raises:
        OutputError: the manifest there cannot be read.
    """
    if setting != AUTO:
        return bool(setting)
    if job is None or job.num_restarts == 0:
        return False
    attempts: Sequence[Mapping[str, Any]] = _manifest(folder).get("attempts") or ({},)
    # An attempt that ended while it booted has left its status, and no manifest.
    return job.label in {attempts[-1].get("job"), last_words(folder).get("job_id")}


def earlier_basis(folder: Path) -> Mapping[str, Any] | None:
    """What decided the completions in `folder`; None: no run there has begun to generate.

    Raises:
        OutputError: the manifest there cannot be read.
    """
    manifest = _manifest(folder)
    return manifest.get("basis", {}) if manifest else None


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the run in `folder`; empty: there is none."""
    if not (folder / "manifest.json").exists():
        return {}
    try:
        return read_json_object(folder / "manifest.json")
    except CheckpointError as error:
        raise OutputError(
            f"the run in {folder} cannot be resumed: {error}; choose another output.dir, or set "
            "output.overwrite=true and output.resume=false to begin anew"
        ) from None


def read_earlier(folder: Path) -> Earlier:
    """What is in `folder`, with torn lines cut from its files; empty where no run has begun.

    Raises:
        OutputError: files cannot be read or mended, or it is not known what they belong to.
    """
    files = sorted(folder.glob("completions_rank_*.jsonl"))
    if not (folder / "manifest.json").exists():
        if files:
            raise OutputError(
                f"output.dir = {folder} has completions ({files[0].name}) but no manifest.json, so "
                "it cannot be told which run they belong to: choose another folder, or set "
                "output.overwrite=true and output.resume=false to begin anew"
            )
        return Earlier()
    manifest = _manifest(folder)
    records: dict[str, bool] = {}  # id → failed
    num_torn = sum(_read_records(path, records) for path in files)
    return Earlier(
        kept_ids=frozenset(records),
        num_failed=sum(records.values()),
        num_torn=num_torn,
        basis=manifest.get("basis", {}),
        attempts=tuple(manifest.get("attempts", ())),
    )


def _read_records(path: Path, records: dict[str, bool]) -> int:
    """Add the records of one file to `records`; cut what is torn; returns how many lines that were.

    Normally only the last line can be torn; a node that lost its power leaves zeros, too.
    """
    try:
        lines = path.read_bytes().split(b"\n")
        whole = []
        for line in lines[:-1]:  # after the last newline: nothing, or a torn line
            record = _parse(line)
            if record is not None and record["id"] not in records:
                records[record["id"]] = "error" in record
                whole.append(line)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be read ({error.strerror}): mend that, or choose another output.dir"
        ) from error
    num_torn = len(lines) - 1 - len(whole) + bool(lines[-1])
    if num_torn:
        write_whole(path, b"".join(line + b"\n" for line in whole))
    return num_torn


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return None
    return record if isinstance(record, dict) and isinstance(record.get("id"), str) else None


def check_basis(earlier: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Check that what decides completions is the same as in the earlier attempts.

    Raises:
        OutputError: names the first thing that differs.
    """
    for name in sorted(earlier.keys() | now.keys()):
        before, after = earlier.get(name), now.get(name)
        if before != after:
            as_before = f"set {DTYPE}={before} to go on as it began, " if name == DTYPE else ""
            raise OutputError(
                f"the run in {folder} cannot be resumed, as {name} was {before!r} and is {after!r} "
                f"now: completions of both would stand side by side; {as_before}choose another "
                "output.dir, or set output.overwrite=true and output.resume=false to begin anew"
            )
