"""The log of one rank: structlog events as JSON lines in `rank_<r>.log`.

Every line has `time` (UTC), `t_s` (monotonic seconds), `level`, `event`, the identity (`identity`),
`host`, and what was bound. Invariants: nothing global is configured, so a program that uses mpipipe
as a library keeps its own structlog; a line is written whole, and at once unless a thread was asked
to write (`LogFile.defer`); a value that JSON cannot hold, or a full disk, never stops the run.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mpipipe.clock import Clock, MonotonicClock
from mpipipe.errors import OutputError

if TYPE_CHECKING:
    from io import FileIO

    from structlog.typing import FilteringBoundLogger

    from mpipipe.metrics.identity import RunIdentity

__all__ = ["LogFile", "Logger", "NullLog", "RunLog", "open_log", "utc_now"]

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}  # numbers of the logging module
_LINES_PER_WRITE = 32
_MOST_WAITING = 200_000


class Logger(Protocol):
    """Where events go: a short name and fields. `exc_info=error` adds a traceback."""

    def debug(self, event: str, **fields: object) -> None:
        """An event that only helps to find a bug."""
        ...

    def info(self, event: str, **fields: object) -> None:
        """An event of a normal run."""
        ...

    def warning(self, event: str, **fields: object) -> None:
        """An event that a user should know of, though the run goes on."""
        ...

    def error(self, event: str, **fields: object) -> None:
        """An event that ends a request or the run."""
        ...

    def bind(self, **fields: object) -> Logger:
        """A logger that adds `fields` to each of its events."""
        ...


def utc_now() -> datetime:
    """The wall-clock time with its zone."""
    return datetime.now(UTC)


def open_log(
    path: Path,
    *,
    identity: RunIdentity,
    host: str,
    level: str = "info",
    clock: Clock | None = None,
    now: Callable[[], datetime] = utc_now,
    on_failure: Callable[[str], object] = lambda _: None,
) -> RunLog:
    """Append to the log at `path`; lines below `level` (a key of `_LEVELS`) are dropped.

    `on_failure` is told once, in a sentence, that lines are lost because the file takes no more.

    Raises:
        OutputError: the file cannot be opened.
    """
    import structlog  # 0.1 s, for its console colours: only ranks that log pay it

    try:
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise OutputError(
            f"the log {str(path)!r} cannot be written ({error.strerror}): choose another output.dir"
        ) from error
    sink = LogFile(file, path, on_failure)
    logger: FilteringBoundLogger = structlog.wrap_logger(
        sink,
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            _Stamp(clock or MonotonicClock(), now),
            _json_line,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        context_class=dict,
        cache_logger_on_first_use=True,
        **identity.fields(),
        host=host,
    )
    return RunLog(logger.bind(), sink)


class RunLog:
    """A `Logger` on an open file. `bind` shares the file; closing one closes all."""

    def __init__(self, logger: FilteringBoundLogger, file: LogFile) -> None:
        self._logger = logger
        self.file = file

    def debug(self, event: str, **fields: object) -> None:
        """See `Logger`."""
        self._logger.debug(event, **fields)

    def info(self, event: str, **fields: object) -> None:
        """See `Logger`."""
        self._logger.info(event, **fields)

    def warning(self, event: str, **fields: object) -> None:
        """See `Logger`."""
        self._logger.warning(event, **fields)

    def error(self, event: str, **fields: object) -> None:
        """See `Logger`."""
        self._logger.error(event, **fields)

    def bind(self, **fields: object) -> RunLog:
        """See `Logger`."""
        return RunLog(self._logger.bind(**fields), self.file)

    def close(self) -> None:
        """Write what waits and close the file; later events are lost. May be called twice."""
        self.file.close_file()


class NullLog:
    """A `Logger` that keeps nothing: for scripts that use the library."""

    def debug(self, event: str, **fields: object) -> None:
        """Nothing."""

    def info(self, event: str, **fields: object) -> None:
        """Nothing."""

    def warning(self, event: str, **fields: object) -> None:
        """Nothing."""

    def error(self, event: str, **fields: object) -> None:
        """Nothing."""

    def bind(self, **_: object) -> NullLog:
        """Itself."""
        return self


class LogFile:
    """The file under structlog: locked, unbuffered writes of whole lines, from any thread.

    Every line passes one queue, so they stand in the order in which they were told. Between `defer`
    and `close` that is all that telling does, and a thread calls `write_told`: it is one of the
    files of a `run_folder.line_thread.LineThread`.
    """

    def __init__(self, file: FileIO, path: Path, on_failure: Callable[[str], object]) -> None:
        self.path = path
        self.num_lost = 0  # told too fast, or the disk did not take them
        self.told: deque[str] = deque()
        self._file = file
        self._on_failure: Callable[[str], object] | None = on_failure
        self._lock = threading.Lock()
        self._is_torn = False  # the last line did not fit as a whole
        self._is_deferred = False

    def msg(self, line: str) -> None:
        """Write `line`, after those that wait; lost when very many do."""
        if len(self.told) < _MOST_WAITING:
            self.told.append(line)
        else:
            self.num_lost += 1
        if not self._is_deferred:
            self.write_told()

    debug = info = warning = error = msg

    def defer(self) -> None:
        """From now on lines wait for `write_told`; telling one waits for no disk."""
        self._is_deferred = True

    def write_told(self) -> None:
        """Append what was told so far. A file that takes no more is told of once, then ignored."""
        try:
            self._write()
        except OSError as error:  # reported without the lock: the report may log a failure itself
            self._tell(error)

    def close(self) -> None:
        """No thread calls `write_told` any more: write what waits, and later lines at once."""
        self._is_deferred = False
        self.write_told()
        while self.told:  # a line that fails keeps no later one from the disk
            self.write_told()

    def close_file(self) -> None:
        """Write what waits and close the file."""
        self.close()
        with self._lock, contextlib.suppress(OSError):
            self._file.close()

    def _write(self) -> None:
        with self._lock:
            while self.told:
                lines = [self.told.popleft() for _ in range(min(_LINES_PER_WRITE, len(self.told)))]
                if not self._file.closed:
                    self._append(lines)

    def _append(self, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
        start, num_written = b"\n" if self._is_torn else b"", 0
        try:
            num_written = self._file.write(start + text)
            self._is_torn = num_written < len(start) + len(text)
        finally:
            self.num_lost += len(lines) - text.count(b"\n", 0, max(0, num_written - len(start)))

    def _tell(self, error: OSError) -> None:
        tell, self._on_failure = self._on_failure, None
        if tell is None:
            return
        # Standard error may be on the same full disk, or closed.
        with contextlib.suppress(OSError, ValueError):
            tell(
                f"the log {self.path} cannot be written ({error.strerror}): its lines are lost "
                "until it can; completions are not touched by that"
            )


class _Stamp:
    """Puts the two times and the event in front, so that lines can be read by eye."""

    def __init__(self, clock: Clock, now: Callable[[], datetime]) -> None:
        self._clock = clock
        self._now = now

    def __call__(
        self, _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        time = self._now().astimezone(UTC).isoformat(timespec="microseconds")
        front = {
            "time": time.replace("+00:00", "Z"),
            "t_s": round(self._clock.now_s(), 6),
            "level": event.pop("level"),
            "event": event.pop("event"),
        }
        return {**front, **event}


def _json_line(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    try:
        return json.dumps(event, ensure_ascii=False, allow_nan=False, default=str)
    except (TypeError, ValueError, RecursionError):  # NaN, keys that are no text, a circle
        plain = (str, int, bool, type(None))
        return json.dumps(
            {k: v if isinstance(v, plain) else repr(v) for k, v in event.items()},
            ensure_ascii=False,
        )
