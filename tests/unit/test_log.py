from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import structlog

from mpipipe.clock import ScriptedClock
from mpipipe.errors import OutputError
from mpipipe.metrics.identity import RunIdentity
from mpipipe.metrics.log import LogFile, RunLog, open_log

NOON = datetime(2026, 11, 21, 13, 0, 0, 250_000, tzinfo=timezone(timedelta(hours=1)))


IDENTITY = RunIdentity("0123456789ab", attempt=2, job="7", replica=0, rank=3, stage=1)


def opened(path: Path, level: str = "info") -> RunLog:
    clock = ScriptedClock(12.5)
    return open_log(path, identity=IDENTITY, host="n1", level=level, clock=clock, now=lambda: NOON)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_has_both_times_level_event_and_what_was_bound(tmp_path: Path) -> None:
    log = opened(tmp_path / "rank_3.log")
    log.info("weights_loaded", num_bytes=7)
    assert lines(tmp_path / "rank_3.log") == [
        {
            "time": "2026-11-21T12:00:00.250000Z",
            "t_s": 12.5,
            "level": "info",
            "event": "weights_loaded",
            "run": "0123456789ab",
            "attempt": 2,
            "job": "7",
            "replica": 0,
            "rank": 3,
            "stage": 1,
            "host": "n1",
            "num_bytes": 7,
        }
    ]
    log.close()


def test_the_readable_fields_come_first(tmp_path: Path) -> None:
    log = opened(tmp_path / "l")
    log.info("x", a=1)
    assert list(lines(tmp_path / "l")[0])[:4] == ["time", "t_s", "level", "event"]
    log.close()


@pytest.mark.parametrize(
    ("level", "kept"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
def test_lines_below_the_level_are_dropped(tmp_path: Path, level: str, kept: int) -> None:
    log = opened(tmp_path / "l", level=level)
    log.debug("d")
    log.info("i")
    log.warning("w")
    log.error("e")
    assert [line["event"] for line in lines(tmp_path / "l")] == ["d", "i", "w", "e"][4 - kept :]
    log.close()


def test_bind_adds_fields_to_later_events_only_of_the_new_logger(tmp_path: Path) -> None:
    log = opened(tmp_path / "l")
    bound = log.bind(request="a")
    bound.info("x")
    log.info("y")
    first, second = lines(tmp_path / "l")
    assert first["request"] == "a"
    assert "request" not in second
    log.close()


def test_a_line_is_on_disk_before_close_and_a_second_log_appends(tmp_path: Path) -> None:
    log = opened(tmp_path / "l")
    log.info("one")
    assert len(lines(tmp_path / "l")) == 1
    log.close()
    again = opened(tmp_path / "l")
    again.info("two")
    again.close()
    assert [line["event"] for line in lines(tmp_path / "l")] == ["one", "two"]


def test_an_exception_becomes_a_traceback_text(tmp_path: Path) -> None:
    log = opened(tmp_path / "l")
    try:
        raise RuntimeError("boom")
    except RuntimeError as error:
        log.error("failed", exc_info=error)
    (line,) = lines(tmp_path / "l")
    assert "RuntimeError: boom" in line["exception"]
    assert "Traceback" in line["exception"]
    log.close()


@pytest.mark.parametrize(
    "value",
    [float("nan"), {"x": float("inf")}, {(1, 2): 3}, Path("/x"), b"\xff", {1, 2}, "a\nb", "\ud800",
     "é\u2028"],
)  # fmt: skip
def test_any_value_gives_exactly_one_valid_line(tmp_path: Path, value: object) -> None:
    log = opened(tmp_path / "l")
    log.info("x", value=value)
    log.info("y")
    log.close()
    raw = (tmp_path / "l").read_bytes().split(b"\n")
    assert raw.pop() == b""
    found = [json.loads(line.decode("utf-8"), parse_constant=pytest.fail) for line in raw]
    assert [line["event"] for line in found] == ["x", "y"]


def test_a_circle_is_written_as_text(tmp_path: Path) -> None:
    log = opened(tmp_path / "l")
    circle: list[object] = []
    circle.append(circle)
    log.info("x", value=circle)
    assert lines(tmp_path / "l")[0]["value"] == "[[...]]"
    log.close()


def test_percent_signs_are_text(tmp_path: Path) -> None:
    log = opened(tmp_path / "l")
    log.info("100 %s {done}")
    assert lines(tmp_path / "l")[0]["event"] == "100 %s {done}"
    log.close()


def test_closing_twice_is_fine_and_later_lines_are_lost(tmp_path: Path) -> None:
    log = opened(tmp_path / "l")
    log.close()
    log.close()
    log.bind(a=1).info("late")
    assert lines(tmp_path / "l") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_stop_the_run_and_is_told_once() -> None:
    told: list[str] = []
    log = open_log(Path("/dev/full"), identity=IDENTITY, host="h", on_failure=told.append)
    log.info("x")
    log.info("y")
    log.close()
    log.close()
    assert len(told) == 1
    assert "/dev/full cannot be written (No space left on device)" in told[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("closed file")])
def test_a_full_disk_under_the_warning_too_does_not_stop_the_run(error: Exception) -> None:
    asked: list[str] = []

    def tell(message: str) -> None:
        asked.append(message)
        raise error

    log = open_log(Path("/dev/full"), identity=IDENTITY, host="h", on_failure=tell)
    log.info("x")
    log.close()
    assert len(asked) == 1


def test_a_line_that_did_not_fit_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = open_log(path, identity=IDENTITY, host="h")
    log.info("one")
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        log.info("torn")
        log.info("lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.info("two")
    log.close()
    first, torn, last = path.read_text().splitlines()
    assert len(torn) == 10
    assert [json.loads(line)["event"] for line in (first, last)] == ["one", "two"]


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"output\.dir"):
        opened(tmp_path / "no" / "rank_0.log")


def test_lines_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    log = opened(tmp_path / "l")

    def write(thread: int) -> None:
        for number in range(50):
            log.info("x", thread=thread, number=number, text="y" * 500)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(line["thread"], line["number"]) for line in lines(tmp_path / "l")]
    assert sorted(found) == [(t, n) for t in range(4) for n in range(50)]
    log.close()


def test_the_programs_own_structlog_is_left_alone(tmp_path: Path) -> None:
    structlog.reset_defaults()
    before = structlog.get_config()
    log = opened(tmp_path / "l")
    log.info("x")
    log.close()
    assert not structlog.is_configured()
    assert structlog.get_config() == before


def test_real_clocks_are_the_default(tmp_path: Path) -> None:
    log = open_log(tmp_path / "l", identity=IDENTITY, host="h")
    log.info("x")
    (line,) = lines(tmp_path / "l")
    age = datetime.now(UTC) - datetime.fromisoformat(line["time"])
    assert timedelta(0) <= age < timedelta(minutes=1)
    log.close()


def test_importing_the_module_does_not_import_structlog() -> None:
    code = "import sys, mpipipe.metrics.log; sys.exit('structlog' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_a_failure_that_is_told_may_be_logged(tmp_path: Path) -> None:
    """Log and terminal are on one full disk: the terminal's failure goes to the log that failed."""
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        log.warning("terminal", message="standard error cannot be written")

    log = open_log(Path("/dev/full"), identity=IDENTITY, host="n1", on_failure=tell)
    writing = threading.Thread(target=log.info, args=("x",), daemon=True)
    writing.start()
    writing.join(20)
    assert not writing.is_alive(), "the log waits for itself"
    assert len(told) == 1
    log.close()


class StuckDisk:
    """Takes a write once it is let."""

    closed = False

    def __init__(self) -> None:
        self.let, self.entered = threading.Event(), threading.Event()
        self.written = b""

    def write(self, text: bytes) -> int:
        self.entered.set()
        assert self.let.wait(20), "the test waits for itself"
        self.written += text
        return len(text)

    def close(self) -> None:
        self.closed = True


def test_telling_a_line_waits_for_no_disk_while_a_thread_writes() -> None:
    disk: Any = StuckDisk()
    file = LogFile(disk, Path("rank_0.log"), pytest.fail)
    file.defer()
    file.msg("one")
    writing = threading.Thread(target=file.write_told)
    writing.start()
    assert disk.entered.wait(20)
    file.msg("two")  # returns, though the disk does not answer
    disk.let.set()
    writing.join(20)
    file.close_file()
    file.close_file()
    assert disk.written == b"one\ntwo\n"
    assert disk.closed


def test_a_log_that_is_closed_early_has_all_lines_in_their_order(tmp_path: Path) -> None:
    """A fatal error: the thread that was to write the lines has not had its turn."""
    log = opened(tmp_path / "l")
    log.info("begin")
    log.file.defer()
    for _ in range(100):
        log.info("preempted")
    assert [line["event"] for line in lines(tmp_path / "l")] == ["begin"]
    log.error("ended early")
    log.close()
    events = [line["event"] for line in lines(tmp_path / "l")]
    assert events == ["begin", *["preempted"] * 100, "ended early"]


def test_too_many_waiting_lines_and_those_of_a_full_disk_are_counted_as_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mpipipe.metrics.log._MOST_WAITING", 40)
    told: list[str] = []
    full: Any = FullDisk(room=10)
    file = LogFile(full, Path("rank_0.log"), told.append)
    file.defer()
    for number in range(50):
        file.msg(f"line {number}")
    assert file.num_lost == 10
    file.close()
    assert full.written == b"line 0\nlin"
    assert file.num_lost == 49
    assert len(told) == 1
    full.room = 100
    file.msg("again")
    assert full.written == b"line 0\nlin\nagain\n"


class FullDisk:
    """Takes so many bytes more."""

    closed = False

    def __init__(self, room: int) -> None:
        self.room = room
        self.written = b""

    def write(self, text: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = text[: self.room]
        self.room -= len(taken)
        self.written += taken
        return len(taken)
