"""The run folder: claimed once, completions appended as they end, merged in input order.

Layout of `output.dir`: `manifest.json`, `completions_rank_<r>.jsonl` (in the order they ended, one
line written whole and flushed), `completions.jsonl` (in input order), `rank_<r>.log`,
`metrics.json`, `status.json` (`progress_file`). Only the head writes completions.
"""

from __future__ import annotations

import json
import os
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
    "merge",
    "write_json",
    "write_whole",
]

_RUN_FILES = ("manifest.json", "metrics.json", "status.json", "completions*.jsonl", "rank_*.log")


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


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; a reader sees the old or the new, and so does a crash.

    Raises:
        OutputError: it could not be written.
    """
    with _told(path):
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(path)


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


class CompletionWriter:
    """Appends completions to `completions_rank_<r>.jsonl`, one whole line at a time.

    Use as a context manager; `index_of` remembers the input order for `merge`.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"completions_rank_{rank}.jsonl"
        self.index_of: dict[str, int] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> CompletionWriter:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with _told(self.path), self._file:
                os.fsync(self._file.fileno())  # a later attempt may run on another node
            self._file = None

    def write(self, completion: Completion) -> None:
        """Append one line; it is in the operating system's hands on return."""
        assert self._file is not None, "the writer is used inside its `with` block"
        line = json.dumps(completion_record(completion), ensure_ascii=False)
        with _told(self.path):
            self._file.write(line + "\n")
            self._file.flush()
        self.index_of[completion.request_id] = completion.index


def merge(folder: Path, index_of: Mapping[str, int]) -> Path:
    """Write `completions.jsonl` from all ranks' files, in input order; returns its path."""
    lines: list[tuple[int, str]] = []
    for path in sorted(folder.glob("completions_rank_*.jsonl")):
        with path.open(encoding="utf-8") as file:
            lines.extend((index_of[json.loads(line)["id"]], line) for line in file)
    merged = folder / "completions.jsonl"
    write_whole(merged, "".join(line for _, line in sorted(lines)).encode())
    return merged
