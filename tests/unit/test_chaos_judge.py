"""The chaos script's judgement: it must see what is lost, doubled, different or left behind."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.chaos.blows import BLOWS, Blow, draw, expected
from tests.chaos.chain import Job, Point
from tests.chaos.judge import End, completions_faults, end_faults, num_records
from tests.chaos.model import write_prompts
from tests.chaos.processes import Process, ranks
from tests.chaos.summary import summary

RIGHT = {"a": [1, 2], "b": [3], "c": [4, 5, 6]}


def record(name: str, **more: Any) -> bytes:
    return json.dumps({"id": name, "token_ids": RIGHT.get(name, []), **more}).encode() + b"\n"


def test_the_undisturbed_file_has_no_faults() -> None:
    assert completions_faults(b"".join(map(record, RIGHT)), RIGHT) == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (record("a") + record("c"), "1 of 3 prompts are lost, first b"),
        (b"", "3 of 3 prompts are lost"),
        (record("a") + record("b") + record("b") + record("c"), "b is there twice"),
        (record("a") + record("b", token_ids=[9]) + record("c"), "b has other tokens"),
        (record("b") + record("a") + record("c"), "another order"),
        (record("a") + record("b") + record("c")[:-9] + b"\n", "line 3 is damaged"),
        (record("a") + bytes(9) + b"\n" + record("b") + record("c"), "line 2 is damaged"),
        (record("a") + record("b") + record("c") + b"{}\n", "line 4 is damaged"),
        (record("a") + record("b") + record("c")[:-1], "the last line has no end"),
        (record("a") + record("b") + record("c") + record("d"), "d is no prompt of this run"),
        (record("a") + record("b", error={"kind": "x"}) + record("c"), "b became an error record"),
    ],
)
def test_each_fault_of_a_file_is_told(content: bytes, fault: str) -> None:
    assert any(fault in told for told in completions_faults(content, RIGHT))


def test_whole_records_are_counted_once() -> None:
    assert num_records(record("a") + record("b") + record("b") + record("c")[:-5]) == 2


JOB = Job(config=Path("x"), names=("a",), deadline_s=10, spare_s=10)


def faults(kind: str, end: End, *, is_complete: bool = False) -> list[str]:
    blow = draw(Random(0), kind, 2, 10)
    return end_faults(end, expected(blow, 20), is_complete=is_complete)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("kill", 6),
        ("kill-launcher", -9),
        ("kill-everything", -9),
        ("freeze", 6),
        ("stop-launcher", 75),
        ("stop-rank", 75),
        ("interrupt-rank", 130),
        ("ctrl-c", 130),
    ],
)
def test_only_the_documented_exit_code_is_right(kind: str, code: int) -> None:
    assert faults(kind, End(code, 3.0)) == []
    assert faults(kind, End(0, 3.0), is_complete=True) == []
    assert "prompts are missing" in faults(kind, End(0, 3.0))[0]
    for other in {1, 6, 9, 75, 130, -9} - {code}:
        assert faults(kind, End(other, 3.0))[0].startswith(f"exit code {other} instead of ")


def test_a_paused_run_goes_on() -> None:
    assert faults("pause", End(0, 30.0), is_complete=True) == ["it took 30.0 s, 20 s allowed"]
    assert "instead of 0" in faults("pause", End(6, 3.0))[0]


def test_hanging_lateness_leftovers_and_tracebacks_are_told() -> None:
    assert faults("kill", End(None, 20.0)) == ["no end within 20 s"]
    assert faults("kill", End(6, 21.0)) == ["it took 21.0 s, 20 s allowed"]
    assert "1 processes are left: 7 python" in faults("kill", End(6, 1.0, ["7 python"]))[0]
    assert faults("kill", End(6, 1.0, output="Traceback (most …")) == ["a traceback was shown"]


def test_a_pause_may_take_as_long_as_a_run_and_a_start_has_its_own_deadline() -> None:
    by_kind = {kind: JOB.limit_s(draw(Random(3), kind, 2, 10)) for kind in BLOWS}
    assert by_kind["pause"] > 100
    moments = {draw(Random(seed), "kill", 2, 10).moment: seed for seed in range(50)}
    limits = {m: JOB.limit_s(draw(Random(s), "kill", 2, 10)) for m, s in moments.items()}
    assert limits == {"boot": 40.0, "loading": 40.0, "generating": 20.0, "merging": 20.0}


def test_blows_are_drawn_alike_from_one_seed_and_cover_all_moments_and_ranks() -> None:
    drawn = [draw(Random(seed), "freeze", 3, 10) for seed in range(60)]
    assert drawn == [draw(Random(seed), "freeze", 3, 10) for seed in range(60)]
    assert {blow.rank for blow in drawn} == {0, 1, 2}
    assert {blow.moment for blow in drawn} == {"boot", "loading", "generating", "merging"}
    assert all(blow.pause_s < 10 for blow in drawn)


def test_each_kind_has_its_signals() -> None:
    drawn = {kind: {draw(Random(seed), kind, 2, 10).signal for seed in range(40)} for kind in BLOWS}
    assert drawn["freeze"] == drawn["pause"] == {signal.SIGSTOP}
    assert drawn["ctrl-c"] == drawn["interrupt-rank"] == {signal.SIGINT}
    assert drawn["stop-rank"] == {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    assert drawn["stop-launcher"] == {signal.SIGTERM, signal.SIGUSR1}
    assert all(drawn[kind] == {signal.SIGKILL} for kind in BLOWS if "kill" in kind)


# ---- processes -----------------------------------------------------------------------------------


def process(pid: int, parent: int, rank: int | None) -> Process:
    return Process(pid, parent, "python -m mpipipe run x", rank)


def test_a_worker_is_told_from_its_supervisor_by_parentage() -> None:
    alone = ranks([process(10, 2, 0), process(11, 2, 1)])
    assert {n: (r.worker.pid, r.supervisor) for n, r in alone.items()} == {
        0: (10, None),
        1: (11, None),
    }
    watched = ranks(
        [process(1, 0, None), process(10, 2, 0), process(20, 10, 0), process(30, 20, 0)]
    )
    assert watched[0].worker.pid == 20, "the child of the top, not what it has started itself"
    assert watched[0].supervisor is not None
    assert watched[0].supervisor.pid == 10


def test_a_worker_whose_supervisor_is_gone_is_a_worker() -> None:
    assert ranks([process(20, 1, 0)])[0].worker.pid == 20


# ---- what is told --------------------------------------------------------------------------------


def test_the_summary_counts_kinds_codes_and_violations() -> None:
    blow = draw(Random(0), "kill", 2, 10)
    good = Point(1, 2, blow, "SIGKILL → 7", 1.0, End(6, 2.0), 5)
    bad = Point(1, 2, blow, "SIGKILL → 8", 1.0, End(None, 20.0), 5, ("no end within 20 s",))
    late = Point(2, 3, blow, "", 1.0, End(0, 0.0), 5)
    lines = summary([good, bad, late, Point.of_files(2, 3, "a is lost")])
    assert lines[0].startswith("kill ")
    assert "2 points  slowest end  20.0 s  exit 6 × 1, hangs × 1" in lines[0]
    assert lines[-1] == "2 blows in 2 chains (1 came after the end): 2 violations"
    assert "VIOLATION no end within 20 s" in bad.line()
    assert json.loads(json.dumps(bad.document()))["blow"]["kind"] == "kill"


def test_prompts_are_the_same_for_one_seed(tmp_path: Path) -> None:
    names = write_prompts(tmp_path / "a.jsonl", 9, seed=1)
    write_prompts(tmp_path / "b.jsonl", 9, seed=1)
    assert names == [f"p{n}" for n in range(9)]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_signal_while_python_starts_may_end_the_rank_and_later_it_may_not() -> None:
    early = Blow("stop-launcher", 0, signal.SIGUSR1, "boot", 0.0, 0.2, 0.0, whole_rank=False)
    late = dataclasses.replace(early, delay_s=1.5)
    assert signal.SIGUSR1 in expected(early, 20).exit_codes
    assert signal.SIGUSR1 not in expected(late, 20).exit_codes
    assert (
        signal.SIGUSR1 not in expected(dataclasses.replace(early, moment="loading"), 20).exit_codes
    )
