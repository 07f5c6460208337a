"""What is known of a staged folder: its files, their hashes, where they come from.

One record, kept under two names (`checkpoint/staged.py`): while the copy is made it grows by every
file that is complete, written whole each time; at the end it becomes the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mpipipe.checkpoint.jsonfile import require_content
from mpipipe.checkpoint.staged import MANIFEST_NAME, UNFINISHED_NAME
from mpipipe.errors import CheckpointError
from mpipipe.plain_values import from_json, to_json
from mpipipe.run_folder.files import replaced_file

__all__ = [
    "REMEDY",
    "Conversion",
    "FileRecord",
    "SourceFile",
    "StagingRecord",
    "is_partial",
    "partial_path",
    "read_record",
    "write_record",
]

FORMAT = 1
_PARTIAL_PREFIX, _PARTIAL_SUFFIX = ".mpipipe-", ".partial"
REMEDY = (
    "free space there (`df`, `quota`), or mend its rights, and give the same command again; files "
    "that are complete are kept"
)


@dataclass(frozen=True, slots=True)
class Conversion:
    """How the weights are changed; nothing set: safetensors files are copied as they are."""

    dtype: str | None = None  # torch's name; None: kept
    shard_bytes: int | None = None  # None: the default, where files are written anew
    tokenizer: str | None = None  # a folder that is read in the place of the source's own


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that is read."""

    num_bytes: int
    mtime_ns: int  # 0 on a hub
    sha256: str = ""  # empty: not read yet


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that is complete."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StagingRecord:
    """The state of a staged folder."""

    source: str  # path, or hf:org/name
    revision: str  # commit on the hub; empty: a path
    conversion: Conversion
    read: Mapping[str, SourceFile]
    num_files: int  # that there will be
    command: str  # that goes on with it
    mpipipe_version: str
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    finished_at: str | None = None
    format: int = FORMAT

    def with_file(self, name: str, file: FileRecord, read: Mapping[str, str]) -> StagingRecord:
        """One file more is complete; `read`: sha256 of source files that are known by now."""
        known = {
            source: replace(self.read[source], sha256=sha256)
            for source, sha256 in read.items()
            if source in self.read
        }
        return replace(self, files={**self.files, name: file}, read={**self.read, **known})


def partial_path(path: Path) -> Path:
    """The name of `path` until it is complete: no file of a user's has it."""
    return path.with_name(f"{_PARTIAL_PREFIX}{path.name}{_PARTIAL_SUFFIX}")


def is_partial(name: str) -> bool:
    """Whether `partial_path` has made this name."""
    return name.startswith(_PARTIAL_PREFIX) and name.endswith(_PARTIAL_SUFFIX)


def read_record(folder: Path) -> StagingRecord | None:
    """The record of `folder`, finished or not; None: there is none.

    Raises:
        CheckpointError: it is damaged, or of another version of mpipipe.
    """
    for name in (MANIFEST_NAME, UNFINISHED_NAME):
        path = folder / name
        if path.is_file():
            require_content(path)
            try:
                record = from_json(StagingRecord, path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise CheckpointError(
                    f"{path} cannot be read ({error}): it is damaged, or of another version of "
                    "mpipipe; remove the folder and stage the model again"
                ) from error
            return record
    return None


def write_record(folder: Path, record: StagingRecord) -> None:
    """Write `record`; a finished one becomes the manifest, as the last act.

    Raises:
        OutputError: it could not be written.
    """
    name = UNFINISHED_NAME if record.finished_at is None else MANIFEST_NAME
    path = folder / name
    with replaced_file(path, remedy=REMEDY, partial=partial_path(path)) as file:
        file.write((to_json(record, indent=2) + "\n").encode())
    if record.finished_at is not None:
        (folder / UNFINISHED_NAME).unlink(missing_ok=True)
