"""A run that is told to stop, and the one that goes on from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpipipe.errors import EXIT_REQUEUE
from tests.e2e.conftest import LIMIT_S, ROOT, Outcome, mpiexec, read_jsonl, run

NUM_PROMPTS = 150


@pytest.fixture
def job(tiny_config: Path, tmp_path: Path) -> list[str]:
    """Settings under which the tiny model is busy for some seconds after its first completion."""
    prompts = tmp_path / "many.jsonl"
    lines = [{"id": f"p{i}", "prompt": f"prompt {i}"} for i in range(NUM_PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        f"prompts.path={prompts}",
        "generation.max_new_tokens=60",
        "generation.temperature=1.5",
        "generation.ignore_eos=true",
    ]


def stop_when(
    ready: Callable[[], bool], pid: Callable[[int], int], config: Path, folder: Path, *words: str
) -> Outcome:
    """Start a run on two ranks, and tell it to stop when it is `ready`; `pid` says whom to tell."""
    command = [*mpiexec(2), sys.executable, "-m", "mpipipe", "run", str(config)]
    with subprocess.Popen(
        [*command, f"output.dir={folder}", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until = time.monotonic() + LIMIT_S
        while not ready() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(pid(process.pid), signal.SIGUSR1)
        stdout, stderr = process.communicate(timeout=LIMIT_S)
    return Outcome(process.returncode, stdout, stderr, folder)


def test_a_run_that_is_stopped_twice_and_resumed_is_the_run_that_was_never_stopped(
    job: list[str], tiny_config: Path, tmp_path: Path
) -> None:
    folder, resume = tmp_path / "run", "output.resume=true"

    def first_completions() -> bool:
        path = folder / "completions_rank_0.jsonl"
        return path.exists() and path.stat().st_size > 0

    def second_rank(_: int) -> int:
        manifest = json.loads((folder / "manifest.json").read_text())
        return int(manifest["hosts"][1]["pid"])

    # While booting, through the launcher; then in the middle, on a rank that is not the head.
    (tmp_path / "run").mkdir()
    log = folder / "rank_0.log"
    booting = stop_when(log.exists, lambda pid: pid, tiny_config, folder, *job)
    assert booting.exit_code == EXIT_REQUEUE, booting.stderr
    assert "told to stop (SIGUSR1" in booting.stderr
    assert "Traceback" not in booting.stderr
    assert booting.json("status.json")["state"] == "stopped"

    stopped = stop_when(first_completions, second_rank, tiny_config, folder, *job, resume)
    assert stopped.exit_code == EXIT_REQUEUE, stopped.stderr
    early = stopped.completions()
    assert 0 < len(early) < NUM_PROMPTS
    assert stopped.json("metrics.json")["requests"]["num_unfinished"] == NUM_PROMPTS - len(early)
    status = stopped.json("status.json")
    assert (status["state"], status["stop_reason"]) == ("stopped", "SIGUSR1 on rank 1")

    with (folder / "completions_rank_0.jsonl").open("a") as file:
        file.write('{"id": "p149", "text": "torn')
    resumed = run(0, tiny_config, folder, *job, resume)
    assert resumed.exit_code == 0, resumed.stderr
    assert f"{len(early)} prompts are done" in resumed.stdout
    assert resumed.json("metrics.json")["requests"]["num_kept"] == len(early)
    assert [attempt["num_kept"] for attempt in resumed.json("manifest.json")["attempts"]] == [
        0,
        len(early),
    ]
    assert len(read_jsonl(folder / "completions_rank_0.jsonl")) == NUM_PROMPTS

    plain = run(0, tiny_config, tmp_path / "plain", *job)
    text = [(record["id"], record["text"]) for record in plain.completions()]
    assert [(record["id"], record["text"]) for record in resumed.completions()] == text

    again = run(0, tiny_config, folder, *job, resume)
    assert again.exit_code == 0, again.stderr
    assert again.completions() == resumed.completions()


def test_a_run_is_not_resumed_with_other_settings(tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(0, tiny_config, folder).exit_code == 0
    before = (folder / "completions.jsonl").read_bytes()
    words = ["output.resume=true", "generation.max_new_tokens=9"]
    other = run(0, tiny_config, folder, *words)
    assert other.exit_code == 2
    assert "max_new_tokens was 8 and is 9 now" in other.stderr
    assert (folder / "completions.jsonl").read_bytes() == before
