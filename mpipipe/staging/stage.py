"""`mpipipe stage-model`: from a source to a folder that is whole, or says that it is not.

Invariants: a file has its name only when it is complete, on the disk and read back; the record says
so after that; the manifest is written last. So whatever ends the process, the same command goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from mpipipe._version import __version__
from mpipipe.checkpoint.index import read_index
from mpipipe.checkpoint.spec import read_spec
from mpipipe.checkpoint.staged import MANIFEST_NAME
from mpipipe.errors import CheckpointError, OutputError
from mpipipe.staging.destination import (
    claimed,
    differs,
    free_bytes,
    kept_files,
    require_same,
    require_same_commit,
    require_space,
    staged_sizes,
    tidy,
)
from mpipipe.staging.expected import Digests
from mpipipe.staging.hub import HubAddress
from mpipipe.staging.hub_source import (
    HubModel,
    fetched_bytes,
    forget_fetched,
    forgotten_if_refused,
    list_hub,
    open_hub,
)
from mpipipe.staging.pieces import Piece, read_source, write_piece
from mpipipe.staging.record import Conversion, StagingRecord, read_record, write_record
from mpipipe.staging.source import Source, open_folder, open_gguf_file, with_tokenizer

__all__ = ["StagingOutcome", "StagingRequest", "StagingView", "stage_model", "verify_folder"]


@dataclass(frozen=True, slots=True)
class StagingRequest:
    """What was asked for."""

    source: str  # a folder, a .gguf file, or hf:org/name[@revision]
    destination: Path
    conversion: Conversion
    command: str  # the words that asked


@dataclass(frozen=True, slots=True)
class StagingOutcome:
    """What came of it."""

    record: StagingRecord
    num_written: int  # files; 0: nothing was to be done
    num_kept: int  # files of an earlier attempt
    left_out: tuple[str, ...] = ()


class StagingView(Protocol):
    """Who watches. Every call may raise: that stops the staging, to go on later."""

    def begin(self, what: str, num_bytes: int) -> None:
        """A part begins: `num_bytes` will be told to `took`."""

    def took(self, num_bytes: int) -> None:
        """So many bytes more were read, fetched or written."""


def stage_model(request: StagingRequest, view: StagingView) -> StagingOutcome:
    """Stage a model, go on with it, or find it staged.

    Raises:
        CheckpointError: the source is no whole model.
        OutputError: the destination holds something else, or cannot be written.
        EnvironmentSetupError: a package, the network or memory is missing.
    """
    destination = request.destination.absolute()
    address = HubAddress.parse(request.source)
    _require_apart(request.source, destination, address)
    with claimed(destination) as record:
        model = None
        if address is not None:
            if record is not None and _is_there(request, record, address, address.revision):
                return StagingOutcome(record, 0, len(record.files))
            model = list_hub(address, request.conversion)
            if record is not None and _is_there(request, record, address, model.listing.commit):
                return StagingOutcome(record, 0, len(record.files))
            _require_fetch(request, model, record)
        with forgotten_if_refused(destination, CheckpointError):
            source = _open(request, model, view)
            try:
                outcome = _stage(request, source, record, view)
            finally:
                if source.reader is not None:
                    source.reader.close()
        forget_fetched(destination)
        return outcome


def _require_apart(source: str, destination: Path, address: HubAddress | None) -> None:
    if address is not None:
        return
    path = Path(source).absolute()
    if not path.exists():
        raise CheckpointError(
            f"there is no {source}: give a model folder, a .gguf file, or hf:ORG/NAME"
        )
    folder = path if path.is_dir() else path.parent
    if destination.resolve() == folder.resolve():
        raise OutputError(
            f"{destination} is where the model is already: give another folder for the copy"
        )


def _is_there(
    request: StagingRequest, record: StagingRecord, address: HubAddress, commit: str
) -> bool:
    """Whether all of `commit` is staged: of a commit that is named, no network is asked for it."""
    destination = request.destination.absolute()
    is_there = (
        record.finished_at is not None
        and (record.source, record.revision) == (address.described, commit)
        and record.conversion == request.conversion
        and not _changed_tokenizer(record, request.conversion)
        and staged_sizes(destination, record).keys() == record.files.keys()
    )
    if is_there:
        forget_fetched(destination)
    return is_there


def _changed_tokenizer(record: StagingRecord, conversion: Conversion) -> list[str]:
    """Names of the files of `--tokenizer` that are others than those that were read."""
    if conversion.tokenizer is None:
        return []
    folder = Path(conversion.tokenizer)
    read = with_tokenizer(Source("", "", {}, (), {}), folder).read
    return [n for n, file in read.items() if differs(record.read.get(n), file, folder / n)]


def _require_fetch(request: StagingRequest, model: HubModel, record: StagingRecord | None) -> None:
    """Raises OutputError where what is to be fetched would not have its place."""
    folder = request.destination.absolute()
    staged = {} if record is None else staged_sizes(folder, record)
    if record is not None:
        described, commit = model.address.described, model.listing.commit
        changed = _changed_tokenizer(record, request.conversion)
        # What an unfinished attempt has fetched is its own still.
        with forgotten_if_refused(folder, OutputError) if record.finished_at else nullcontext():
            require_same_commit(
                folder, record, described, commit, request.conversion, changed=changed
            )
    needed = model.needed_bytes(staged) - fetched_bytes(folder)
    require_space(folder, max(needed, 0), free_bytes(folder))


def _open(request: StagingRequest, model: HubModel | None, view: StagingView) -> Source:
    conversion, path = request.conversion, Path(request.source)
    if model is not None:
        view.begin("fetching", 0)
        source = open_hub(model, request.destination.absolute(), view.took)
    elif path.is_file():
        source = open_gguf_file(path, conversion)
    else:
        source = open_folder(path, conversion)
    if conversion.tokenizer is not None:
        source = with_tokenizer(source, Path(conversion.tokenizer))
    return source


def _stage(
    request: StagingRequest, source: Source, record: StagingRecord | None, view: StagingView
) -> StagingOutcome:
    folder = request.destination.absolute()
    kept: dict[str, bool] = {}
    if record is not None:
        with forgotten_if_refused(folder, OutputError):
            require_same(folder, record, source, request.conversion, _locate(request, source))
        is_whole = staged_sizes(folder, record).keys() == record.files.keys()
        if record.finished_at is not None and is_whole:
            return StagingOutcome(record, 0, len(record.files), source.left_out)
        view.begin("checking", sum(file.num_bytes for file in record.files.values()))
        kept = kept_files(folder, record, view.took)
    pieces = [piece for piece in source.pieces if not kept.get(piece.name)]
    tidy(folder, [piece.name for piece in source.pieces])
    needed = sum(piece.num_bytes for piece in pieces) + _largest_fetched(source, pieces, folder)
    require_space(folder, needed, free_bytes(folder))
    record = _begun(request, source, record, kept)
    write_record(folder, record)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    record = _write(folder, source, pieces, record, view)
    read_index(folder)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    record = dataclasses.replace(record, finished_at=finished)
    write_record(folder, record)
    num_kept = len(source.pieces) - len(pieces)
    return StagingOutcome(record, len(pieces), num_kept, source.left_out)


def _locate(request: StagingRequest, source: Source) -> Callable[[str], Path | None]:
    """Where a file of the source can be read again."""
    path = Path(request.source)
    root = path if path.is_dir() else path.parent

    def locate(name: str) -> Path | None:
        places = [root / name]
        if request.conversion.tokenizer is not None:
            places.insert(0, Path(request.conversion.tokenizer) / name)
        return next((place for place in places if place.is_file()), None)

    return locate if not source.revision else lambda _: None


def _largest_fetched(source: Source, pieces: Sequence[Piece], folder: Path) -> int:
    """Of a hub's files one at a time stands beside its copy."""
    if not source.is_fetched_late:
        return 0
    largest = max((piece.num_bytes for piece in pieces), default=0)
    return max(largest - fetched_bytes(folder), 0)


def _begun(
    request: StagingRequest, source: Source, record: StagingRecord | None, kept: dict[str, bool]
) -> StagingRecord:
    """The record of an attempt that begins, or goes on."""
    files = record.files if record is not None else {}
    known = record.read if record is not None else {}
    return StagingRecord(
        source=source.described,
        revision=source.revision,
        conversion=request.conversion,
        read={
            name: dataclasses.replace(file, sha256=known[name].sha256 if name in known else "")
            for name, file in source.read.items()
        },
        num_files=len(source.pieces),
        command=request.command,
        mpipipe_version=__version__,
        files={name: file for name, file in files.items() if kept.get(name)},
    )


def _write(
    folder: Path,
    source: Source,
    pieces: Sequence[Piece],
    record: StagingRecord,
    view: StagingView,
) -> StagingRecord:
    """Hash what is converted, then write the pieces; the record is on the disk after each."""
    unread = {n: at for n, at in source.hashed_first.items() if not record.read[n].sha256}
    if unread:
        view.begin("hashing", sum(record.read[name].num_bytes for name in unread))
    for name, (path, expected) in unread.items():
        digests = Digests(path, record.read[name].num_bytes, expected).start()
        for chunk in read_source(path):
            digests.update(chunk)
            view.took(len(chunk))
        known = dataclasses.replace(record.read[name], sha256=digests.finish())
        record = dataclasses.replace(record, read={**record.read, name: known})
    num_bytes = sum(piece.num_bytes for piece in pieces)
    if source.is_fetched_late:
        view.begin("fetching and writing", 2 * num_bytes)
    elif pieces:
        view.begin("writing", num_bytes)
    for piece in pieces:
        written = write_piece(folder, piece, view.took)
        record = record.with_file(piece.name, written, piece.read())
        write_record(folder, record)
    return record


def verify_folder(folder: Path, view: StagingView) -> StagingRecord:
    """Read all of a staged folder and compare it with its manifest.

    Raises:
        CheckpointError: it is no staged folder, is not finished, or differs.
    """
    read_spec(folder)
    record = read_record(folder)
    if record is None or record.finished_at is None:
        raise CheckpointError(
            f"{folder} has no {MANIFEST_NAME}: it was not made by `mpipipe stage-model`, so there "
            "are no hashes to compare with"
        )
    view.begin("checking", sum(file.num_bytes for file in record.files.values()))
    wrong = [name for name, is_kept in kept_files(folder, record, view.took).items() if not is_kept]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of the {len(record.files)} files in {folder} are not as they were "
            f"staged ({', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}): remove them, and "
            f"stage the model again, which writes them anew: {record.command}"
        )
    read_index(folder)
    return record
