"""What `mpipipe stage-model` says, and how a signal ends it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mpipipe.cli.stage_model import _lines, _shown, _stopping, stage_model_command
from mpipipe.errors import (
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    ConfigError,
    StoppedByUserError,
    StoppedError,
)
from mpipipe.staging.record import Conversion, FileRecord, StagingRecord
from mpipipe.staging.stage import StagingOutcome

RECORD = StagingRecord(
    source="hf:org/name",
    revision="0123456789abcdef",
    conversion=Conversion(),
    read={},
    num_files=2,
    command="mpipipe stage-model hf:org/name /shared/name",
    mpipipe_version="1",
    files={name: FileRecord(3 * 10**9, "") for name in ("a.safetensors", "b.safetensors")},
    finished_at="2026-01-01T00:00:00+00:00",
)
FOLDER = Path("/shared/name")


def test_what_was_written_kept_and_left_out_is_said() -> None:
    first, second = _lines(StagingOutcome(RECORD, 1, 1, ("x.h5", "y.onnx")), FOLDER)
    assert first == (
        "/shared/name holds hf:org/name at 0123456789ab: 2 files, 6.00 GB, 1 of them kept from an "
        "earlier attempt; hashes in mpipipe-model.json"
    )
    assert second == "Not copied, as no run reads them: x.h5, y.onnx"


def test_a_second_run_says_that_nothing_was_to_be_done() -> None:
    (line,) = _lines(StagingOutcome(RECORD, 0, 2), FOLDER)
    assert "since 2026-01-01T00:00:00+00:00: nothing to do" in line
    assert "--verify /shared/name`" in line
    (line,) = _lines(StagingOutcome(RECORD, 0, 2), Path("/shared/my models"))
    assert "`mpipipe stage-model --verify '/shared/my models'`" in line


@pytest.mark.parametrize(
    ("number", "kind", "exit_code"),
    [
        (signal.SIGTERM, StoppedError, EXIT_REQUEUE),
        (signal.SIGUSR1, StoppedError, EXIT_REQUEUE),
        (signal.SIGINT, StoppedByUserError, EXIT_INTERRUPTED),
    ],
)
def test_a_signal_is_raised_and_again_where_a_library_swallowed_it(
    number: signal.Signals, kind: type[StoppedError], exit_code: int
) -> None:
    before = signal.getsignal(number)
    with _stopping() as stop, _shown(stop) as view:
        view.begin("writing", 10)
        view.took(1)
        with pytest.raises(kind, match=f"{number.name}.*same command again"):
            os.kill(os.getpid(), number)
        with pytest.raises(kind) as caught:
            view.took(1)
    assert caught.value.exit_code == exit_code
    assert signal.getsignal(number) == before


def test_nohup_is_heard() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _stopping():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_progress_is_told_in_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    with _stopping() as stop, _shown(stop) as view:
        view.begin("hashing", 2 * 10**9)
        view.took(10**9)
        view.begin("writing", 10**9)
        view.took(10**9)
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("hashing · 1.00 of 2.00 GB · ")
    assert "ETA" in first
    assert second.startswith("writing · 1.00 of 1.00 GB · ")
    assert "ETA" not in second


@pytest.mark.parametrize(
    ("dtype", "shard_size", "words"),
    [
        ("int8", None, "--dtype int8 is not one of"),
        (None, "5XB", '--shard-size "5XB" has the unit'),
        (None, "0", '--shard-size "0" holds nothing'),
    ],
)
def test_wrong_options_are_refused(
    dtype: str | None, shard_size: str | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        stage_model_command(
            str(tmp_path),
            tmp_path / "staged",
            dtype=dtype,
            shard_size=shard_size,
            tokenizer=None,
            command="",
        )
