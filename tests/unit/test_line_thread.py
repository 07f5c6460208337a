"""Lines that a thread writes: whole, in order, the latest ones kept; and a disk that takes none."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mpipipe.clock import MonotonicClock, ScriptedClock
from mpipipe.run_folder import line_thread
from mpipipe.run_folder.line_thread import LineFile, LineThread

LIMIT_S = 30.0
ROOT = Path(__file__).resolve().parents[2]


def line_of(number: int) -> str:
    return f'{{"n": {number}}}\n'


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def write(file: LineFile[int]) -> None:
    file.write_told()
    file.close()


def told(path: Path, *items: int, num_kept: int | None = None) -> LineFile[int]:
    file = LineFile(path, line_of, num_kept=num_kept)
    for item in items:
        file.tell(item)
    return file


def test_what_was_told_is_appended_in_order(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    file = told(path, *range(100))
    file.write_told()
    file.tell(100)
    file.write_told()
    file.close()
    again = told(path, 101)  # of a later attempt
    write(again)
    assert numbers(path) == list(range(102))


def test_nothing_told_makes_no_file(tmp_path: Path) -> None:
    write(told(tmp_path / "lines.jsonl"))
    assert not list(tmp_path.iterdir())


def test_a_torn_line_of_a_killed_rank_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{"n')
    write(told(path, 3))
    assert numbers(path) == [1, 2, 3]
    path.write_text('{"n')
    write(told(path, 4))
    assert numbers(path) == [4]


@pytest.mark.parametrize("before", ["", '{"n": 1}\n'])
def test_a_torn_line_of_any_length_is_cut_off(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_thread, "_BLOCK_BYTES", 1 << 12)
    path = tmp_path / "lines.jsonl"
    path.write_text(before + '{"n": ' + "9" * (1 << 17))
    write(told(path, 2))
    assert numbers(path) == ([1, 2] if before else [2])


def test_a_file_that_kept_all_lines_is_not_lost_when_the_latest_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_thread, "_BLOCK_BYTES", 1 << 6)
    path = tmp_path / "steps_rank_0.jsonl"
    for second in (0, 200):
        write(told(path, *range(second, second + 100)))  # all
        write(told(path, *range(second + 100, second + 120), num_kept=5))
    whole = path.with_name("steps_rank_0.all.jsonl"), path.with_name("steps_rank_0.all2.jsonl")
    assert numbers(whole[0]) == list(range(100))
    assert numbers(whole[1])[-100:] == list(range(200, 300))
    assert numbers(path)[-1] == 319


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_the_latest_lines_are_kept_in_two_files_that_take_turns(tmp_path: Path, batch: int) -> None:
    path, num_kept = tmp_path / "steps_rank_0.jsonl", 100
    file = told(path, num_kept=num_kept)
    for first in range(0, 1000, batch):
        for number in range(first, min(first + batch, 1000)):
            file.tell(number)
        file.write_told()
        kept = numbers(path)
        older = path.with_name("steps_rank_0.1.jsonl")
        kept = (numbers(older) if older.exists() else []) + kept
        last = min(first + batch, 1000)
        assert kept == list(range(kept[0], last))
        assert len(kept) >= min(num_kept, last)
        assert len(kept) <= 2 * (num_kept + 32)
    file.close()


def test_a_later_attempt_goes_on_with_the_file_that_has_room(tmp_path: Path) -> None:
    path = tmp_path / "steps_rank_0.jsonl"
    for first in range(0, 12, 3):  # of attempts
        write(told(path, *range(first, first + 3), num_kept=5))
    assert numbers(path.with_name("steps_rank_0.1.jsonl")) == list(range(6))
    assert numbers(path) == list(range(6, 12))


def test_half_of_a_surrogate_pair_is_escaped(tmp_path: Path) -> None:
    file = LineFile[str](tmp_path / "lines.jsonl", lambda text: f'{{"id": "{text}"}}\n')
    file.tell("\ud83d")
    file.tell("é")
    file.write_told()
    file.close()
    lines = file.path.read_bytes().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["\ud83d", "é"]


KILLED = """
import sys, time
from pathlib import Path
from mpipipe.clock import MonotonicClock, ScriptedClock
from mpipipe.run_folder.line_thread import LineFile, LineThread
file = LineFile(Path(sys.argv[1]), lambda number: f'{{"n": {number}}}\\n')
LineThread((file,), clock=MonotonicClock()).start()
for number in range(100):
    file.tell(number)
time.sleep(60)
"""


def test_lines_of_a_rank_that_is_killed_are_there_a_moment_after_they_were_told(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lines.jsonl"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=ROOT) as rank:
        end_s = time.monotonic() + LIMIT_S
        while not (path.exists() and b'"n": 99}' in path.read_bytes()):
            assert time.monotonic() < end_s
            time.sleep(0.02)
        rank.kill()  # it never closes the file
    assert numbers(path) == list(range(100))


class FullDisk:
    """Takes so many bytes more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.written = b""

    def write(self, lines: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = lines[: self.room]
        self.room -= len(taken)
        self.written += taken
        return len(taken)

    def close(self) -> None:
        pass


def test_a_full_disk_loses_lines_and_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    full = told(tmp_path / "folder", 1, 2)  # a folder cannot be opened as a file
    fine = told(tmp_path / "lines.jsonl", 3)
    failures: list[str] = []
    thread = LineThread((full, fine), clock=MonotonicClock(), on_failure=failures.append)
    thread._write()
    full.tell(4)
    thread._write()
    fine.close()
    assert full.num_lost == 3
    assert numbers(fine.path) == [3]
    (sentence,) = failures
    assert f"{full.path} cannot be written (Is a directory)" in sentence


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("closed file")])
def test_a_warning_that_cannot_be_printed_ends_nothing(error: Exception, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()

    def tell(_: str) -> None:
        raise error

    full, fine = told(tmp_path / "folder", 1), told(tmp_path / "lines.jsonl", 2)
    thread = LineThread((full, fine), clock=MonotonicClock(), on_failure=tell)
    thread._write()
    fine.close()
    assert numbers(fine.path) == [2]


def test_a_line_that_did_not_fit_is_cut_off_when_there_is_room_again(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    file = told(path, 1)
    write(file)
    file._file = FullDisk(4)  # type: ignore[assignment]
    path.write_bytes(path.read_bytes() + line_of(2)[:4].encode())  # what it took
    file.tell(2)
    with pytest.raises(OSError, match="as a whole"):
        file.write_told()
    file.tell(3)
    write(file)
    assert numbers(path) == [1, 3]


def test_too_many_lines_at_once_are_lost_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_thread, "_MOST_WAITING", 3)
    file = told(tmp_path / "lines.jsonl", *range(5))
    assert file.num_lost == 2
    write(file)
    assert numbers(file.path) == [0, 1, 2]


def test_the_thread_works_at_the_start_and_at_the_end_and_writes_what_that_tells(
    tmp_path: Path,
) -> None:
    file = told(tmp_path / "lines.jsonl")
    worked: list[int] = []
    first = threading.Event()

    def work() -> None:
        worked.append(len(worked))
        file.tell(worked[-1])
        first.set()

    clock = MonotonicClock()
    thread = LineThread((file,), clock=clock, work=work, work_interval_s=3600.0)
    thread.start()
    assert first.wait(LIMIT_S)
    assert thread.close(LIMIT_S)
    assert numbers(file.path) == worked == [0, 1]


def test_the_time_that_writing_takes_is_counted_and_that_of_work_is_not(tmp_path: Path) -> None:
    clock = ScriptedClock()

    def line_of(number: int) -> str:
        clock.advance(0.5)
        return f'{{"n": {number}}}\n'

    file = LineFile(tmp_path / "lines.jsonl", line_of)
    for number in range(3):
        file.tell(number)
    thread = LineThread(
        (file,), clock=clock, work=lambda: clock.advance(100.0), work_interval_s=1e9
    )
    thread.start()
    assert thread.close(LIMIT_S)
    assert thread.busy_s == 1.5


def test_without_an_interval_there_is_no_work(tmp_path: Path) -> None:
    def work() -> None:
        raise AssertionError("it was not asked for")

    file = told(tmp_path / "lines.jsonl", 1)
    thread = LineThread((file,), clock=MonotonicClock(), work=work)
    thread.start()
    assert thread.close(LIMIT_S)
    assert numbers(file.path) == [1]


def no_json(number: int) -> str:
    return f"{json.dumps({'n': number if number != 40 else float('nan')}, allow_nan=False)}\n"


def test_what_makes_no_line_and_work_that_fails_cost_their_lines_and_no_others(
    tmp_path: Path,
) -> None:
    file = LineFile(tmp_path / "odd.jsonl", no_json)
    for number in range(100):  # told before the end: the line that fails is in the second write
        file.tell(number)
    fine, failures = told(tmp_path / "lines.jsonl", 1), list[str]()
    worked: list[int] = []
    first = threading.Event()

    def work() -> None:
        worked.append(1)
        first.set()
        raise KeyError("an odd answer")

    thread = LineThread(
        (file, fine),
        clock=MonotonicClock(),
        work=work,
        work_interval_s=3600.0,
        on_failure=failures.append,
    )
    thread.start()
    assert first.wait(LIMIT_S)
    assert thread.close(LIMIT_S)
    assert len(worked) == 2
    assert numbers(file.path) == [*range(32), *range(64, 100)]
    assert numbers(fine.path) == [1]
    write_failed, work_failed, lost = failures
    assert "odd.jsonl cannot be written (ValueError: " in write_failed
    assert "a sample cannot be taken (KeyError: 'an odd answer')" in work_failed
    assert "lost (odd.jsonl: 32)" in lost


def test_what_was_told_is_written_before_work_that_may_not_come_back(tmp_path: Path) -> None:
    file = told(tmp_path / "lines.jsonl", 1)
    seen: list[list[int]] = []

    def work() -> None:
        seen.append(numbers(file.path))
        file.tell(2)

    thread = LineThread((file,), clock=MonotonicClock(), work=work, work_interval_s=3600.0)
    thread._ending.set()  # the last turn
    thread.start()
    assert thread.close(LIMIT_S)
    assert seen == [[1]]
    assert numbers(file.path) == [1, 2]


def test_lines_that_a_stuck_thread_leaves_are_counted_as_lost(tmp_path: Path) -> None:
    begun, ends, failures = threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        begun.set()
        assert ends.wait(LIMIT_S)

    file = told(tmp_path / "lines.jsonl")
    thread = LineThread(
        (file,),
        clock=MonotonicClock(),
        work=work,
        work_interval_s=3600.0,
        on_failure=failures.append,
    )
    thread.start()
    assert begun.wait(LIMIT_S)
    file.tell(1)
    assert not thread.close(0.0)
    ends.set()
    thread._thread.join(LIMIT_S)
    assert failures == ["lines about the run are lost (lines.jsonl: 1); completions are not"]
