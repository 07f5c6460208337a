"""New lines of all ranks' logs as they come, like `tail -f` over several files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from mpipipe.logs.reading import Line, RunFiles, number, text
from mpipipe.plain_values import json_object

__all__ = ["LogFollower", "told_line"]

_CHUNK_BYTES = 1 << 20
_WITHOUT = {
    "time", "t_s", "level", "event", "run", "attempt", "job", "replica", "rank", "stage", "host",
}  # fmt: skip


class LogFollower:
    """Reads what was added to the logs of a run since it was asked last.

    Args:
        files: of the run; logs that appear later are followed too.
        num_last: how many lines of each log to begin with.
    """

    def __init__(self, files: RunFiles, num_last: int) -> None:
        self._files = files
        self._num_last = num_last
        self._offsets: dict[Path, int] = {}
        self._partial: dict[Path, bytes] = {}

    def poll(self) -> list[Line]:
        """The new lines of all logs, in the order of their times."""
        found: list[Line] = []
        for rank in self._files.ranks():
            path = self._files.folder / f"rank_{rank}.log"
            is_new = path not in self._offsets
            lines = [line for row in self._new_rows(path) if (line := self._parsed(path, row))]
            found += lines[-self._num_last :] if is_new and self._num_last else lines
            if is_new and not self._num_last:
                del found[len(found) - len(lines) :]
        return sorted(found, key=lambda line: (text(line, "time"), number(line, "t_s") or 0.0))

    def _new_rows(self, path: Path) -> Iterator[bytes]:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                offset = self._offsets.get(path, 0)
                if size < offset:  # replaced by a new run in the same folder
                    offset, self._partial[path] = 0, b""
                file.seek(offset)
                rows = (self._partial.get(path, b"") + file.read()).split(b"\n")
                self._offsets[path] = file.tell()
        except OSError:  # gone, or not there yet
            return
        self._partial[path] = rows.pop()
        yield from (row for row in rows if row)

    def _parsed(self, path: Path, row: bytes) -> Line | None:
        line = json_object(row)
        if line is None:
            self._files.add_torn(path.name)
        return line


def told_line(line: Line) -> str:
    """One event as a line for people."""
    fields = {name: value for name, value in line.items() if name not in _WITHOUT}
    told = " ".join(f"{name}={_short(value)}" for name, value in fields.items())
    clock, event = text(line, "time")[11:23], text(line, "event")
    return f"{clock} rank {line.get('rank', '?')} {text(line, 'level'):7} {event} {told}".rstrip()


def _short(value: object) -> str:
    told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return told if len(told) <= 160 else f"{told[:157]}..."
