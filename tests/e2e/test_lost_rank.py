"""A rank that is frozen, and nodes that do not share a folder: the message names what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpipipe.control_plane.silence import interval_s
from mpipipe.errors import EXIT_CHECKPOINT, EXIT_PEER_LOST
from mpipipe.logs.facts import read_facts
from mpipipe.logs.problems import find_problems
from mpipipe.logs.reading import RunFiles
from mpipipe.logs.summary import summarise
from tests.e2e.conftest import LIMIT_S, Outcome, execute, launched, mpiexec, read_jsonl

TIMEOUT_S = 8.0  # a rank that gets no core for so long would look frozen, too
NUM_PROMPTS = 100


def freeze_when_generating(rank: int, config: Path, folder: Path, *words: str) -> Outcome:
    """Run on two ranks and stop the process of `rank` for good.

    Not before there is a completion, from which on each step sleeps, and a heartbeat has had the
    time to tell of a step.
    """
    journal = folder / "completions_rank_0.jsonl"
    command = [*mpiexec(2), sys.executable, "-m", "tests.slowed.slowed_rank", "run", str(config)]
    command += [f"output.dir={folder}", f"pipeline.heartbeat_timeout_s={TIMEOUT_S}", *words]
    with launched(command, SLOWED=f"held:*:{journal}") as process:
        until = time.monotonic() + LIMIT_S
        steps = folder / f"steps_rank_{rank}.jsonl"
        while process.poll() is None and not (
            journal.exists()
            and journal.stat().st_size
            and _stepped_s(steps) > 1.2 * interval_s(TIMEOUT_S)
        ):
            assert time.monotonic() < until
            time.sleep(0.01)
        manifest = json.loads((folder / "manifest.json").read_text())
        pid = int(manifest["hosts"][rank]["pid"])
        # Its supervisor first, which would end it a moment after the others have named it: with the
        # cores busy, before they have.
        os.kill(supervisor_of(pid), signal.SIGSTOP)
        os.kill(pid, signal.SIGSTOP)
        stdout, stderr = process.communicate(timeout=LIMIT_S)
    while not has_ended(pid):  # the launcher ends the stopped process too, a moment later
        assert time.monotonic() < until
        time.sleep(0.01)
    return Outcome(process.returncode, stdout, stderr, folder)


def _stepped_s(steps: Path) -> float:
    """Between the first and the last step that are on the disk."""
    written = steps.read_bytes() if steps.exists() else b""
    lines = written.rpartition(b"\n")[0].split(b"\n")  # the last may be half written
    if len(lines) < 2:
        return 0.0
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    return float(last["t_s"]) - float(first["t_s"])


def supervisor_of(pid: int) -> int:
    """The process that watches over a rank: its parent."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert b"slowed_rank" in Path(f"/proc/{parent}/cmdline").read_bytes()
    return parent


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or waits only for its parent to ask how it ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_ends_the_job_and_one_sentence_names_it(
    frozen: int, tiny_config: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "many.jsonl"
    lines = [{"id": f"p{i}", "prompt": f"prompt {i}"} for i in range(NUM_PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = freeze_when_generating(
        frozen,
        tiny_config,
        tmp_path / "run",
        f"prompts.path={prompts}",
        "generation.max_new_tokens=60",
        "generation.temperature=1.5",
        "generation.ignore_eos=true",
    )
    assert outcome.exit_code == EXIT_PEER_LOST, outcome.stderr
    assert outcome.stderr.count("has been silent for") == 1
    assert f"rank {frozen} on " in outcome.stderr
    assert f"(stage {frozen}) has been silent" in outcome.stderr
    assert "its last step was" in outcome.stderr
    status = outcome.json("status.json")
    assert status["state"] == "failed"
    assert f"rank {frozen} on " in status["error"]
    (ended,) = (
        line
        for line in read_jsonl(outcome.folder / f"rank_{1 - frozen}.log")
        if line["event"] == "ended early"
    )
    assert ended["error"] == status["error"]
    assert 0 < len(read_jsonl(outcome.folder / "completions_rank_0.jsonl")) < NUM_PROMPTS
    # What it leaves can be asked: by what was written, whatever the last line looks like.
    files = RunFiles(outcome.folder)
    found = summarise(read_facts(files), {})
    assert [rank.num_steps_kept > 0 for rank in found.ranks] == [True, True]
    assert [rank.seconds["compute"] > 0 for rank in found.ranks] == [True, True]
    assert any("no metrics.json" in note for note in files.notes())
    (problem,) = find_problems(files, with_warnings=False)
    assert (problem.rank, problem.event) == (1 - frozen, "ended early")


def test_a_model_folder_that_a_node_does_not_share_is_named(
    tiny_config: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Rank 1 runs where another file system lies over the model folder, as on another node."""
    hides = ["unshare", "-m", "sh", "-c"]
    can = [*hides, "mount --make-rprivate / && mount -t tmpfs none /mnt"]
    if subprocess.run(can, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    run = [sys.executable, "-m", "mpipipe", "run", str(tiny_config), f"output.dir={tmp_path}/run"]
    model = str(tiny_model)
    hidden = 'mount --make-rprivate / && mount -t tmpfs none "$0" && exec "$@"'
    command = [*mpiexec(1), *run, ":", "-n", "1", *hides, hidden, model, *run]
    outcome = execute(command, tmp_path / "run")
    assert outcome.exit_code == EXIT_CHECKPOINT, outcome.stderr
    assert "rank 1 on " in outcome.stderr
    assert "do not share this folder" in outcome.stderr
    assert model in outcome.stderr
    assert "Traceback" not in outcome.stderr
