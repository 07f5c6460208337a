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

from mpipipe.errors import EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_REQUEUE
from tests.e2e.conftest import LIMIT_S, ROOT, Outcome, execute, mpiexec, read_jsonl, run

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
    ready: Callable[[], bool],
    pid: Callable[[int], int],
    config: Path,
    folder: Path,
    *words: str,
    number: signal.Signals = signal.SIGUSR1,
) -> Outcome:
    """Start a run on two ranks, and send it `number` when it is `ready`; `pid` says to whom."""
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
            os.kill(pid(process.pid), number)
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
    metrics = booting.json("metrics.json")
    assert (metrics["state"], metrics["requests"]["num_unfinished"]) == ("stopped", NUM_PROMPTS)
    assert [part["name"] for part in metrics["ranks"][0]["boot"]][:2] == ["process", "imports"]

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
    manifest, metrics = resumed.json("manifest.json"), resumed.json("metrics.json")
    # The attempt that was stopped while it booted may have ended before it said that it is one.
    attempts = manifest["attempts"]
    assert [attempt["num_kept"] for attempt in attempts[-2:]] == [0, len(early)]
    told = [(attempt["state"], attempt["num_completed"]) for attempt in metrics["attempts"]]
    assert told[-2:] == [("stopped", len(early)), ("done", NUM_PROMPTS - len(early))]
    assert len(told) == len(attempts) <= metrics["attempt"] == attempts[-1]["attempt"]
    assert metrics["run"] == manifest["run"] == stopped.json("metrics.json")["run"]
    assert metrics["total"]["num_completed"] == NUM_PROMPTS
    assert metrics["total"]["num_output_tokens"] == 60 * NUM_PROMPTS
    assert len(read_jsonl(folder / "completions_rank_0.jsonl")) == NUM_PROMPTS

    plain = run(0, tiny_config, tmp_path / "plain", *job)
    text = [(record["id"], record["text"]) for record in plain.completions()]
    assert [(record["id"], record["text"]) for record in resumed.completions()] == text

    again = run(0, tiny_config, folder, *job, resume)
    assert again.exit_code == 0, again.stderr
    assert again.completions() == resumed.completions()
    figures, metrics = metrics, again.json("metrics.json")
    assert (metrics["state"], metrics["ranks"]) == ("done", figures["ranks"])
    assert metrics["total"]["num_output_tokens"] == 60 * NUM_PROMPTS
    assert again.json("manifest.json")["plan"] == manifest["plan"]


def rank_of(folder: Path, rank: int) -> int:
    """The process id of a rank that has said that it runs."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return int(manifest["hosts"][rank]["pid"])


def parent_of(pid: int) -> int:
    """The process id of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def has_completed(folder: Path) -> bool:
    path = folder / "completions_rank_0.jsonl"
    return path.exists() and path.stat().st_size > 0


def test_a_rank_that_is_killed_is_named_and_its_launcher_reports_it(
    job: list[str], tiny_config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ended = stop_when(
        lambda: has_completed(folder),
        lambda _: rank_of(folder, 1),
        tiny_config,
        folder,
        *job,
        number=signal.SIGKILL,
    )
    assert ended.exit_code == EXIT_PEER_LOST, ended.stderr
    assert "rank 1 on " in ended.stderr
    assert "(stage 1), after step " in ended.stderr
    assert "was killed by SIGKILL" in ended.stderr
    status = ended.json("status.json")
    assert status["state"] == "failed"
    assert "rank 1 on " in status["error"]

    # What it did is not lost, and each prompt counts once.
    resumed = run(0, tiny_config, folder, *job, "output.resume=true")
    assert resumed.exit_code == 0, resumed.stderr
    metrics = resumed.json("metrics.json")
    killed, last = metrics["attempts"]
    assert (killed["state"], last["state"]) == ("interrupted", "done")
    assert killed["num_completed"] == metrics["requests"]["num_kept"] > 0
    assert killed["num_output_tokens"] == 60 * killed["num_completed"]
    assert killed["wall_s"] > killed["generate_s"] > 0
    assert metrics["total"]["num_completed"] == NUM_PROMPTS
    assert metrics["total"]["num_output_tokens"] == 60 * NUM_PROMPTS


def test_ranks_whose_launcher_is_gone_end_within_seconds(
    job: list[str], tiny_config: Path, tmp_path: Path
) -> None:
    folder, pids = tmp_path / "run", list[int]()

    def proxy(_: int) -> int:
        pids.extend(rank_of(folder, rank) for rank in range(2))
        return parent_of(parent_of(pids[0]))  # of the supervisor

    ready = has_completed
    stop_when(lambda: ready(folder), proxy, tiny_config, folder, *job, number=signal.SIGKILL)
    until_s = time.monotonic() + 15
    while any(Path(f"/proc/{pid}/cmdline").exists() and _runs(pid) for pid in pids):
        assert time.monotonic() < until_s, "ranks go on without a launcher"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_stops_a_run_in_order(job: list[str], tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = stop_when(
        lambda: has_completed(folder),
        lambda launcher: launcher,
        tiny_config,
        folder,
        *job,
        number=signal.SIGINT,
    )
    assert ended.exit_code == EXIT_INTERRUPTED, ended.stderr
    assert "Traceback" not in ended.stderr
    status = ended.json("status.json")
    assert status["state"] == "stopped"
    assert status["stop_reason"].startswith("SIGINT")  # of rank 0, or of the rank that was first
    assert 0 < len(ended.completions()) < NUM_PROMPTS


def test_a_run_goes_on_when_nothing_can_be_printed(tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = f'"{sys.executable}" -m mpipipe run "{tiny_config}" output.dir="{folder}" --show'
    script = f"set -o pipefail; {command} 2>/dev/full >/dev/full"
    assert execute(["bash", "-c", script], folder).exit_code == 0
    assert len(read_jsonl(folder / "completions.jsonl")) == 3
    events = [line for line in read_jsonl(folder / "rank_0.log") if line["event"] == "terminal"]
    assert len(events) == 2


def test_a_run_is_not_resumed_with_other_settings(tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(0, tiny_config, folder).exit_code == 0
    before = (folder / "completions.jsonl").read_bytes()
    words = ["output.resume=true", "generation.max_new_tokens=9"]
    other = run(0, tiny_config, folder, *words)
    assert other.exit_code == 2
    assert "max_new_tokens was 8 and is 9 now" in other.stderr
    assert (folder / "completions.jsonl").read_bytes() == before


def test_a_rank_that_leaves_with_work_given_up_does_not_have_the_others_killed() -> None:
    command = [*mpiexec(2), sys.executable, "-m", "tests.e2e.leaving_rank"]
    outcome = execute(command, Path())
    assert outcome.exit_code == EXIT_REQUEUE, outcome.stderr
    assert "rank 0 is still there" in outcome.stdout
