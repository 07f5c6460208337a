"""The run folder: one run has it; its files replaced whole.

Layout of `output.dir`: `manifest.json`, `completions_rank_<r>.jsonl` (`journal`: in the order they
ended, one line written whole and flushed), `completions.jsonl` (in input order), `rank_<r>.log`,
`metrics.json`, `status.json` (`status_file`), `damaged_rank_<r>.jsonl` where lines were damaged,
`sacct_<job>.txt` of a Slurm job (`accounts`), a profiler's `torch_rank_<r>.json`, `nsys_rank_<r>.*`
or `perf_rank_<r>.*`, while it runs `.lock` (`lock`). Only the head writes completions. What is said
to be written survives the loss of the node: at once for whole files but `status.json`, after a
second or so for completions.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from mpipipe.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "holds_run",
    "json_bytes",
    "prepare_run_folder",
    "replaced_file",
    "sync_folder",
    "told_as_output",
    "write_json",
    "write_whole",
]

_RUN_FILES = (
    "manifest.json",
    "metrics.json",
    "status.json",
    "completions*.jsonl",
    "damaged_rank_*.jsonl",
    "requests.jsonl",
    "steps_rank_*.jsonl",
    "samples_rank_*.jsonl",
    "messages_rank_*.jsonl",
    "clock.jsonl",
    "rank_*.log",
)


def holds_run(folder: Path) -> bool:
    """Whether a run has left anything in `folder`."""
    return any(path for pattern in _RUN_FILES for path in folder.glob(pattern))


def prepare_run_folder(folder: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Make `folder` ready for a new run, or refuse; `resume`: what is there stays.

    Raises:
        OutputError: it holds another run (and `overwrite` is off), is no folder, or cannot be
            written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = sorted(path for pattern in _RUN_FILES for path in folder.glob(pattern))
        if earlier and not (overwrite or resume):
            raise OutputError(
                f"output.dir = {folder} already holds a run ({earlier[0].name}): choose another "
                "folder, or set output.overwrite=true to replace it, or output.resume=true to go "
                "on with it"
            )
        for path in () if resume else earlier:
            path.unlink()
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except FileExistsError as error:
        raise OutputError(
            f"output.dir = {folder} is a file: the run folder must be a new or empty folder"
        ) from error
    except OSError as error:
        raise OutputError(
            f"output.dir = {folder} cannot be written ({error.strerror}): choose a folder on a "
            "file system that all ranks can write to"
        ) from error


_RESUME = (
    "mend that, free space there, or choose another output.dir; what is complete so far is in "
    "completions_rank_*.jsonl, and output.resume=true goes on from it"
)


@contextmanager
def told_as_output(path: Path, verb: str = "written", remedy: str = _RESUME) -> Iterator[None]:
    """A full disk or lost file system becomes a sentence: `path` could not be `verb`; `remedy`.

    Raises:
        OutputError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} could not be {verb} ({error.strerror or error}): {remedy}"
        ) from error


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write `document`, whole or not at all."""
    write_whole(path, json_bytes(document))


def json_bytes(document: dict[str, Any]) -> bytes:
    """`document` as the content of a file."""
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # half of a surrogate pair: as JSON escapes it


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `content`; a reader sees the old or the new.

    durable: also a reader after the node has lost its power; takes an fsync or two.

    Raises:
        OutputError: it could not be written.
    """
    with replaced_file(path, durable=durable) as file:
        file.write(content)


@contextmanager
def replaced_file(
    path: Path, *, durable: bool = True, remedy: str = _RESUME, partial: Path | None = None
) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` at the end, as `write_whole` does.

    `remedy`: what to do where it cannot be written; `partial`: its name until the end.

    Raises:
        OutputError: it could not be written, and `path` is as before.
    """
    partial = partial or path.with_suffix(".partial")
    with told_as_output(path, remedy=remedy):
        try:
            with partial.open("wb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):  # it may be what fills the disk
                partial.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a new name in `folder` last; some file systems cannot, and say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
