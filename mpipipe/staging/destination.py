"""The folder that a model is staged to: empty, ours to go on with, or refused.

Invariants: one process writes there; no file that staging did not put there is touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mpipipe.checkpoint.staged import MANIFEST_NAME, UNFINISHED_NAME
from mpipipe.errors import OutputError
from mpipipe.run_folder.files import told_as_output
from mpipipe.run_folder.lock import lock_file
from mpipipe.staging.hub_source import SOURCE_FOLDER
from mpipipe.staging.pieces import file_hash
from mpipipe.staging.record import (
    REMEDY,
    Conversion,
    SourceFile,
    StagingRecord,
    is_partial,
    partial_path,
    read_record,
)
from mpipipe.staging.source import Source

__all__ = [
    "claimed",
    "differs",
    "free_bytes",
    "kept_files",
    "require_same",
    "require_same_commit",
    "require_space",
    "staged_sizes",
    "tidy",
]

_CHANGE = "choose another folder, or remove it to stage anew"

_LOCK_NAME = ".mpipipe-staging.lock"
_OWN = frozenset({MANIFEST_NAME, UNFINISHED_NAME, SOURCE_FOLDER, _LOCK_NAME})
# A directory entry, an inode and the last block of each file; file systems keep some for root.
_SPARE_BYTES = 16 << 20


@contextmanager
def claimed(folder: Path) -> Iterator[StagingRecord | None]:
    """Keep others out of `folder`, which is made where it is missing; yields its record.

    Folders that were made here and are empty at the end are removed.

    Raises:
        OutputError: another process stages to it, it holds other files, or cannot be written.
        CheckpointError: its record is damaged.
    """
    with told_as_output(folder, remedy=REMEDY):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file: give a folder for the model")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    lock, held = lock_file(folder / _LOCK_NAME)
    if held is False:
        raise OutputError(
            f"another `mpipipe stage-model` writes to {folder}: wait until it has ended, or choose "
            "another folder"
        )
    try:
        record = read_record(folder)
        if record is None:
            _require_empty(folder)
        yield record
    finally:
        lock.close()
        with suppress(OSError):  # it holds something, as it should
            for path in made:
                path.rmdir()


def _require_empty(folder: Path) -> None:
    """Without a record there may be no file but what a fetch has left."""
    with told_as_output(folder, "read", REMEDY):
        found = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in found if name not in _OWN and not is_partial(name)]
    if foreign:
        shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise OutputError(
            f"{folder} holds files that `mpipipe stage-model` did not put there ({shown}): choose "
            "another folder, or empty it"
        )


def require_same(
    folder: Path,
    record: StagingRecord,
    source: Source,
    conversion: Conversion,
    locate: Callable[[str], Path | None],
) -> None:
    """Go on only with the copy of the same files, made in the same way.

    Args:
        folder: the destination.
        record: what it holds.
        source: what is to be staged.
        conversion: how.
        locate: where a file of the source can be read; None: on a hub, whose commit tells.

    Raises:
        OutputError: it is another model's, or another form of this one.
    """
    _require_conversion(folder, record, conversion)
    others = sorted(
        name
        for name in source.read.keys() | record.read.keys()
        if differs(record.read.get(name), source.read.get(name), locate(name))
    )
    if others or record.revision != source.revision:
        what = f"its {others[0]} differs" if others else "the revision differs"
        raise _other_source(folder, record, source.described, what)


def require_same_commit(
    folder: Path,
    record: StagingRecord,
    described: str,
    commit: str,
    conversion: Conversion,
    *,
    changed: Sequence[str],
) -> None:
    """As `require_same`, of a model on a hub, before anything of it is fetched.

    Args:
        folder: the destination.
        record: what it holds.
        described: the model on the hub.
        commit: which one there.
        conversion: how it is to be staged.
        changed: names of tokenizer files that are others now.

    Raises:
        OutputError: it is another model's, or another form of this one.
    """
    _require_conversion(folder, record, conversion)
    if record.revision != commit:
        raise _other_source(folder, record, described, "the revision differs")
    if changed:
        raise _other_source(folder, record, described, f"its {changed[0]} differs")


def _require_conversion(folder: Path, record: StagingRecord, conversion: Conversion) -> None:
    if record.conversion != conversion:
        raise OutputError(
            f"{folder} was staged from {record.source} with {_told(record.conversion)}, and "
            f"{_told(conversion)} is asked for: {_CHANGE}"
        )


def _other_source(folder: Path, record: StagingRecord, described: str, what: str) -> OutputError:
    at = f" at {record.revision[:12]}" if record.revision else ""
    return OutputError(
        f"{folder} holds a copy of {record.source}{at}, not of {described} as it is now ({what}): "
        f"{_CHANGE}"
    )


def _told(conversion: Conversion) -> str:
    options = {
        "--dtype": conversion.dtype,
        "--shard-size": conversion.shard_bytes,
        "--tokenizer": conversion.tokenizer,
    }
    said = [f"{name} {value}" for name, value in options.items() if value is not None]
    return " ".join(said) or "no options"


def differs(known: SourceFile | None, now: SourceFile | None, path: Path | None) -> bool:
    """Whether a file is another than the record knows; `path`: where its hash is to be had."""
    if known is None or now is None or known.num_bytes != now.num_bytes:
        return True
    if known.mtime_ns == now.mtime_ns or not known.sha256 or path is None:
        return False
    return file_hash(path, lambda _: None) != known.sha256


def staged_sizes(folder: Path, record: StagingRecord) -> dict[str, int]:
    """Name → bytes of the files of the record that are there, by their sizes."""
    return {
        name: file.num_bytes
        for name, file in record.files.items()
        if (folder / name).is_file() and (folder / name).stat().st_size == file.num_bytes
    }


def kept_files(
    folder: Path, record: StagingRecord, took: Callable[[int], object]
) -> dict[str, bool]:
    """Name → whether the file is there with the hash of the record; reads all of them."""
    return {name: _is_kept(folder / name, record, name, took) for name in record.files}


def _is_kept(path: Path, record: StagingRecord, name: str, took: Callable[[int], object]) -> bool:
    file = record.files[name]
    if not path.is_file() or path.stat().st_size != file.num_bytes:
        return False
    return file_hash(path, took) == file.sha256


def tidy(folder: Path, names: Sequence[str]) -> None:
    """Remove what a copy that was killed has left half-written of the files `names`.

    Raises:
        OutputError: it cannot be removed.
    """
    for name in (*names, MANIFEST_NAME, UNFINISHED_NAME):
        partial = partial_path(folder / name)
        with told_as_output(partial, "removed", REMEDY):
            partial.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int | None:
    """What we may still write below `folder`; None: its file system does not tell."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize if space.f_blocks > 0 else None


def require_space(folder: Path, needed_bytes: int, free: int | None) -> None:
    """Raises OutputError where `needed_bytes` more do not fit into `free` bytes."""
    if free is not None and needed_bytes + _SPARE_BYTES > free:
        raise OutputError(
            f"{folder} has {free / 1e9:,.2f} GB free, and {needed_bytes / 1e9:,.2f} GB are still "
            "to be written: free space there, or choose another file system"
        )
