"""What `job.run` does between its phases, without ranks."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpipipe.job import run
from mpipipe.run_folder.file_thread import FileThread

LIMIT_S = 30.0


class Enough(Exception):
    """The test has seen what it wanted."""


def test_the_manifest_is_brought_to_the_disk_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared disk that does not answer must not silence the head."""
    wrote: list[tuple[Path, int]] = []

    def write_json(path: Path, _document: dict[str, Any]) -> None:
        wrote.append((path, threading.get_ident()))
        raise Enough

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
    with pytest.raises(Enough):
        asyncio.run(asyncio.wait_for(run._run(job, session, prompts), LIMIT_S))
    files.close()
    ((path, thread),) = wrote
    assert path == tmp_path / "manifest.json"
    assert thread != threading.get_ident()
