"""The run folder: claimed once, completions appended as they end, merged in input order.

Layout of `output.dir`: `manifest.json`, `completions_rank_<r>.jsonl` (in the order they ended, one
line written whole and flushed), `completions.jsonl` (in input order), `rank_<r>.log`,
`metrics.json`, `status.json` (`progress_file`), while it runs `.lock`
(`folder_lock`). Only the head writes completions. What is said to be written survives the loss of
the node: at once for whole files but `status.json`, after a second or so for completions.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mpipipe.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import TextIO

    from mpipipe.types import Completion

__all__ = [
    "CompletionWriter",
    "claim_run_folder",
    "completion_record",
    "holds_run",
    "merge",
    "write_json",
    "write_whole",
]

# An fsync takes 1-10 ms on a good disk, and much more on a busy shared file system.
_SYNC_INTERVAL_S = 1.0
_RUN_FILES = ("manifest.json", "metrics.json", "status.json", "completions*.jsonl", "rank_*.log")


def holds_run(folder: Path) -> bool:
    """Whether a run has left anything in `folder`."""
    return any(path for pattern in _RUN_FILES for path in folder.glob(pattern))


def claim_run_folder(folder: Path, *, overwrite: bool, resume: bool = False) -> None:
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


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """A full disk or lost file system becomes a sentence."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} could not be written ({error.strerror}): free space there or choose another "
            "output.dir; what is complete so far is in completions_rank_*.jsonl"
        ) from error


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write `document`, whole or not at all."""
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode())


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `content`; a reader sees the old or the new.

    durable: so does whoever looks after the node has lost its power; takes an fsync or two.

    Raises:
        OutputError: it could not be written.
    """
    with _told(path):
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
        if durable:
            _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a new name in `folder` last; some file systems cannot, and say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def completion_record(completion: Completion) -> dict[str, Any]:
    """The JSON form of a completion, documented in the README. Times in seconds."""
    record: dict[str, Any] = {"id": completion.request_id}
    if completion.error_kind is not None:
        record["error"] = {"kind": completion.error_kind, "message": completion.error_message}
    record |= {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason.value,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_output_tokens": completion.num_output_tokens,
        "queue_s": round(completion.queue_s, 6),
        "ttft_s": round(completion.ttft_s, 6),
        "latency_s": round(completion.latency_s, 6),
        "tokens_per_s": round(completion.tokens_per_s, 3),
    }
    if completion.logprobs is not None:
        record["logprobs"] = [
            {
                "token_id": entry.token_id,
                "logprob": entry.logprob,
                "top": [{"token_id": i, "logprob": p} for i, p in entry.top],
            }
            for entry in completion.logprobs
        ]
    return record


class _Syncer:
    """Brings a file's lines to the disk beside the event loop, at most once in an interval.

    Its thread sleeps until there is something new.
    """

    def __init__(self, descriptor: int) -> None:
        self.error: OSError | None = None  # the kernel tells it once only
        self._descriptor = descriptor
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
            if is_last:
                return
            self._closing.wait(_SYNC_INTERVAL_S)


class CompletionWriter:
    """Appends completions to `completions_rank_<r>.jsonl`, one whole line at a time.

    Use as a context manager; `index_of` remembers the input order for `merge`.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"completions_rank_{rank}.jsonl"
        self.index_of: dict[str, int] = {}
        self._file: TextIO | None = None
        self._syncer: _Syncer | None = None

    def __enter__(self) -> CompletionWriter:
        with _told(self.path):
            self._file = self.path.open("a", encoding="utf-8")
            _sync_folder(self.path.parent)
        self._syncer = _Syncer(self._file.fileno())
        self._syncer.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        assert self._syncer is not None
        self._syncer.close()  # a later attempt may run on another node
        with _told(self.path), self._file:
            self._check()
        self._file = None

    def write(self, completion: Completion) -> None:
        """Append one line; it is in the operating system's hands on return, on disk soon after.

        Raises:
            OutputError: it could not be written, or an earlier one did not reach the disk.
        """
        assert self._file is not None, "the writer is used inside its `with` block"
        assert self._syncer is not None
        line = json.dumps(completion_record(completion), ensure_ascii=False)
        with _told(self.path):
            self._check()
            self._file.write(line + "\n")
            self._file.flush()
        self._syncer.wake()
        self.index_of[completion.request_id] = completion.index

    def _check(self) -> None:
        if self._syncer is not None and self._syncer.error is not None:
            raise self._syncer.error


def merge(folder: Path, index_of: Mapping[str, int]) -> Path:
    """Write `completions.jsonl` from all ranks' files, in input order; returns its path.

    One line a prompt, the first: a node that Slurm has lost but the disk has not may still write.
    """
    lines: dict[int, str] = {}
    for path in sorted(folder.glob("completions_rank_*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                lines.setdefault(index_of[json.loads(line)["id"]], line)
    merged = folder / "completions.jsonl"
    write_whole(merged, "".join(line for _, line in sorted(lines.items())).encode())
    return merged
