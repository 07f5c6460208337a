"""`mpipipe stage-model`: a model onto shared storage; shows progress, says what came of it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe.checkpoint.staged import MANIFEST_NAME
from mpipipe.cli.progress_display import ProgressDisplay
from mpipipe.config.byte_sizes import parse_bytes
from mpipipe.errors import EXIT_OK, ConfigError, StoppedByUserError, StoppedError
from mpipipe.run_folder.status import duration
from mpipipe.staging.record import Conversion
from mpipipe.staging.stage import StagingOutcome, StagingRequest, stage_model, verify_folder

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["stage_model_command", "verify_command"]

_DTYPES = ("float32", "float16", "bfloat16")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def stage_model_command(
    source: str,
    destination: Path,
    *,
    dtype: str | None,
    shard_size: str | None,
    tokenizer: Path | None,
    command: str,
) -> int:
    """Stage a model; returns the exit code.

    Raises:
        MpipipeError: a wrong option; what `stage_model` raises.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype} is not one of {', '.join(_DTYPES)}")
    conversion = Conversion(
        dtype=dtype,
        shard_bytes=None if shard_size is None else _shard_bytes(shard_size),
        tokenizer=None if tokenizer is None else str(tokenizer.absolute()),
    )
    request = StagingRequest(source, destination, conversion, command)
    with _stopping() as stop, _shown(stop) as view:
        outcome = stage_model(request, view)
    print("\n".join(_lines(outcome, destination)), flush=True)
    return EXIT_OK


def verify_command(folder: Path) -> int:
    """Compare a staged folder with its manifest; returns the exit code.

    Raises:
        MpipipeError: it differs.
    """
    with _stopping() as stop, _shown(stop) as view:
        record = verify_folder(folder, view)
    total = sum(file.num_bytes for file in record.files.values())
    print(
        f"{folder}: all {len(record.files)} files ({total / 1e9:,.2f} GB) are as they were staged "
        f"from {record.source} on {record.finished_at}"
    )
    return EXIT_OK


def _shard_bytes(text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f'--shard-size "{text}" {error}') from error
    if size < 1:
        raise ConfigError(f'--shard-size "{text}" holds nothing: 5GB is usual')
    return size


def _lines(outcome: StagingOutcome, folder: Path) -> list[str]:
    record = outcome.record
    total = sum(file.num_bytes for file in record.files.values())
    at = f" at {record.revision[:12]}" if record.revision else ""
    if outcome.num_written == 0:
        told = f"{folder} holds {record.source}{at} since {record.finished_at}: nothing to do "
        check = shlex.join(["mpipipe", "stage-model", "--verify", str(folder)])
        return [f"{told}(`{check}` reads and checks its files)"]
    kept = f", {outcome.num_kept} of them kept from an earlier attempt" * (outcome.num_kept > 0)
    size = f"{len(record.files)} files, {total / 1e9:,.2f} GB"
    lines = [f"{folder} holds {record.source}{at}: {size}{kept}; hashes in {MANIFEST_NAME}"]
    if outcome.left_out:
        shown = ", ".join(outcome.left_out[:6]) + (", …" if len(outcome.left_out) > 6 else "")
        lines.append(f"Not copied, as no run reads them: {shown}")
    return lines


class _Stop:
    """Whether a signal has come: raised where it came, and again where a library swallowed it."""

    def __init__(self) -> None:
        self._name = ""

    def take(self, number: int, _: FrameType | None) -> None:
        """A signal came."""
        self._name = signal.Signals(number).name
        self.check()

    def check(self) -> None:
        """Raises StoppedError after a signal."""
        if self._name:
            kind = StoppedByUserError if self._name == "SIGINT" else StoppedError
            raise kind(
                f"stopped ({self._name}): what is complete is kept; give the same command again to "
                "go on"
            )


@contextmanager
def _stopping() -> Iterator[_Stop]:
    stop = _Stop()
    # What is ignored stays so: that is what nohup asks for.
    taken = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop.take) for number in taken}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _View:
    """Bytes done of the part under way, on standard error."""

    def __init__(self, stop: _Stop) -> None:
        self._stop = stop
        self._display = ProgressDisplay("none", sys.stderr)
        self._what = ""
        self._total = self._done = 0

    def begin(self, what: str, num_bytes: int) -> None:
        """A part begins."""
        self.close()
        self._what, self._total, self._done = what, num_bytes, 0
        self._display = ProgressDisplay("auto", sys.stderr)
        self._display.start(num_bytes)

    def took(self, num_bytes: int) -> None:
        """Draw, where it is time to."""
        self._stop.check()
        self._done += num_bytes
        elapsed_s = self._display.elapsed_s
        facts = [f"{self._done / 1e9:,.2f} of {self._total / 1e9:,.2f} GB"]
        if self._total == 0:  # how much is fetched shows as it comes
            facts = [f"{self._done / 1e9:,.2f} GB"]
        if elapsed_s > 0:
            facts.append(f"{self._done / elapsed_s / 1e6:,.0f} MB/s")
            left = self._total - self._done
            if self._done and left > 0:
                facts.append(f"ETA {duration(left * elapsed_s / self._done)}")
        self._display.show(self._done, f"{self._what} · {' · '.join(facts)}")

    def close(self) -> None:
        """End the display."""
        with suppress(OSError, ValueError):
            self._display.close()


@contextmanager
def _shown(stop: _Stop) -> Iterator[_View]:
    # transformers draws bars and gives advice of its own.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    view = _View(stop)
    try:
        yield view
    finally:
        view.close()
