"""`mpipipe logs`: what it reads of a run folder, in whatever state the run left it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpipipe.cli.main import app
from mpipipe.errors import ConfigError, EnvironmentSetupError, OutputError
from mpipipe.logs.clocks import ClockReading, RankClocks
from mpipipe.logs.facts import read_facts
from mpipipe.logs.reading import RunFiles, find_run
from mpipipe.logs.schema import schema_of
from mpipipe.logs.sql import query
from mpipipe.logs.steps import read_steps
from mpipipe.logs.summary import summarise
from mpipipe.logs.tail import LogFollower, told_line
from mpipipe.logs.timeline import write_timeline
from tests.unit.trace_format import faults
from tests.unit.written_run import BOOT, USUAL, WrittenRun, identity


@pytest.fixture
def run(tmp_path: Path) -> WrittenRun:
    written = WrittenRun(tmp_path / "run")
    written.write()
    return written


def ask(*words: str | Path) -> str:
    result = CliRunner().invoke(app, ["logs", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def ask_json(*words: str | Path) -> Any:
    return json.loads(ask(*words, "--json"))


# ---- finding and reading -------------------------------------------------------------------------


def test_the_latest_run_of_a_folder_is_found(run: WrittenRun, tmp_path: Path) -> None:
    assert find_run(run.folder).folder == run.folder
    (run.folder / "status.json").write_text("{}")
    assert find_run(tmp_path).folder == run.folder


def test_no_run_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no folder"):
        find_run(tmp_path / "none")
    with pytest.raises(OutputError, match="holds no run"):
        find_run(tmp_path)


def test_torn_and_damaged_lines_are_counted_and_left_out(run: WrittenRun) -> None:
    steps = run.folder / "steps_rank_1.jsonl"
    whole = read_steps(RunFiles(run.folder), 1, 1).parts_s
    good = run.lines("steps_rank_1.jsonl")[5]
    damaged = [
        json.dumps(good)[:70],
        "[" * 50_000,
        "[]",
        "\x00\xff",
        json.dumps({**good, "compute_s": "1"}),
        json.dumps({**good, "compute_s": float("nan")}),
        json.dumps({**good, "compute_s": -1.0}),
        json.dumps({**good, "num_tokens": None}),
        json.dumps({**good, "phase": []}),
        json.dumps({**good, "slot": "a"}),
        json.dumps({name: value for name, value in good.items() if name != "wait_s"}),
    ]
    with steps.open("a", errors="surrogateescape") as file:
        file.write("\n".join(damaged))
    files = RunFiles(run.folder)
    assert read_steps(files, 1, 1).parts_s == whole
    assert files.torn == {"steps_rank_1.jsonl": len(damaged)}
    assert f"note: steps_rank_1.jsonl: {len(damaged)} torn or damaged lines" in ask(
        "summary", run.folder
    )


def test_the_older_of_the_step_files_comes_first(run: WrittenRun) -> None:
    lines = (run.folder / "steps_rank_0.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "steps_rank_0.all.jsonl").write_text("".join(lines[:100]))
    (run.folder / "steps_rank_0.1.jsonl").write_text("".join(lines[100:300]))
    (run.folder / "steps_rank_0.jsonl").write_text("".join(lines[300:]))
    steps = read_steps(RunFiles(run.folder), 0, 1)
    assert (steps.num_steps, steps.first_step) == (400, 0)


def test_a_transfer_that_is_not_known_is_in_the_wait(run: WrittenRun) -> None:
    path = run.folder / "steps_rank_1.jsonl"
    path.write_text(path.read_text().replace('"transfer_s": 0.0001', '"transfer_s": null', 1))
    files = RunFiles(run.folder)
    steps = read_steps(files, 1, 1)
    assert (steps.num_steps, files.torn) == (400, {})
    assert steps.parts_s["transfer"] == pytest.approx(399 * 0.0001)


@pytest.mark.parametrize("content", ["", "{", "[]", "nul", "[" * 50_000])
def test_odd_documents_are_as_good_as_none(run: WrittenRun, content: str) -> None:
    for name in ("metrics.json", "manifest.json"):
        (run.folder / name).write_text(content)
    facts = read_facts(RunFiles(run.folder))
    assert len(facts.ranks) == 2
    assert facts.ranks[0].parts_s["compute"] == pytest.approx(0.8)


@pytest.mark.parametrize("command", ["summary", "requests", "steps", "samples", "errors"])
def test_a_run_of_an_older_version_says_what_is_missing(tmp_path: Path, command: str) -> None:
    event = {"time": "2025-01-01T00:00:00Z", "t_s": 5.0, "level": "info", "event": "ready"}
    (tmp_path / "rank_0.log").write_text(json.dumps({**event, "rank": 0, "host": "a"}) + "\n")
    shown = ask(command, tmp_path)
    assert "no steps (nothing was generated, log.steps = none, or an older version)" in shown
    assert "note: no requests.jsonl" in shown
    assert "note: no metrics.json" in shown


# ---- summary -------------------------------------------------------------------------------------


def test_every_second_of_a_run_has_its_place(run: WrittenRun) -> None:
    found = summarise(read_facts(RunFiles(run.folder)), {})
    for rank in found.ranks:
        assert rank.seconds["boot"] == pytest.approx(2.9)
        assert rank.seconds["preprocessing"] == pytest.approx(0.3)
        assert rank.seconds["load"] == pytest.approx(1.0)
        assert rank.seconds["barriers"] == pytest.approx(0.2)
        assert rank.seconds["compute"] == pytest.approx(0.8)
        assert rank.seconds["shutdown"] == pytest.approx(0.2)
        assert rank.seconds["unexplained"] == pytest.approx(0.0, abs=1e-6)
        assert sum(rank.seconds.values()) == pytest.approx(rank.wall_s)
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert found.time["communication_s"] == pytest.approx(0.08)  # no metrics: from the steps


def test_time_without_an_event_is_unexplained(run: WrittenRun) -> None:
    path = run.folder / "rank_1.log"
    rows = [row for row in path.read_text().splitlines() if '"imports"' not in row]
    path.write_text("\n".join(rows) + "\n")
    found = summarise(read_facts(RunFiles(run.folder)), {})
    assert found.ranks[1].seconds["unexplained"] == pytest.approx(BOOT["imports"])
    assert found.ranks[0].seconds["unexplained"] == pytest.approx(0.0, abs=1e-6)


def test_overlapping_boot_events_are_counted_once(run: WrittenRun) -> None:
    ready = next(line for line in run.lines("rank_0.log") if line.get("name") == "imports")
    with (run.folder / "rank_0.log").open("a") as file:
        file.write(json.dumps({**ready, "name": "tokenizer"}) + "\n")
    found = summarise(read_facts(RunFiles(run.folder)), {})
    assert sum(found.ranks[0].seconds.values()) == pytest.approx(found.ranks[0].wall_s)
    assert found.ranks[0].boot["tokenizer"] == pytest.approx(BOOT["tokenizer"])


def test_the_summary_is_the_same_for_people_and_programs(run: WrittenRun) -> None:
    document = ask_json("summary", run.folder)
    assert document["culprit"]["kind"] == "none"
    assert set(document["culprit"]) == {"kind", "rank", "stage", "seconds", "sentence"}
    assert document["time"]["io_read_s"] == 0.5
    assert document["notes"] == []
    shown = ask("summary", run.folder)
    assert document["culprit"]["sentence"] in shown
    assert "attempt 1 of 1, done" in shown
    assert "0.0% unexplained" in shown
    assert "2 on node0, node1" in shown
    assert "rank 1 ± 8 µs" in shown


def test_many_ranks_are_told_by_the_least_and_the_most(tmp_path: Path) -> None:
    WrittenRun(tmp_path, num_ranks=9, num_steps=100, parts={7: {"compute_s": 0.02}}).write()
    rows = {row.split()[0]: row.split() for row in ask("summary", tmp_path).splitlines() if row}
    assert rows["seconds"] == ["seconds", "least", "median", "most", "on", "rank", "share"]
    assert rows["compute"][1:8] == ["0.200", "s", "0.200", "s", "2.0", "s", "7"]


def test_a_killed_run_is_told_by_what_it_wrote(run: WrittenRun) -> None:
    (run.folder / "metrics.json").unlink()
    for rank in (0, 1):
        path = run.folder / f"rank_{rank}.log"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))  # no end
    document = ask_json("summary", run.folder)
    assert document["state"] == ""
    assert document["shares"]["unexplained"] < 0.01
    assert document["ranks"][0]["seconds"]["compute"] == pytest.approx(0.8)
    assert any("no metrics.json" in note for note in document["notes"])


def start_again(folder: Path, *, state: str) -> None:
    """Attempt 2 of a written run: it boots, and ends before it generates anything."""
    with (folder / "rank_0.log").open("a") as file:
        for t_s, event in ((70.0, "handshake"), (71.0, "resumed"), (72.0, "summary")):
            line = {**identity(0, t_s, attempt=2), "time": "", "level": "info", "event": event}
            file.write(json.dumps(line) + "\n")
    for name in ("manifest.json", "metrics.json"):
        document = json.loads((folder / name).read_text())
        document["attempts"].append({"attempt": 2, "state": state, "generate_s": 0.0})
        (folder / name).write_text(json.dumps(document))


@pytest.mark.parametrize("state", ["done", "stopped"])
def test_an_attempt_that_generated_nothing_hides_none_that_did(tmp_path: Path, state: str) -> None:
    WrittenRun(tmp_path, num_steps=100).write()
    before = ask_json("summary", tmp_path)
    start_again(tmp_path, state=state)
    found = ask_json("summary", tmp_path)
    assert (found["attempt"], found["num_attempts"], found["state"]) == (1, 2, "done")
    assert (found["ranks"], found["time"]) == (before["ranks"], before["time"])
    remark = (
        f"attempt 1 is shown: attempt 2, after it, generated nothing ({state}); "
        "--attempt 2 shows it"
    )
    assert remark in found["notes"]
    assert remark in " ".join(ask("summary", tmp_path).split())
    assert ask_json("steps", tmp_path)["num_steps"] == 100
    assert remark in ask_json("steps", tmp_path)["notes"]
    asked_for = ask_json("summary", tmp_path, "--attempt", "2")
    assert (asked_for["attempt"], asked_for["state"]) == (2, state)
    assert remark not in asked_for["notes"]


@pytest.mark.parametrize("command", ["summary", "requests", "steps", "samples"])
def test_an_attempt_that_never_was_is_refused(run: WrittenRun, command: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no attempt 2 of .* it has 1 attempt;"):
        ask(command, run.folder, "--attempt", "2")


def test_attempts_are_told_apart(tmp_path: Path) -> None:
    first = WrittenRun(tmp_path, num_steps=100, parts={1: {"compute_s": 0.03}})
    first.write()
    WrittenRun(tmp_path, num_steps=200, attempt=2).write()
    last, earlier = ask_json("summary", tmp_path), ask_json("summary", tmp_path, "--attempt", "1")
    assert (last["attempt"], last["num_attempts"], last["ranks"][0]["num_steps"]) == (2, 2, 200)
    assert (earlier["attempt"], earlier["ranks"][0]["num_steps"]) == (1, 100)
    assert (last["culprit"]["kind"], earlier["culprit"]["kind"]) == ("none", "slow_stage")
    assert (last["state"], earlier["state"]) == ("done", "interrupted")


def test_steps_that_were_not_kept_are_told(run: WrittenRun) -> None:
    path = run.folder / "steps_rank_0.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[100:]))
    assert "note: rank 0: 300 of 400 steps are on record" in ask("summary", run.folder)


# ---- clocks --------------------------------------------------------------------------------------


def test_offsets_are_linear_between_two_measurements() -> None:
    clocks = RankClocks({1: [ClockReading(100.0, -50.0, 1e-5), ClockReading(200.0, -50.1, 2e-5)]})
    assert clocks.on_head(1, 200.0) == pytest.approx(149.95)
    assert clocks.on_head(1, 100.0) == pytest.approx(50.0)  # before the first
    assert clocks.on_head(1, 500.0) == pytest.approx(449.9)  # after the last
    assert clocks.on_head(0, 7.0) == 7.0
    assert (clocks.error_s(1), clocks.error_s(0)) == (2e-5, None)


# ---- requests, steps, samples, errors ------------------------------------------------------------


def test_the_slowest_requests_and_percentiles(tmp_path: Path) -> None:
    spans = [(0, 0.0, share / 10, 10 * share) for share in range(1, 11)]
    run = WrittenRun(tmp_path, requests=spans)
    run.write()
    document = ask_json("requests", tmp_path, "--slowest", "2")
    assert [line["id"] for line in document["slowest"]] == ["p9", "p8"]
    assert document["percentiles"]["latency_s"]["p50"] == pytest.approx(0.5 * run.generate_s)
    assert document["percentiles"]["latency_s"]["max"] == pytest.approx(run.generate_s)
    assert document["num_output_tokens"] == 550
    assert "10 completed, 0 failed, 550 output tokens" in ask("requests", tmp_path)


def test_one_request_is_told_in_full(run: WrittenRun) -> None:
    shown = ask("requests", run.folder, "--id", "p3")
    assert "index              3\n" in shown
    assert "first_token_s" in shown
    assert "no such request" in ask("requests", run.folder, "--id", "p99")


def test_failed_requests_count_as_failed(run: WrittenRun) -> None:
    path = run.folder / "requests.jsonl"
    path.write_text(path.read_text().replace('"error_kind": null', '"error_kind": "bad"', 1))
    document = ask_json("requests", run.folder)
    assert (document["num_completed"], document["num_failed"]) == (7, 1)


def test_steps_are_told_per_phase_and_stalls_by_name(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path, odd={(1, 312): {"compute_s": 4.0}, (0, 313): {"wait_s": 4.0}})
    run.write()
    document = ask_json("steps", tmp_path)
    decode = [row for row in document["phases"] if row["phase"] == "decode"]
    assert [row["num_steps"] for row in decode] == [398, 398]
    assert decode[0]["p50_s"] == pytest.approx(0.003)
    assert [stall["step"] for stall in document["stalls"]] == [312]
    shown = ask("steps", tmp_path)
    assert "4.0 s stall at step 312 (decode, usually 3.00 ms): rank 1 took 4.0 s for" in shown
    assert "no stalls" in ask("steps", tmp_path, "--least", "5")


def test_samples_become_rates(run: WrittenRun) -> None:
    document = ask_json("samples", run.folder, "--all")
    assert [one["rank"] for one in document["samples"]] == [0, 0, 1, 1]
    first = document["samples"][0]["values"]
    assert first["tokens_per_s"] == pytest.approx(800 / (0.5 * run.generate_s))
    assert document["samples"][2]["values"]["tokens_per_s"] is None
    # Both ranks on rank 0's clock.
    assert abs(document["samples"][2]["since_s"] - document["samples"][0]["since_s"]) < 1.0
    assert "tokens/s" in ask("samples", run.folder)


def test_errors_of_all_ranks_in_their_order(tmp_path: Path) -> None:
    failed = {"event": "ended early", "level": "error", "error": "disk full", "kind": "OutputError"}
    run = WrittenRun(
        tmp_path,
        events=[
            (1, 0.5, {**failed, "exception": "Traceback\n  line 1"}),
            (0, 0.7, {**failed, "error": "rank 1 is gone", "kind": "PeerLostError"}),
            (0, 0.1, {"event": "configuration", "level": "warning", "message": "odd"}),
            (0, 0.2, {"event": "completed", "error": "bad prompt", "request": "p1"}),
        ],
    )
    run.write()
    found = ask_json("errors", tmp_path)["errors"]
    assert [(one["rank"], one["level"]) for one in found] == [
        (0, "prompt"),
        (1, "error"),
        (0, "error"),
    ]
    shown = ask("errors", tmp_path, "--warnings")
    assert "rank 1 error ended early: OutputError: disk full" in shown
    assert "      line 1" in shown
    assert "rank 0 warning configuration: odd" in shown
    assert "bad prompt (request=p1)" in shown


def test_what_ended_a_run_is_told_where_no_rank_lived_to_log_it(run: WrittenRun) -> None:
    (run.folder / "metrics.json").unlink()
    status = {"state": "failed", "error": "rank 1 was killed", "updated_at": "2026-11-27T10:00:01"}
    (run.folder / "status.json").write_text(json.dumps(status))
    (found,) = ask_json("errors", run.folder)["errors"]
    assert (found["event"], found["message"]) == ("run failed", "rank 1 was killed")
    assert ask_json("summary", run.folder)["state"] == "failed"
    line = {**identity(1, 120.0), "time": "", "level": "error", "event": "ended early"}
    with (run.folder / "rank_1.log").open("a") as file:
        file.write(json.dumps({**line, "error": "rank 1 was killed"}) + "\n")
    (found,) = ask_json("errors", run.folder)["errors"]
    assert found["event"] == "ended early"


def test_what_ended_an_earlier_attempt_is_told_when_the_run_is_done(tmp_path: Path) -> None:
    WrittenRun(tmp_path, num_steps=10).write()
    WrittenRun(tmp_path, num_steps=10, attempt=2).write()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["attempts"][0]["error"] = "rank 1 was killed"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (found,) = ask_json("errors", tmp_path)["errors"]
    told = (found["attempt"], found["event"], found["message"])
    assert told == (1, "run failed", "rank 1 was killed")


def test_ranks_that_another_attempt_alone_had_are_in_no_table(tmp_path: Path) -> None:
    WrittenRun(tmp_path, num_ranks=3, num_steps=10).write()
    WrittenRun(tmp_path, num_ranks=2, num_steps=10, attempt=2).write()
    assert [rank["rank"] for rank in ask_json("summary", tmp_path)["ranks"]] == [0, 1]
    assert "ranks     2 on" in ask("summary", tmp_path)
    earlier = ask_json("summary", tmp_path, "--attempt", "1")
    assert [rank["rank"] for rank in earlier["ranks"]] == [0, 1, 2]


def test_a_run_without_errors_says_so(run: WrittenRun) -> None:
    assert ask("errors", run.folder) == "no errors\n"


# ---- timeline ------------------------------------------------------------------------------------


def test_the_timeline_has_all_ranks_on_one_clock(run: WrittenRun, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert "events in" in ask("timeline", run.folder, "-o", path)
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert min(event["ts"] for event in spans) == 0.0
    boots = {event["pid"]: event["ts"] for event in spans if event["name"] == "mpi"}
    assert boots[0] == pytest.approx(boots[1], abs=1.0)  # 100 s apart on their own clocks
    compute = [event for event in spans if event["cat"] == "compute" and event["pid"] == 1]
    assert len(compute) == 400
    assert compute[7]["name"] == "step 7 slot 1"
    assert compute[7]["dur"] == pytest.approx(2000)
    assert {event["cat"] for event in spans} == {
        "boot", "compute", "transfer", "wait", "idle", "overhead", "send", "request",
    }  # fmt: skip
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"stage 0, rank 0 on node0", "stage 1, rank 1 on node1", "requests"}
    assert {event["name"] for event in events if event["ph"] == "i"} == {
        "generating", "generated", "ended",
    }  # fmt: skip
    assert any(event["ph"] == "C" and event["name"] == "output tokens" for event in events)


def timeline(folder: Path) -> Any:
    """What Perfetto gets, after it was held against the format's rules."""
    path = folder / "trace.json"
    write_timeline(RunFiles(folder), path, 1, 0)
    document = json.loads(path.read_text())
    assert faults(document) == []
    return document["traceEvents"]


def test_control_messages_are_arrows_from_rank_to_rank(tmp_path: Path) -> None:
    WrittenRun(tmp_path, num_ranks=3, num_messages=50).write()
    events = timeline(tmp_path)
    drawn = [event for event in events if event.get("cat") == "messages sent"]
    told = {(event["pid"], event["name"], event["args"]["peer"]) for event in drawn}
    assert told == {
        (0, "StepScheduled", 1), (0, "StepScheduled", 2), (1, "StepTimes", 0), (2, "StepTimes", 0),
    }  # fmt: skip
    assert {event["args"]["bytes"] for event in drawn} == {56}
    begins = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert len(begins) == len(ends) == 2 * 2 * 50
    for flow_id, begin in begins.items():
        end = ends[flow_id]
        assert {begin["pid"], end["pid"]} in ({0, 1}, {0, 2})
        late_us = 20 if begin["name"] == "StepScheduled" else 100
        assert end["ts"] - begin["ts"] == pytest.approx(late_us, abs=1)


def test_a_message_of_which_one_end_is_not_on_record_has_no_arrow(tmp_path: Path) -> None:
    WrittenRun(tmp_path, num_messages=50).write()
    path = tmp_path / "messages_rank_1.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[20:]) + '{"torn')
    events = timeline(tmp_path)
    assert sum(event["ph"] == "s" for event in events) == 80
    assert sum(event.get("cat") == "messages sent" for event in events) == 90


def test_what_was_rounded_overlaps_nothing_on_a_track(tmp_path: Path) -> None:
    """Steps that follow each other at once, with times that are no whole nanoseconds."""
    third = dict.fromkeys(USUAL, 0.001 / 3)
    run = WrittenRun(tmp_path, parts={0: dict.fromkeys(USUAL, 0.0) | {"compute_s": 0.001 / 3},
                                      1: third})  # fmt: skip
    run.write()
    lines = run.lines("steps_rank_0.jsonl")
    lines[7]["start_s"] -= 2e-6
    run.folder.joinpath("steps_rank_0.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    assert timeline(tmp_path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda events: events[-1].pop("ts"), "ts is no time"),
        (lambda events: events.append({"ph": "B", "pid": 0, "tid": 0, "name": "x", "ts": 1}),
         "a beginning without an end"),
        (lambda events: events.append(later(span_of(events))), "overlaps"),
        (lambda events: events.remove(next(e for e in events if e["ph"] == "f")), "0 ends"),
        (lambda events: events.append({"ph": "i", "pid": 0, "tid": 77, "name": "x", "ts": 1,
                                       "s": "t"}), "thread 77 of process 0 has no name"),
    ],
)  # fmt: skip
def test_the_rules_find_what_is_wrong(
    change: Callable[[list[Any]], object], fault: str, tmp_path: Path
) -> None:
    WrittenRun(tmp_path, num_messages=5).write()
    document = {"traceEvents": timeline(tmp_path), "displayTimeUnit": "ms"}
    change(document["traceEvents"])
    assert any(fault in told for told in faults(document))


def later(span: Any) -> Any:
    """The same, by a microsecond."""
    return {**span, "ts": span["ts"] + 1}


def span_of(events: list[Any]) -> Any:
    """A step's compute in the middle."""
    return [event for event in events if event.get("cat") == "compute"][50]


def test_requests_that_overlap_have_tracks_of_their_own(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path, requests=[(0, 0.0, 0.5, 5), (0, 0.1, 0.9, 5), (0, 0.5, 1.0, 5)])
    run.write()
    write_timeline(RunFiles(tmp_path), tmp_path / "t.json", 1, 0)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert faults({"traceEvents": events, "displayTimeUnit": "ms"}) == []
    tracks = {event["name"]: event["tid"] for event in events if event.get("cat") == "request"}
    assert tracks["p0 decode"] == tracks["p2 decode"] != tracks["p1 decode"]


def test_a_timeline_may_have_the_last_steps_only(run: WrittenRun, tmp_path: Path) -> None:
    ask("timeline", run.folder, "-o", tmp_path / "t.json", "--steps", "10")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    drawn = {event["args"]["step"] for event in events if event.get("cat") == "compute"}
    assert drawn == set(range(390, 400))


def test_a_timeline_that_cannot_be_written_is_told(run: WrittenRun, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="choose another -o FILE"):
        write_timeline(RunFiles(run.folder), tmp_path, 1, 0)


# ---- tail ----------------------------------------------------------------------------------------


def test_new_lines_of_all_ranks_come_in_one_stream(run: WrittenRun) -> None:
    follower = LogFollower(RunFiles(run.folder), 1)
    assert [line["event"] for line in follower.poll()] == ["ended", "ended"]
    assert follower.poll() == []
    late = {**identity(1, 9.0), "time": "2026-11-27T11:00:02Z", "level": "info", "event": "late"}
    row = json.dumps(late) + "\n"
    with (run.folder / "rank_1.log").open("a") as file:
        file.write(row[:20])
        file.flush()
        assert follower.poll() == []  # half of a line
        file.write(row[20:])
    (run.folder / "rank_2.log").write_text(row.replace("late", "new").replace("00:02", "00:01"))
    assert [line["event"] for line in follower.poll()] == ["new", "late"]
    (run.folder / "rank_1.log").write_text(row)  # replaced by a shorter one
    assert [line["event"] for line in follower.poll()] == ["late"]


def test_no_last_lines_are_none(run: WrittenRun) -> None:
    assert LogFollower(RunFiles(run.folder), 0).poll() == []


def test_an_event_is_one_line_for_people(run: WrittenRun) -> None:
    line = {**identity(1, 9.0), "time": "2026-11-27T11:00:02.123456Z", "level": "info"}
    line |= {"event": "completed", "request": "p1", "num_output_tokens": 5, "error": None}
    assert told_line(line) == (
        "11:00:02.123 rank 1 info    completed request=p1 num_output_tokens=5 error=null"
    )
    assert "rank 1 info    ended" in ask("tail", run.folder, "-n", "1")
    assert all(json.loads(row) for row in ask("tail", run.folder, "--json").splitlines())


# ---- diff ----------------------------------------------------------------------------------------


def test_two_runs_differ_in_settings_and_figures(run: WrittenRun, tmp_path: Path) -> None:
    other = WrittenRun(tmp_path / "other", parts={1: {"compute_s": 0.004}})
    other.write()
    manifest = json.loads((other.folder / "manifest.json").read_text())
    manifest["config"]["name"] = "slower"
    manifest["environment"]["OMP_NUM_THREADS"] = "8"
    (other.folder / "manifest.json").write_text(json.dumps(manifest))
    metrics = json.loads((other.folder / "metrics.json").read_text())
    metrics |= {"num_shared_tokens": 64, "drafts": {"num_accepted": 5}}
    (other.folder / "metrics.json").write_text(json.dumps(metrics))
    found = ask_json("diff", run.folder, other.folder)["differences"]
    by_name = {one["name"]: one for one in found}
    assert by_name["config.name"]["second"] == "slower"
    assert by_name["environment.OMP_NUM_THREADS"]["first"] == "1"
    assert by_name["ranks[1].stage.overall.compute_s"]["ratio"] == pytest.approx(2.0)
    assert [by_name[n]["second"] for n in ("num_shared_tokens", "drafts.num_accepted")] == [64, 5]
    assert "ranks[0].stage.overall.compute_s" not in by_name
    shown = ask("diff", run.folder, other.folder)
    assert "configuration" in shown
    assert re.search(r"compute_s +0\.8 +1\.6 +2\.00", shown)  # no more digits than are worth it
    assert "2.00" in shown
    assert "no differences" in ask("diff", run.folder, run.folder)


def test_what_differs_is_named_and_not_by_its_place_in_a_list(
    run: WrittenRun, tmp_path: Path
) -> None:
    """One setting more shifts all that follow, and clocks begin anywhere."""
    other = WrittenRun(tmp_path / "other").write()
    why = [{"setting": "a", "value": 1, "reason": "as configured"},
           {"setting": "b", "value": 2, "reason": "one a stage"}]  # fmt: skip
    boot = [{"name": "wait", "start_s": 5.0, "seconds": 0.25, "phase": "node"},
            {"name": "imports", "start_s": 6.0, "seconds": 2.0},
            {"name": "wait", "start_s": 8.0, "seconds": 0.5}]  # fmt: skip
    later = [{**event, "start_s": 900.0} for event in boot[1:]]
    for folder, settings, events in ((run.folder, why, boot), (other, why[1:], later)):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["plan"]["resolved"] = settings
        (folder / "manifest.json").write_text(json.dumps(manifest))
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["ranks"][0]["boot"] = events
        (folder / "metrics.json").write_text(json.dumps(metrics))
    found = ask_json("diff", run.folder, other)["differences"]
    assert [(one["name"], one["first"], one["second"]) for one in found] == [
        ("plan.resolved[a]", "as configured", None),
        ("ranks[0].boot[wait]", 0.75, 0.5),
    ]
    assert "ranks[0].boot[wait]" in ask("diff", run.folder, other)  # no style of the terminal's


# ---- sql -----------------------------------------------------------------------------------------


def test_sql_has_a_table_per_kind_of_file(run: WrittenRun) -> None:
    with (run.folder / "steps_rank_0.jsonl").open("a") as file:
        file.write('{"step": 12, "sl')  # torn
    counts = {
        table: ask_json("sql", run.folder, f"SELECT count(*) AS n FROM {table}")[0]["n"]
        for table in ("steps", "samples", "requests", "clock", "boot", "run_log")
    }
    assert counts["steps"] in {800, 801}
    assert counts["boot"] == 2 * len(BOOT)
    assert (counts["samples"], counts["requests"], counts["clock"]) == (6, 8, 4)
    statement = "SELECT rank, round(sum(compute_s), 3) AS s FROM steps GROUP BY 1 ORDER BY 1"
    shown = ask("sql", run.folder, statement)
    assert [row.split()[:2] for row in shown.splitlines()[:2]] == [["rank", "s"], ["0", "0.8"]]


@pytest.mark.parametrize("left_out", ["bytes", "start_s"])
def test_sql_asks_runs_whose_log_lacks_what_others_have(run: WrittenRun, left_out: str) -> None:
    for path in run.folder.glob("rank_*.log"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        for event in events:
            event.pop(left_out, None)
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert query(RunFiles(run.folder), "SELECT count(*) FROM requests")[1] == [(8,)]
    if left_out == "bytes":
        assert query(RunFiles(run.folder), "SELECT count(bytes) FROM boot")[1] == [(0,)]


def test_a_wrong_statement_is_told_with_the_tables(run: WrittenRun) -> None:
    with pytest.raises(ConfigError, match="the tables are run_log, steps"):
        query(RunFiles(run.folder), "SELECT * FROM nothing")


def test_without_duckdb_sql_says_what_to_install(
    run: WrittenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(EnvironmentSetupError, match=r"pip install 'mpipipe\[sql\]'"):
        query(RunFiles(run.folder), "SELECT 1")


# ---- pages ---------------------------------------------------------------------------------------


def test_the_pages_come_with_the_package() -> None:
    assert ask("files").startswith("# The files of a run")
    assert ask("questions").startswith("# Ten questions to a run")
    assert list(json.loads(ask("lnav"))) == ["$schema", "mpipipe_log"]


def test_every_command_of_the_page_of_questions_works(
    run: WrittenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of `mpipipe logs`, without what is piped on; the runs are this one."""
    monkeypatch.chdir(run.folder)
    rows = [row for row in ask("questions").splitlines() if row.startswith("$ mpipipe logs ")]
    assert len(rows) == 15
    for row in rows:
        words = shlex.split(row)[3:]
        words = words[: next((at for at, word in enumerate(words) if word in "|>"), len(words))]
        assert ask(*("." if word.startswith("runs/") else word for word in words))
    titles = [row for row in ask("questions").splitlines() if re.match(r"## \d+\. ", row)]
    assert len(titles) == 10


def test_the_viewer_knows_fields_that_logs_have() -> None:
    kind = schema_of("rank_0.log")
    assert kind is not None
    known = {field.name for field in kind.fields} | {"request"}  # of a completed prompt
    assert set(json.loads(ask("lnav"))["mpipipe_log"]["value"]) <= known


def test_asking_imports_nothing_heavy(run: WrittenRun) -> None:
    code = (
        f"import sys; sys.argv = ['mpipipe', 'logs', 'summary', {str(run.folder)!r}]\n"
        "from mpipipe.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'mpi4py', 'duckdb', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
