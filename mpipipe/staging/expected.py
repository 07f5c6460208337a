"""What the files of a source should hash to, where something says so.

Four things may: a `SHA256SUMS` file beside them, what `hf download --local-dir` left there, the
manifest of a folder that was staged before, and the hub itself (`hub`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mpipipe.errors import CheckpointError
from mpipipe.staging.record import read_record

__all__ = ["Digest", "Digests", "ExpectedHash", "expected_hashes", "lost_files"]

SUMS_NAME = "SHA256SUMS"
_SUMS_LINE = re.compile(r"(?P<sha256>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
_HUB_FOLDER = Path(".cache/huggingface/download")
_CLOCK_S = 1.0  # a file's time may be so much behind that of the metadata
_MAX_TEXT_BYTES = 1 << 20


class Digest(Protocol):
    """A hash under way, as `hashlib` has them."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take more of the file."""

    def hexdigest(self) -> str:
        """The hash of what was taken."""


@dataclass(frozen=True, slots=True)
class ExpectedHash:
    """What one file should hash to, and who says so."""

    kind: str  # "sha256", or "git": of a blob, as git and the hub name small files
    hexdigest: str
    told_by: str

    def start(self, num_bytes: int) -> Digest:
        """The hash of a file of `num_bytes`, to be fed with it."""
        if self.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % num_bytes, usedforsecurity=False)


@dataclass(slots=True)
class Digests:
    """The hashes of one file while it is read."""

    path: Path
    num_bytes: int
    expected: ExpectedHash | None
    sha256: Digest = field(default_factory=hashlib.sha256)
    _other: Digest | None = None

    def start(self) -> Digests:
        """Before the first byte."""
        if self.expected is not None and self.expected.kind != "sha256":
            self._other = self.expected.start(self.num_bytes)
        return self

    def update(self, chunk: bytes | memoryview) -> None:
        """Take more of the file."""
        self.sha256.update(chunk)
        if self._other is not None:
            self._other.update(chunk)

    def finish(self) -> str:
        """The SHA-256 of the file.

        Raises:
            CheckpointError: it is not what was expected.
        """
        found = (self._other or self.sha256).hexdigest()
        if self.expected is not None and found != self.expected.hexdigest:
            raise CheckpointError(
                f"{self.path} has the {self.expected.kind} hash {found}, and "
                f"{self.expected.told_by} says {self.expected.hexdigest}: the file is damaged or "
                "was changed; fetch it again"
            )
        return self.sha256.hexdigest()


def expected_hashes(folder: Path) -> dict[str, ExpectedHash]:
    """File name → what something in `folder` says that it hashes to.

    Raises:
        CheckpointError: what says so cannot be read.
    """
    found = _all_told(folder).items()
    return {name: expected for name, expected in found if (folder / name).is_file()}


def lost_files(folder: Path) -> dict[str, str]:
    """File name → what in `folder` tells of it, though it is not there.

    Raises:
        CheckpointError: what tells cannot be read.
    """
    found = _all_told(folder).items()
    return {name: told.told_by for name, told in found if not (folder / name).is_file()}


def _all_told(folder: Path) -> dict[str, ExpectedHash]:
    return {**_of_hub_download(folder), **_of_record(folder), **_of_sums(folder / SUMS_NAME)}


def _of_sums(path: Path) -> dict[str, ExpectedHash]:
    if not path.is_file():
        return {}
    text = _read_text(path)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    matches = [_SUMS_LINE.fullmatch(line.rstrip()) for line in lines]
    if None in matches:
        raise CheckpointError(
            f"{path} has a line that is not a SHA-256 and a file name "
            f"({lines[matches.index(None)][:80]!r}): make it anew with `sha256sum *`, or remove it"
        )
    return {
        match["name"].removeprefix("./"): ExpectedHash("sha256", match["sha256"].lower(), path.name)
        for match in matches
        if match is not None
    }


def _of_record(folder: Path) -> Mapping[str, ExpectedHash]:
    record = read_record(folder)
    files = record.files if record is not None else {}
    return {n: ExpectedHash("sha256", file.sha256, "its manifest") for n, file in files.items()}


def _of_hub_download(folder: Path) -> dict[str, ExpectedHash]:
    """From the files that say which blob of the hub each file is: commit, ETag, time in seconds."""
    found = {}
    root = folder / _HUB_FOLDER
    for path in sorted(root.rglob("*.metadata")) if root.is_dir() else ():
        name = path.relative_to(root).as_posix().removesuffix(".metadata")
        lines = _read_text(path).splitlines()
        if len(lines) < 3 or not _is_current(folder / name, lines[2]):
            continue
        kind = {64: "sha256", 40: "git"}.get(len(lines[1]))
        if kind is not None and re.fullmatch(r"[0-9a-f]+", lines[1]):
            found[name] = ExpectedHash(kind, lines[1], "the hub's metadata")
    return found


def _is_current(file: Path, timestamp: str) -> bool:
    """Whether `file` is as it was downloaded, or lost since: later edits are the user's own."""
    try:
        return file.stat().st_mtime - _CLOCK_S <= float(timestamp)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_TEXT_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): mend or remove it") from error
