"""The files of a staged folder, each as what it takes to write it: copied, made, or built.

A piece names the source files that it reads and yields the bytes of one file; `write_piece` puts
them into place: under a temporary name, hashed on the way, brought to the disk, read back and
compared, and then renamed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mpipipe.errors import CheckpointError, EnvironmentSetupError, OutputError, is_out_of_memory
from mpipipe.run_folder.files import replaced_file, told_as_output
from mpipipe.staging.expected import Digests, ExpectedHash
from mpipipe.staging.record import REMEDY, FileRecord, partial_path

if TYPE_CHECKING:
    from mpipipe.staging.layout import Shard
    from mpipipe.staging.tensors import TensorReader

__all__ = [
    "BuiltPiece",
    "CopiedPiece",
    "MadePiece",
    "Piece",
    "file_hash",
    "read_source",
    "write_piece",
]

Chunk = bytes | memoryview
_CHUNK_BYTES = 8 << 20


class Piece(Protocol):
    """One file to be."""

    @property
    def name(self) -> str:
        """Relative to the folder."""

    @property
    def num_bytes(self) -> int:
        """Size of the file."""

    def chunks(self) -> Iterator[Chunk]:
        """The file's bytes, in order."""

    def read(self) -> Mapping[str, str]:
        """SHA-256 of source files that are known once all chunks were taken."""


@dataclass(slots=True)
class CopiedPiece:
    """A file as it is in the source.

    `locate` brings it there where it is still on a hub; `forget` ends its use.
    """

    name: str
    num_bytes: int
    locate: Callable[[], Path]
    expected: ExpectedHash | None = None
    forget: Callable[[Path], object] = field(default=lambda _: None)
    _sha256: str = ""

    def chunks(self) -> Iterator[Chunk]:
        """Raises CheckpointError where the source cannot be read, or is not what it should be."""
        path = self.locate()
        digests = Digests(path, self.num_bytes, self.expected).start()
        for chunk in read_source(path):
            digests.update(chunk)
            yield chunk
        try:
            self._sha256 = digests.finish()
        finally:
            self.forget(path)

    def read(self) -> Mapping[str, str]:
        """Its own."""
        return {self.name: self._sha256}


@dataclass(frozen=True, slots=True)
class MadePiece:
    """A small file that is written anew."""

    name: str
    content: bytes

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.content)

    def chunks(self) -> Iterator[Chunk]:
        """All of it."""
        yield self.content

    def read(self) -> Mapping[str, str]:
        """None."""
        return {}


@dataclass(frozen=True, slots=True)
class BuiltPiece:
    """A file of weights that is converted, tensor by tensor."""

    shard: Shard
    reader: TensorReader

    @property
    def name(self) -> str:
        """Of the shard."""
        return self.shard.name

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.shard.num_bytes

    def chunks(self) -> Iterator[Chunk]:
        """Raises EnvironmentSetupError where the largest tensor does not fit the memory."""
        yield self.shard.header
        for tensor in self.shard.tensors:
            try:
                content = self.reader.content(tensor)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise EnvironmentSetupError(
                    f"{tensor.name} ({tensor.num_bytes:,} bytes) does not fit the memory of this "
                    "process while it is converted: stage the model on a machine, or in a job, "
                    "with more"
                ) from error
            for start in range(0, len(content), _CHUNK_BYTES):
                yield content[start : start + _CHUNK_BYTES]

    def read(self) -> Mapping[str, str]:
        """None: the source's files are hashed before the first shard."""
        return {}


def read_source(path: Path) -> Iterator[bytes]:
    """The bytes of `path`.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}): mend its rights, or fetch it again"
        ) from error


def file_hash(path: Path, took: Callable[[int], object]) -> str:
    """SHA-256 of `path`; `took` hears of the bytes, and may raise.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    for chunk in read_source(path):
        digest.update(chunk)
        took(len(chunk))
    return digest.hexdigest()


def write_piece(folder: Path, piece: Piece, took: Callable[[int], object]) -> FileRecord:
    """Put `piece` into `folder`; `took` hears of the bytes written, and may raise.

    Raises:
        OutputError: it cannot be written, or what can be read there is something else.
        CheckpointError: the source cannot be read, or is damaged.
    """
    path = folder / piece.name
    digest, num_bytes = hashlib.sha256(), 0
    with told_as_output(path, remedy=REMEDY):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path, remedy=REMEDY, partial=partial_path(path)) as file:
        for chunk in piece.chunks():
            digest.update(chunk)
            file.write(chunk)
            num_bytes += len(chunk)
            took(len(chunk))
        file.flush()
        os.fsync(file.fileno())
        with suppress(OSError):  # some file systems have no cache to drop
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file_hash(Path(file.name), lambda _: None) != digest.hexdigest():
            raise OutputError(
                f"{path} does not read back as it was written: the disk or its file server is "
                "faulty; stage the model to another file system"
            )
    return FileRecord(num_bytes, digest.hexdigest())
