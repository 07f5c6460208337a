"""What earlier attempts did: told by them, or recovered from what they left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpipipe.metrics.attempts import AttemptTotals, total_of
from mpipipe.run_folder.history import kept_counts, last_logged, told_attempts
from mpipipe.run_folder.journal import KeptRecords

NONE = KeptRecords()
KEPT = KeptRecords({"a": 1, "b": 2, "c": 3, "d": 4}, num_failed=1, num_output_tokens=70)


def start(**fields: Any) -> dict[str, Any]:
    """An entry of the manifest, of an attempt that found nothing."""
    return {"started": "…", "t_s": 100.0, **kept_counts(NONE), **fields}


def write_lines(path: Path, *lines: dict[str, Any] | bytes) -> None:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    path.write_bytes(b"".join(raw))


def line(attempt: int, t_s: float, event: str = "x") -> dict[str, Any]:
    return {"t_s": t_s, "event": event, "run": "0" * 12, "attempt": attempt, "rank": 0}


def totals(entry: Any) -> AttemptTotals:
    found = AttemptTotals.from_plain(entry)
    assert found is not None
    return found


def test_an_attempt_that_was_killed_counts_what_it_brought_into_the_journal(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "rank_0.log",
        line(1, 101.0), line(1, 110.0, "generating"), line(1, 112.0, "completed"),
        b'{"t_s": 999.0, "attempt": 1, "to',
    )  # fmt: skip
    write_lines(tmp_path / "samples_rank_0.jsonl", line(1, 114.5))
    write_lines(tmp_path / "requests.jsonl", line(1, 113.0))
    (told,) = told_attempts(tmp_path, [start()], KEPT)
    assert totals(told) == AttemptTotals(1, "interrupted", 14.5, 4.5, 3, 1, 70)
    assert told["started"] == "…"


def test_each_prompt_counts_for_one_attempt(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "rank_0.log",
        line(1, 105.0, "generating"), line(1, 120.0), line(2, 305.0, "generating"), line(2, 309.0),
    )  # fmt: skip
    between = KeptRecords({"a": 1, "b": 2}, num_failed=0, num_output_tokens=30)
    attempts = [start(), start(t_s=300.0, **kept_counts(between))]
    first, second = map(totals, told_attempts(tmp_path, attempts, KEPT))
    assert first == AttemptTotals(1, "interrupted", 20.0, 15.0, 2, 0, 30)
    assert second == AttemptTotals(2, "interrupted", 9.0, 4.0, 1, 1, 40)
    assert total_of([first, second]) == {
        "num_attempts": 2, "wall_s": 29.0, "generate_s": 19.0, "num_completed": 3, "num_failed": 1,
        "num_output_tokens": 70, "output_tokens_per_s": 70 / 19,
    }  # fmt: skip


def test_what_ended_an_attempt_outlives_its_status(tmp_path: Path) -> None:
    failed = {"state": "failed", "error": "rank 1 was killed"}
    (tmp_path / "status.json").write_text(json.dumps(failed))
    write_lines(tmp_path / "rank_0.log", line(1, 105.0))
    (told,) = told_attempts(tmp_path, [start()], NONE)
    assert told["error"] == "rank 1 was killed"
    (tmp_path / "status.json").write_text(json.dumps({"state": "done"}))
    write_lines(tmp_path / "rank_0.log", line(1, 105.0), line(2, 205.0))
    first, second = told_attempts(tmp_path, [told, start(t_s=200.0)], NONE)
    assert (first["error"], "error" in second) == ("rank 1 was killed", False)


def test_an_attempt_is_not_told_what_ended_a_later_start_without_an_entry(tmp_path: Path) -> None:
    failed = {"state": "failed", "error": "the folder is full"}
    (tmp_path / "status.json").write_text(json.dumps(failed))
    write_lines(tmp_path / "rank_0.log", line(1, 105.0), line(2, 205.0))
    (told,) = told_attempts(tmp_path, [start()], NONE)
    assert "error" not in told


def test_tokens_of_an_attempt_of_unknown_length_make_no_rate(tmp_path: Path) -> None:
    unknown = AttemptTotals(1, "interrupted", 3600.0, 0.0, 3, 0, 1_000_000)
    known = AttemptTotals(2, "done", 12.0, 10.0, 1, 0, 2_000)
    assert total_of([unknown, known])["output_tokens_per_s"] is None
    assert total_of([known])["output_tokens_per_s"] == 200.0


def test_the_lines_of_an_attempt_are_found_by_its_number_where_one_is_missing(
    tmp_path: Path,
) -> None:
    write_lines(tmp_path / "rank_0.log", line(1, 105.0), line(2, 199.0), line(3, 309.0))
    attempts = [start(attempt=1), start(attempt=3, t_s=300.0)]
    first, third = map(totals, told_attempts(tmp_path, attempts, NONE))
    assert (first.attempt, first.wall_s) == (1, 5.0)
    assert (third.attempt, third.wall_s) == (3, 9.0)


@pytest.mark.parametrize(
    ("lines", "last"),
    [
        ([], (0, "")),
        ([line(1, 1.0), line(4, 2.0)], (4, "0" * 12)),
        ([line(2, 1.0), b'{"attempt": 3, "to'], (2, "0" * 12)),
        ([line(2, 1.0) | {"run": 7}, {"event": "older"}, b"[" * 9999], (2, "")),
        ([line(2, 1.0) | {"attempt": 10**400}], (0, "")),
    ],
)
def test_the_last_attempt_that_a_log_knows(
    lines: list[Any], last: tuple[int, str], tmp_path: Path
) -> None:
    assert last_logged(tmp_path) == (0, "")
    write_lines(tmp_path / "rank_0.log", *lines)
    assert last_logged(tmp_path) == last


def test_what_an_attempt_has_told_itself_is_believed(tmp_path: Path) -> None:
    told = {
        "attempt": 1, "state": "stopped", "wall_s": 9.5, "generate_s": 4, "num_completed": 2,
        "num_failed": 0, "num_output_tokens": 31,
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps({"attempts": [told, None, {"state": 1}]}))
    (entry,) = told_attempts(tmp_path, [start()], KEPT)
    assert totals(entry) == AttemptTotals(1, "stopped", 9.5, 4.0, 2, 0, 31)
    # It stays in the manifest, whatever becomes of metrics.json.
    (tmp_path / "metrics.json").unlink()
    again, second = told_attempts(tmp_path, [entry, start(**kept_counts(KEPT))], KEPT)
    assert again == entry
    assert totals(second) == AttemptTotals(2, "interrupted")


def test_one_that_was_told_to_stop_while_it_booted_was_stopped(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "stopped"}')
    first, last = told_attempts(tmp_path, [start(), start()], NONE)
    assert (first["state"], last["state"]) == ("interrupted", "stopped")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"attempts": 3}', b'{"attempts": [3, {}]}', b"\xff", b"[" * 9999],
)
def test_files_that_cannot_be_read_count_as_nothing(content: bytes, tmp_path: Path) -> None:
    for name in ("metrics.json", "rank_0.log", "requests.jsonl", "status.json"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "samples_rank_0.jsonl").mkdir()
    odd = {
        "t_s": 10**400,
        "num_kept": -1,
        "num_kept_failed": None,
        "num_kept_output_tokens": float("nan"),
    }
    first, second = told_attempts(tmp_path, [odd, {}], KEPT)
    assert totals(first) == AttemptTotals(1, "interrupted")
    assert totals(second) == AttemptTotals(2, "interrupted", 0, 0, 3, 1, 70)


@pytest.mark.parametrize(
    "differs",
    [{"state": "lost"}, {"num_completed": -1}, {"num_failed": True}, {"wall_s": float("inf")},
     {"generate_s": "1"}, {"attempt": None}, {"wall_s": 10**400}, {"num_completed": 10**400},
     {"wall_s": float("nan")}, {"state": ["done"]}],
)  # fmt: skip
def test_totals_out_of_a_file_are_whole_or_none(differs: dict[str, Any]) -> None:
    entry = {
        "attempt": 1, "state": "done", "wall_s": 1.0, "generate_s": 1.0, "num_completed": 1,
        "num_failed": 0, "num_output_tokens": 1,
    }  # fmt: skip
    assert AttemptTotals.from_plain(entry) is not None
    assert AttemptTotals.from_plain(entry | differs) is None
