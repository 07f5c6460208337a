"""Going on with an earlier run: what it has completed stays, only the rest is done.

Head only, and files only. A run may be resumed when what decides its completions is the same:
model, prompts and generation settings; ranks, stages and memory may differ. Invariants: a prompt
that has a sound record is never run again, so no prompt has two; a damaged line counts as never
written (`journal`); nothing is changed before it is known that the run is the same.

A manifest that does not say all that decides completions today, as one of an older version, is
refused: nothing else tells whose weights its records came from.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mpipipe.checkpoint.jsonfile import read_json_object
from mpipipe.config.schema import AUTO
from mpipipe.errors import CheckpointError, OutputError
from mpipipe.metrics.identity import is_run_id
from mpipipe.run_folder.fingerprint import DTYPE
from mpipipe.run_folder.journal import KeptRecords, journal_files, read_journals
from mpipipe.run_folder.lock import last_status

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Set
    from pathlib import Path

    from mpipipe.topology.slurm import SlurmJob

__all__ = ["Earlier", "check_fingerprint", "earlier_fingerprint", "read_earlier", "wants_resume"]

_SHOWN = reprlib.Repr()  # values out of a manifest may be of any size and depth
_SHOWN.maxstring = _SHOWN.maxother = 80
_BEGIN_ANEW = (
    "choose another output.dir, or set output.overwrite=true and output.resume=false to begin anew"
)


@dataclass(frozen=True, slots=True)
class Earlier:
    """What earlier attempts left in the run folder."""

    records: KeptRecords = field(default_factory=KeptRecords)  # of completed and failed prompts
    # What decided their completions; None: no run has begun to generate.
    fingerprint: Mapping[str, Any] | None = None
    attempts: tuple[Mapping[str, Any], ...] = ()
    run: str = ""  # the run's id; empty: none has been made
    manifest: Mapping[str, Any] = field(default_factory=dict)  # empty: as `fingerprint`

    @property
    def kept_ids(self) -> Set[str]:
        """Prompts with a record, whether completed or failed."""
        return self.records.checksums.keys()


def wants_resume(setting: bool | str, folder: Path, job: SlurmJob | None) -> bool:
    """`output.resume`, with `auto` decided: whether Slurm has requeued the job that `folder` is of.

    Raises:
        OutputError: there are completions, and the manifest beside them cannot be read.
    """
    if setting != AUTO:
        return bool(setting)
    if job is None or job.num_restarts == 0:
        return False
    manifest = _read_manifest(folder)
    last = manifest.attempts[-1] if manifest.attempts else {}
    # An attempt that ended while it booted has left its status, and perhaps no manifest.
    return job.label in (last.get("job"), last_status(folder).get("job_id"))


def earlier_fingerprint(folder: Path) -> Mapping[str, Any] | None:
    """What decided the completions in `folder`; None: no run there has begun to generate.

    Raises:
        OutputError: there are completions, and the manifest beside them cannot be read.
    """
    return _read_manifest(folder).fingerprint


def read_earlier(
    folder: Path, fingerprint: Mapping[str, Any], prompt_ids: Collection[str]
) -> Earlier:
    """What is in `folder` of the run that `fingerprint` decides; empty where no run has begun.

    Damaged lines are set aside.

    Raises:
        OutputError: it is another run, it is not known which, or files cannot be read or mended.
    """
    manifest = _read_manifest(folder)
    if manifest.fingerprint is None:
        return manifest
    check_fingerprint(manifest.fingerprint, fingerprint, folder)
    return replace(manifest, records=read_journals(folder, prompt_ids))


def _read_manifest(folder: Path) -> Earlier:
    """What the manifest of the run in `folder` tells; no fingerprint: nothing was completed there.

    Raises:
        OutputError: there are completions, and it cannot be told what they belong to.
    """
    path = folder / "manifest.json"
    try:
        files = [file for file in journal_files(folder) if file.stat().st_size]
        is_missing = not path.exists()
    except OSError as error:
        raise OutputError(
            f"output.dir = {folder} cannot be read ({error.strerror}): mend that, or {_BEGIN_ANEW}"
        ) from error
    if is_missing:
        if not files:
            return Earlier()
        raise OutputError(
            f"output.dir = {folder} has completions ({files[0].name}) but no manifest.json, so it "
            f"cannot be told which run they belong to: {_BEGIN_ANEW}"
        )
    try:
        document = read_json_object(path)
        fingerprint = document.get("basis")
        has_begun = isinstance(fingerprint, dict) and bool(fingerprint)
        if files and not has_begun:
            raise CheckpointError(f"{path} does not say what decided the completions (basis)")
    except CheckpointError as error:
        if not files:
            return Earlier()
        text = f"the run in {folder} cannot be resumed: {error}; {_BEGIN_ANEW}"
        raise OutputError(text) from None
    found, run = document.get("attempts"), document.get("run")
    attempts = found if isinstance(found, list) else []
    earlier = Earlier(
        attempts=tuple(attempt for attempt in attempts if _is_plain(attempt)),
        run=run if is_run_id(run) else "",
    )
    return replace(earlier, fingerprint=fingerprint, manifest=document) if has_begun else earlier


def _is_plain(attempt: object) -> bool:
    """Whether an attempt is told as we tell it: it only is history, and is written down again."""
    return isinstance(attempt, dict) and all(
        isinstance(item, str | int | float | None)
        for value in attempt.values()
        for item in (value if isinstance(value, list) else [value])
    )


def check_fingerprint(earlier: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Check that what decides completions is the same as in the earlier attempts.

    Raises:
        OutputError: names the first thing that differs, or that one of the two does not tell.
    """
    for name in sorted(earlier.keys() ^ now.keys()):
        what = "does not tell" if name in now else "tells what no longer counts,"
        raise OutputError(
            f"the run in {folder} cannot be resumed, as its manifest {what} {_short(name)}: "
            "another version of mpipipe wrote it, and completions of two models or settings might "
            f"stand side by side; finish it with that version, {_BEGIN_ANEW}"
        )
    for name in sorted(now):
        before, after = earlier[name], now[name]
        if before != after:
            as_before = f"set {DTYPE}={before} to go on as it began, " if name == DTYPE else ""
            raise OutputError(
                f"the run in {folder} cannot be resumed, as {_difference(name, before, after)}: "
                f"completions of both would stand side by side; {as_before}{_BEGIN_ANEW}"
            )


def _difference(name: str, before: object, after: object) -> str:
    """What is another: a value, or files by their digests."""
    if isinstance(before, dict) and isinstance(after, dict):
        files = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        named = ", ".join(_short(file) for file in files[:3])
        return f"{name} are others now ({named}{more} differ)"
    return f"{name} was {_SHOWN.repr(before)} and is {_SHOWN.repr(after)} now"


def _short(name: str) -> str:
    """A name out of a manifest: any text may stand there."""
    return name if name.isprintable() and len(name) <= _SHOWN.maxstring else _SHOWN.repr(name)
