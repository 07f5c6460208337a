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
from mpipipe.job import run
from mpipipe.job.acquire import Acquired
from mpipipe.job.ending import merge_only
from mpipipe.job.job import Marks
from mpipipe.metrics.attempts import AttemptTotals
from mpipipe.metrics.log import NullLog
from mpipipe.run_folder.file_thread import FileThread
from mpipipe.run_folder.resume import Earlier

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
    session: Any = SimpleNamespace(is_head=True)
    prompts: Any = SimpleNamespace()
    with pytest.raises(EnoughError):
        asyncio.run(asyncio.wait_for(run._run(job, session, prompts), LIMIT_S))
    files.close()
    ((path, thread),) = wrote
    assert path == tmp_path / "manifest.json"
    assert thread != threading.get_ident()


FIGURES = {
    "schema": 1, "run": "0123456789ab", "attempt": 1, "state": "done", "output_tokens_per_s": 9.5,
    "ranks": [{"rank": 0}], "attempts": [], "total": {}, "slurm": None,
}  # fmt: skip
DONE = AttemptTotals(1, "done", 9.0, 4.0, num_completed=1, num_output_tokens=38)


def merged(folder: Path, metrics: str | None) -> dict[str, Any]:
    """`metrics.json` after a start of a run that has nothing left to do."""
    if metrics is not None:
        (folder / "metrics.json").write_text(metrics)
    ranks: Any = SimpleNamespace(is_head=True, clock=ScriptedClock(3.0))
    earlier = Earlier(attempts=(dataclasses.asdict(DONE),))
    acquired = Acquired(folder, 0, "0123456789ab", 3, earlier)  # 2 ended before its manifest
    identity = acquired.identity(0, 0)
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
