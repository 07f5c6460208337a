"""The journal of a run: completions appended as they end, read again, merged in input order.

`completions_rank_<r>.jsonl`, of the head only: a line a completion, written whole.
Should the file be replaced, cut or removed while the run writes to it, the run goes on in
`completions_rank_<r>.2.jsonl` (`.3` …), into which it writes again what it has written; whatever
took the place of the first stays there. Damaged lines are kept in `damaged_rank_<r>.jsonl`.

Invariants: what `write` was given is in the merged file, or `merge` raises; no line is ever thrown
away before it is elsewhere; of two lines of one prompt the first counts.

What is in a line, and how a damaged one is told: `record_line`.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from mpipipe.errors import OutputError
from mpipipe.run_folder.files import replaced_file, sync_folder, told_as_output
from mpipipe.run_folder.record_line import (
    RecordLine,
    completion_json,
    decode_line,
    encode_line,
    is_intact,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from typing import Self

    from mpipipe.types import Completion

__all__ = [
    "CompletionWriter",
    "KeptRecords",
    "journal_files",
    "merge",
    "read_journals",
]

# An fsync takes 1-10 ms on a good disk, and much more on a busy shared file system.
_SYNC_INTERVAL_S = 1.0
# Lines held in memory, for a file that is cut: some 100,000 completions of 100 tokens.
_HELD_BYTES = 64 * 1024**2
_PREFIX, _DAMAGED_PREFIX = "completions_rank_", "damaged_rank_"


def journal_files(folder: Path) -> list[Path]:
    """All journals in `folder`, of all ranks and attempts."""
    return sorted(folder.glob(f"{_PREFIX}*.jsonl"))


# ---- writing -------------------------------------------------------------------------------------


class _Syncer:
    """Brings a file's lines to the disk beside the event loop, at most once in an interval.

    Its thread sleeps until there is something new. It also looks whether the file `is_in_place`.
    """

    def __init__(self, descriptor: int, is_in_place: Callable[[], bool]) -> None:
        self.error: OSError | None = None  # the kernel tells it once only
        self.is_misplaced = False
        self._descriptor = descriptor
        self._is_in_place = is_in_place
        self._written, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="fsync", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something new."""
        self._written.set()

    def close(self) -> None:
        """Bring the rest to the disk; afterwards the file may be closed."""
        self._closing.set()
        self._written.set()
        self._thread.join()

    def _run(self) -> None:
        while self.error is None:
            self._written.wait()
            self._written.clear()
            is_last = self._closing.is_set()
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self.error = error
            self.is_misplaced = not self._is_in_place()
            if is_last:
                return
            self._closing.wait(_SYNC_INTERVAL_S)


class CompletionWriter:
    """Appends completions to the journal of this rank, one whole line at a time.

    Use as a context manager; `written` remembers the checksums for `merge`.
    `warn` is told, in a sentence, when the file was lost and what became of it.
    """

    def __init__(
        self, folder: Path, rank: int, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        self.path = folder / f"{_PREFIX}{rank}.jsonl"
        self.written: dict[str, int] = {}
        self._first_path = self.path
        self._warn = warn
        self._descriptor = -1
        self._end = 0  # the file is at least so long, in bytes
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._syncer: _Syncer | None = None

    def __enter__(self) -> Self:
        with told_as_output(self.path):
            self._open(self.path, os.O_CREAT)
        return self

    def __exit__(self, *_: object) -> None:
        with told_as_output(self.path):
            try:
                self._sync()  # a later attempt may run on another node
                if self._is_lost():
                    self._write_again()
                    self._sync()
            finally:
                os.close(self._descriptor)

    def write(self, *completions: Completion) -> None:
        """Append a line each; they are in the operating system's hands on return, on disk soon.

        Raises:
            OutputError: it could not be written, or an earlier one did not reach the disk.
        """
        assert self._syncer is not None, "the writer is used inside its `with` block"
        lines = [encode_line(completion_json(completion)) + b"\n" for completion in completions]
        with told_as_output(self.path):
            if self._syncer.error is not None:
                raise self._syncer.error
            if self._syncer.is_misplaced and self._is_lost():
                self._sync()
                self._write_again()
            self._append(b"".join(lines))
        self._syncer.wake()
        for completion, line in zip(completions, lines, strict=True):
            self._hold(line)
            self.written[completion.request_id] = zlib.crc32(line[:-1])

    def _open(self, path: Path, flags: int) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o666)
        self._end = os.fstat(self._descriptor).st_size
        self.path = path
        sync_folder(path.parent)
        self._syncer = _Syncer(self._descriptor, lambda: not self._is_lost())
        self._syncer.start()

    def _sync(self) -> None:
        """Bring all to the disk, and end the thread that does."""
        assert self._syncer is not None
        self._syncer.close()
        if self._syncer.error is not None:
            raise self._syncer.error

    def _append(self, lines: bytes) -> None:
        rest = memoryview(lines)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._end += len(lines)

    def _hold(self, line: bytes) -> None:
        self._held.append(line)
        self._held_bytes += len(line)
        while self._held_bytes > _HELD_BYTES:
            self._held_bytes -= len(self._held.popleft())

    def _is_lost(self) -> bool:
        """Whether the file at the path is another than ours, or ours without what we wrote."""
        try:
            ours, there = os.fstat(self._descriptor), self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # the file system does not answer: nothing is known
            return False
        return not os.path.samestat(ours, there) or ours.st_size < self._end

    def _write_again(self) -> None:
        """Go on in a new file, with all that the lost one and the memory still hold."""
        lost, descriptor = self.path, self._descriptor
        lost.parent.mkdir(parents=True, exist_ok=True)
        numbered = (self._first_path.with_suffix(f".{number}.jsonl") for number in count(2))
        self._open(next(path for path in numbered if not path.exists()), os.O_CREAT | os.O_EXCL)
        again: set[int] = set()
        with os.fdopen(descriptor, "rb") as file:
            file.seek(0)
            for raw in file:  # not read as JSON: the event loop waits
                content = raw.rstrip(b"\r\n")
                if is_intact(content):
                    again.add(zlib.crc32(content))
                    self._append(content + b"\n")
        for line in self._held:
            if zlib.crc32(line[:-1]) not in again:
                again.add(zlib.crc32(line[:-1]))
                self._append(line)
        num_missing = len(set(self.written.values()) - again)
        rest = f"{num_missing:,} could not be read any more" if num_missing else "nothing is lost"
        self._warn(
            f"{lost} was replaced, cut or removed by something else while the run wrote to it: "
            f"{len(again):,} records were written again, into {self.path.name} ({rest}); leave "
            "the files of a run alone until it has ended"
        )


# ---- reading -------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """One line of a file."""

    offset: int  # of its first byte
    content: bytes  # without its end
    raw: bytes  # with it
    record: RecordLine | None  # None: damaged


def _entries(file: BinaryIO) -> Iterator[_Entry]:
    """The lines of a journal, from where `file` stands; CRLF, as some editors write, ends one."""
    offset = file.tell()
    for raw in file:
        content = raw.rstrip(b"\r\n")
        record = decode_line(content)
        if record is not None and not raw.endswith(b"\n") and not record.has_checksum:
            record = None  # it may have been longer
        yield _Entry(offset, content, raw, record)
        offset += len(raw)


@dataclass(frozen=True, slots=True)
class KeptRecords:
    """The sound records of a run folder."""

    checksums: Mapping[str, int] = field(default_factory=dict)  # by prompt id
    num_failed: int = 0  # error records among them
    num_damaged: int = 0  # lines that were set aside
    num_output_tokens: int = 0  # of those that are no error records


def read_journals(folder: Path, prompt_ids: Collection[str]) -> KeptRecords:
    """The records in `folder` of `prompt_ids`; every other line is set aside, byte for byte.

    That is one that is damaged or torn, of no prompt of this run, or another one of a prompt that
    has a record. A node that lost its power leaves zeros, too.

    Raises:
        OutputError: files cannot be read or mended.
    """
    kept: dict[str, RecordLine] = {}
    num_damaged = sum(_read_file(path, kept, prompt_ids) for path in journal_files(folder))
    return KeptRecords(
        {prompt_id: record.checksum for prompt_id, record in kept.items()},
        sum(record.has_failed for record in kept.values()),
        num_damaged,
        sum(record.num_output_tokens for record in kept.values() if not record.has_failed),
    )


def _read_file(path: Path, kept: dict[str, RecordLine], prompt_ids: Collection[str]) -> int:
    """Add the records of one file to `kept`; set aside what is damaged: returns how many lines."""
    damaged: set[int] = set()
    ends_whole = True
    with told_as_output(path, "read"), path.open("rb") as file:
        for entry in _entries(file):
            if not _is_kept(entry.record, kept, prompt_ids):
                damaged.add(entry.offset)
            ends_whole = entry.raw.endswith(b"\n")
    if damaged or not ends_whole:
        _set_aside(path, damaged)
    return len(damaged)


def _is_kept(
    record: RecordLine | None, kept: dict[str, RecordLine], prompt_ids: Collection[str]
) -> bool:
    """Whether it is, or equals, the first sound record of a prompt here; adds it to `kept`."""
    if record is None or record.prompt_id not in prompt_ids:
        return False
    return kept.setdefault(record.prompt_id, record).checksum == record.checksum


def _set_aside(path: Path, damaged: Collection[int]) -> None:
    """Move the lines at the offsets `damaged` to the file for them, end the others whole."""
    aside = path.with_name(path.name.replace(_PREFIX, _DAMAGED_PREFIX, 1))
    if damaged:
        with told_as_output(aside), path.open("rb") as file, aside.open("ab") as damages:
            for entry in _entries(file):
                if entry.offset in damaged:
                    damages.write(entry.raw.removesuffix(b"\n") + b"\n")
            damages.flush()
            os.fsync(damages.fileno())
    with replaced_file(path) as mended, path.open("rb") as file:
        for entry in _entries(file):
            if entry.offset not in damaged:
                mended.write(entry.content + b"\n")


# ---- merging -------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a line is."""

    file: BinaryIO
    offset: int
    num_bytes: int
    checksum: int


def merge(
    folder: Path, index_of: Mapping[str, int], completed: Mapping[str, int] | None = None
) -> Path:
    """Write `completions.jsonl` from all journals, in input order; returns its path.

    One line a prompt, the first: a node that Slurm has lost but the disk has not may still write.
    `completed`: the checksums that it must hold by prompt id, more may be there.

    Raises:
        OutputError: files cannot be read or written, or the journals lack a completion; then what
            they do hold has been merged.
    """
    wanted = completed or {}
    merged = folder / "completions.jsonl"
    with ExitStack() as files:
        places = _places(journal_files(folder), wanted, files)
        in_order = sorted((index_of[name], name) for name in places if name in index_of)
        with replaced_file(merged) as output:
            for _, prompt_id in in_order:
                place = places[prompt_id]
                place.file.seek(place.offset)
                output.write(place.file.read(place.num_bytes) + b"\n")
    _require_complete(merged, places, wanted)
    return merged


def _places(
    paths: Iterable[Path], wanted: Mapping[str, int], files: ExitStack
) -> dict[str, _Place]:
    """Where the line of each prompt is: the first, or one with the checksum that is `wanted`."""
    places: dict[str, _Place] = {}
    for path in paths:
        with told_as_output(path, "read"):
            file = files.enter_context(path.open("rb"))
            for entry in _entries(file):
                if entry.record is None:
                    continue
                prompt_id, checksum = entry.record.prompt_id, entry.record.checksum
                first = places.get(prompt_id)
                if first is None or checksum == wanted.get(prompt_id) != first.checksum:
                    places[prompt_id] = _Place(file, entry.offset, len(entry.content), checksum)
    return places


def _require_complete(
    merged: Path, places: Mapping[str, _Place], wanted: Mapping[str, int]
) -> None:
    missing = [
        name
        for name, checksum in wanted.items()
        if name not in places or places[name].checksum != checksum
    ]
    if missing:
        raise OutputError(
            f"{merged} lacks {len(missing):,} of {len(wanted):,} completions, first that of "
            f"{missing[0]!r}: something else has changed or removed {_PREFIX}*.jsonl beside it "
            "while the run wrote to them. The others are in completions.jsonl; start the run again "
            "with output.resume=true to complete these once more"
        )
