"""What a run does between its phases, without ranks."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpipipe.clock import ScriptedClock
from mpipipe.config.prompts import PromptLine
from mpipipe.errors import EnvironmentSetupError, StoppedError
from mpipipe.job import run
from mpipipe.job.acquire import Acquired
from mpipipe.job.ending import end_early, merge_only
from mpipipe.job.job import Marks
from mpipipe.metrics.attempts import AttemptTotals
from mpipipe.metrics.boot import BootTimeline, PartName
from mpipipe.metrics.log import NullLog, open_log
from mpipipe.planning.layout import Place
from mpipipe.run_folder.file_thread import FileThread
from mpipipe.run_folder.resume import Earlier
from mpipipe.run_folder.status_file import ProgressFile

LIMIT_S = 30.0


class EnoughError(Exception):
    """The test has seen what it wanted."""


def test_the_manifest_is_brought_to_the_disk_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared disk that does not answer must not silence the head."""
    wrote: list[tuple[Path, int]] = []

    def write_json(path: Path, _document: dict[str, Any]) -> None:
        wrote.append((path, threading.get_ident()))
        raise EnoughError

    monkeypatch.setattr(run, "write_json", write_json)
    monkeypatch.setattr(run, "complete_manifest", lambda *_: {})
    monkeypatch.setattr(run, "_tell_plan", lambda *_: None)
    monkeypatch.setattr(run, "profiler_problem", lambda *_: None)
    files = FileThread()
    job: Any = SimpleNamespace(
        loaded=SimpleNamespace(config=SimpleNamespace(profile=SimpleNamespace(tool="none"))),
        acquired=SimpleNamespace(folder=tmp_path),
        first_manifest={},
        files=files,
    )
    session: Any = SimpleNamespace(
        is_head=True,
        predicting=lambda: lambda _lengths, _shared_ratio: None,
        expected_shared_ratio=0.0,
        plan=SimpleNamespace(max_context_tokens=8),
    )
    prompts: Any = SimpleNamespace(lengths=lambda _: ())
    with pytest.raises(EnoughError):
        asyncio.run(asyncio.wait_for(run._run(job, session, prompts), LIMIT_S))
    files.close()
    ((path, thread),) = wrote
    assert path == tmp_path / "manifest.json"
    assert thread != threading.get_ident()


FIGURES = {
    "schema": 1, "run": "0123456789ab", "attempt": 1, "state": "done", "output_tokens_per_s": 9.5,
    "ranks": [{"rank": 0}], "attempts": [], "total": {}, "slurm": None,
    "phases": {"generate_s": 4.0},
}  # fmt: skip
DONE = AttemptTotals(1, "done", 9.0, 4.0, num_completed=1, num_output_tokens=38)


def merged(folder: Path, metrics: str | None) -> dict[str, Any]:
    """`metrics.json` after a start of a run that has nothing left to do."""
    if metrics is not None:
        (folder / "metrics.json").write_text(metrics)
    ranks: Any = SimpleNamespace(is_head=True, clock=ScriptedClock(3.0))
    earlier = Earlier(attempts=(dataclasses.asdict(DONE),))
    acquired = Acquired(folder, 0, "0123456789ab", 3, earlier)  # 2 ended before its manifest
    identity = acquired.identity(0, Place(0, 0))
    job: Any = SimpleNamespace(
        ranks=ranks, acquired=acquired, identity=identity, marks=Marks(1.0), log=NullLog()
    )
    merge_only(job)
    document: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return document


def test_a_finished_run_that_is_started_again_keeps_its_figures(tmp_path: Path) -> None:
    told = merged(tmp_path, json.dumps(FIGURES))
    attempts = [(attempt["attempt"], attempt["state"]) for attempt in told["attempts"]]
    assert attempts == [(1, "done"), (3, "done")]
    assert told["total"]["num_output_tokens"] == 38
    assert told["total"]["num_attempts"] == 2
    assert {**told, "attempts": [], "total": {}} == FIGURES


@pytest.mark.parametrize(
    "metrics",
    [None, "{", json.dumps(FIGURES | {"ranks": []}), json.dumps(FIGURES | {"state": "stopped"})],
)
def test_figures_that_do_not_tell_the_end_of_the_run_are_replaced(
    metrics: str | None, tmp_path: Path
) -> None:
    told = merged(tmp_path, metrics)
    assert (told["state"], told["attempt"], told["ranks"]) == ("done", 3, [])
    assert len(told["attempts"]) == 2


# ---- a stop before anything was generated --------------------------------------------------------

STOP = StoppedError("told to stop (SIGTERM on rank 0)")


def ended_early(folder: Path, error: Exception, *, loaded_s: float = 0.0) -> dict[str, Any] | None:
    """`metrics.json` after `error` has ended a head at 8 s, which began to read weights at 5 s."""
    clock = ScriptedClock(1.0)
    boot = BootTimeline(clock)
    begins: dict[PartName, float] = {"imports": 2.0, "tokenizer": 4.0, "read weights": 5.0}
    for name, at_s in begins.items():
        clock.advance(at_s - clock.now_s())
        boot.begin(name)
    clock.advance(3.0)
    ranks: Any = SimpleNamespace(
        is_head=True, clock=clock, boot=boot, mesh=SimpleNamespace(rank=0),
        phase_ended_s={"tokenizer": 5.0},
    )  # fmt: skip
    earlier = Earlier(attempts=(dataclasses.asdict(DONE),))
    acquired = Acquired(folder, None, "0123456789ab", 2, earlier, [PromptLine(0, 1, "a")] * 3)
    identity = acquired.identity(0, Place(0, 0))
    log = open_log(folder / "rank_0.log", identity=identity, host="n1", clock=clock)
    boot.listen(lambda part: log.info("boot", **part.event()))
    job: Any = SimpleNamespace(
        ranks=ranks, acquired=acquired, identity=identity, marks=Marks(1.0, loaded_s=loaded_s),
        log=log, progress=ProgressFile(folder, ["n1"]),
    )  # fmt: skip
    end_early(job, error)
    path = folder / "metrics.json"
    document: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return document


def test_a_run_that_is_stopped_while_it_loads_leaves_its_figures(tmp_path: Path) -> None:
    told = ended_early(tmp_path, STOP)
    assert told is not None
    assert (told["state"], told["attempt"]) == ("stopped", 2)
    assert told["requests"]["num_unfinished"] == 3
    assert told["phases"]["boot_s"] == 4.0
    assert told["phases"]["load_s"] == 3.0
    assert told["phases"]["wall_s"] == 7.0
    (rank,) = told["ranks"]
    boot = [(part["name"], part["seconds"]) for part in rank["boot"]]
    assert boot == [("process", 1.0), ("imports", 2.0), ("tokenizer", 1.0), ("read weights", 3.0)]
    states = [(attempt["attempt"], attempt["state"]) for attempt in told["attempts"]]
    assert states == [(1, "done"), (2, "stopped")]
    lines = [json.loads(line) for line in (tmp_path / "rank_0.log").read_text().splitlines()]
    assert [line["event"] for line in lines] == [*["boot"] * 4, "summary", "ended early"]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"


def test_the_figures_of_an_attempt_that_generated_stay_when_a_later_one_is_stopped(
    tmp_path: Path,
) -> None:
    figures = FIGURES | {"state": "stopped"}
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    told = ended_early(tmp_path, STOP)
    assert told is not None
    assert [attempt["attempt"] for attempt in told["attempts"]] == [1, 2]
    assert {**told, "attempts": [], "total": {}} == figures


def test_a_run_that_fails_or_has_loaded_leaves_no_figures_of_a_stop(tmp_path: Path) -> None:
    assert ended_early(tmp_path, EnvironmentSetupError("no memory")) is None
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    assert ended_early(tmp_path, STOP, loaded_s=6.0) is None
