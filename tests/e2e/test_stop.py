"""A run that is told to stop, and the one that goes on from it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpipipe.errors import EXIT_PEER_LOST, EXIT_REQUEUE
from tests.e2e.conftest import LIMIT_S, Outcome, execute, launched, mpiexec, read_jsonl, run

NUM_PROMPTS = 150
JOURNAL = "completions_rank_0.jsonl"
SLOW_DISK = 500  # bytes a second: minutes for the tiny model


@pytest.fixture
def job(tiny_config: Path, tmp_path: Path) -> list[str]:
    """Settings under which most prompts are left after the first completions."""
    prompts = tmp_path / "many.jsonl"
    lines = [{"id": f"p{i}", "prompt": f"prompt {i}"} for i in range(NUM_PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        f"prompts.path={prompts}",
        "generation.max_new_tokens=60",
        "generation.temperature=1.5",
        "generation.ignore_eos=true",
        "pipeline.max_sequences_per_slot=8",
    ]


def stop_when(
    ready: Callable[[], bool],
    pid: Callable[[int], int],
    config: Path,
    folder: Path,
    *words: str,
    number: signal.Signals = signal.SIGUSR1,
    slowed: str = "",
) -> Outcome:
    """Start a run on two ranks, and send it `number` when it is `ready`; `pid` says to whom.

    From its first completion on each of its steps sleeps: it does not end before it is told.
    `slowed`: what else holds it up, for `slowed_rank`.
    """
    held = f"held:*:{folder / JOURNAL},{slowed}"
    command = [*mpiexec(2), sys.executable, "-m", "tests.slowed.slowed_rank", "run", str(config)]
    with launched([*command, f"output.dir={folder}", *words], SLOWED=held) as process:
        until = time.monotonic() + LIMIT_S
        while not ready() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(pid(process.pid), number)
        stdout, stderr = process.communicate(timeout=LIMIT_S)
    return Outcome(process.returncode, stdout, stderr, folder)


def test_a_run_that_is_stopped_killed_and_resumed_is_the_run_that_was_left_alone(
    job: list[str], tiny_config: Path, tmp_path: Path
) -> None:
    """Also where its attempts are two stages, two replicas and one process in turn."""
    folder, resume = tmp_path / "run", "output.resume=true"
    replicas = "pipeline.replicas=2"
    journal = folder / JOURNAL

    def num_lines(path: Path = journal) -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def second_rank(_: int) -> int:
        manifest = json.loads((folder / "manifest.json").read_text())
        return int(manifest["hosts"][1]["pid"])

    # While booting, through the launcher; then in the middle, on a rank that is not the head.
    folder.mkdir()
    log = folder / "rank_0.log"
    never_loads = f"read:*:{SLOW_DISK}"  # however late it is told
    booting = stop_when(log.exists, lambda pid: pid, tiny_config, folder, *job, slowed=never_loads)
    assert booting.exit_code == EXIT_REQUEUE, booting.stderr
    assert "told to stop (SIGUSR1" in booting.stderr
    assert "Traceback" not in booting.stderr
    assert booting.json("status.json")["state"] == "stopped"
    metrics = booting.json("metrics.json")
    assert (metrics["state"], metrics["requests"]["num_unfinished"]) == ("stopped", NUM_PROMPTS)
    assert [part["name"] for part in metrics["ranks"][0]["boot"]][:2] == ["process", "imports"]

    stopped = stop_when(lambda: num_lines() > 0, second_rank, tiny_config, folder, *job, resume)
    assert stopped.exit_code == EXIT_REQUEUE, stopped.stderr
    early = stopped.completions()
    assert 0 < len(early) < NUM_PROMPTS
    assert stopped.json("metrics.json")["requests"]["num_unfinished"] == NUM_PROMPTS - len(early)
    status = stopped.json("status.json")
    assert (status["state"], status["stop_reason"]) == ("stopped", "SIGUSR1 on rank 1")

    # Then that rank is killed: it is named, and its launcher reports it.
    killed = stop_when(
        lambda: num_lines() > len(early), second_rank, tiny_config, folder, *job, resume,
        number=signal.SIGKILL,
    )  # fmt: skip
    assert killed.exit_code == EXIT_PEER_LOST, killed.stderr
    assert "rank 1 on " in killed.stderr
    assert "(stage 1), after step " in killed.stderr
    assert "was killed by SIGKILL" in killed.stderr
    status = killed.json("status.json")
    assert status["state"] == "failed"
    assert "rank 1 on " in status["error"]
    num_done = num_lines()
    assert len(early) < num_done < NUM_PROMPTS

    # The same to two replicas: the second rank is the head of one.
    stopped = stop_when(
        lambda: num_lines() > num_done, second_rank, tiny_config, folder, *job, resume, replicas
    )
    assert stopped.exit_code == EXIT_REQUEUE, stopped.stderr
    num_stopped = len(stopped.completions())
    assert num_done < num_stopped < NUM_PROMPTS
    unfinished = stopped.json("metrics.json")["requests"]["num_unfinished"]
    assert unfinished == NUM_PROMPTS - num_stopped
    # What a killed attempt has done is known from lines that its head had time to write.
    requests = folder / "requests.jsonl"
    num_told = num_lines(requests)
    killed = stop_when(
        lambda: num_lines() > num_stopped and num_lines(requests) > num_told,
        second_rank, tiny_config, folder, *job, resume, replicas, number=signal.SIGKILL,
    )  # fmt: skip
    assert killed.exit_code == EXIT_PEER_LOST, killed.stderr
    assert "rank 1 on " in killed.stderr
    num_killed = num_lines()
    assert num_stopped < num_killed < NUM_PROMPTS

    with journal.open("a") as file:
        file.write('{"id": "p149", "text": "torn')
    resumed = run(0, tiny_config, folder, *job, resume)
    assert resumed.exit_code == 0, resumed.stderr
    assert f"{num_killed} prompts are done" in resumed.stdout
    assert resumed.json("metrics.json")["requests"]["num_kept"] == num_killed
    manifest, metrics = resumed.json("manifest.json"), resumed.json("metrics.json")
    # The attempt that was stopped while it booted may have ended before it said that it is one.
    attempts = manifest["attempts"]
    kept = [0, len(early), num_done, num_stopped, num_killed]
    assert [attempt["num_kept"] for attempt in attempts[-5:]] == kept
    # What each attempt did is not lost, and each prompt counts once.
    counts = [after - before for before, after in itertools.pairwise([*kept, NUM_PROMPTS])]
    states = ("stopped", "interrupted", "stopped", "interrupted", "done")
    told = [(attempt["state"], attempt["num_completed"]) for attempt in metrics["attempts"]]
    assert told[-5:] == list(zip(states, counts, strict=True))
    assert metrics["attempts"][-2]["num_output_tokens"] == 60 * counts[-2]
    assert metrics["attempts"][-2]["wall_s"] > metrics["attempts"][-2]["generate_s"] > 0
    assert len(told) == len(attempts) <= metrics["attempt"] == attempts[-1]["attempt"]
    assert metrics["run"] == manifest["run"] == stopped.json("metrics.json")["run"]
    assert metrics["total"]["num_completed"] == NUM_PROMPTS
    assert metrics["total"]["num_output_tokens"] == 60 * NUM_PROMPTS
    assert len(read_jsonl(journal)) == NUM_PROMPTS

    plain = run(0, tiny_config, tmp_path / "plain", *job)
    text = [(record["id"], record["text"]) for record in plain.completions()]
    assert [(record["id"], record["text"]) for record in resumed.completions()] == text

    again = run(0, tiny_config, folder, *job, resume)  # without loading: nothing is left to do
    assert again.exit_code == 0, again.stderr
    assert again.completions() == resumed.completions()
    figures, metrics = metrics, again.json("metrics.json")
    assert (metrics["state"], metrics["ranks"]) == ("done", figures["ranks"])
    assert metrics["total"]["num_output_tokens"] == 60 * NUM_PROMPTS
    assert again.json("manifest.json")["plan"] == manifest["plan"]


def test_a_run_goes_on_when_nothing_can_be_printed(tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = f'"{sys.executable}" -m mpipipe run "{tiny_config}" output.dir="{folder}" --show'
    script = f"set -o pipefail; {command} 2>/dev/full >/dev/full"
    assert execute(["bash", "-c", script], folder).exit_code == 0
    assert len(read_jsonl(folder / "completions.jsonl")) == 3
    events = [line for line in read_jsonl(folder / "rank_0.log") if line["event"] == "terminal"]
    assert len(events) == 2


def test_a_run_is_not_resumed_with_other_settings(
    tiny_config: Path, tiny_alone: Outcome, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_alone.folder, folder)
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
