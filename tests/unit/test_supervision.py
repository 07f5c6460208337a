"""What a supervisor decides, told what happened and when."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from mpipipe.errors import EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_REQUEUE
from mpipipe.job.supervision import End, RankPage, RankPhase, Supervision, open_rank_page
from mpipipe.run_folder.status_file import RunState, tell_end

LIMIT_S = 10.0


def supervision(phase: RankPhase = RankPhase.RUNNING) -> tuple[Supervision, RankPage]:
    page = open_rank_page()
    page.phase, page.stage, page.step, page.silence_limit_s = phase, 1, 17, LIMIT_S
    return Supervision(page, "rank 1 on n2", "srun", 0.0), page


def looks(watch: Supervision, until_s: int, since_s: int = 0) -> list[tuple[int, str]]:
    """The signals that the rank gets, by the second, when one looks every second."""
    sent = []
    for second in range(since_s + 1, until_s + 1):
        number = watch.look(float(second), launcher_is_gone=False)
        if number is not None:
            sent.append((second, number.name))
    return sent


def end(watch: Supervision, code: int, *, short: bool = False) -> End:
    return watch.end(code, peak_bytes=3 << 29, was_memory_short=short)


@pytest.mark.parametrize("code", [0, 1, 4, 75, 130])
def test_the_code_of_a_rank_that_ends_by_itself_is_passed_on(code: int) -> None:
    watch, _ = supervision()
    assert looks(watch, 60) == []
    assert end(watch, code) == End(code)


@pytest.mark.parametrize(
    ("number", "short", "cause"),
    [
        (signal.SIGKILL, True, "out of memory (it had used up to 1.5 GiB)"),
        (signal.SIGKILL, False, "limit on its memory"),
        (signal.SIGSEGV, False, "native code"),
        (signal.SIGBUS, False, "native code"),
    ],
)
def test_a_killed_rank_is_named_with_signal_stage_step_and_cause(
    number: signal.Signals, short: bool, cause: str
) -> None:
    watch, _ = supervision()
    found = end(watch, -number, short=short)
    assert (found.exit_code, found.state) == (EXIT_PEER_LOST, RunState.FAILED)
    for part in ("rank 1 on n2 (stage 1), after step 17,", number.name, cause, "output.resume"):
        assert part in found.sentence


def test_a_rank_that_was_killed_while_booting_has_no_step() -> None:
    watch, page = supervision(RankPhase.BOOTING)
    page.stage = -1
    assert "rank 1 on n2, while booting, was killed" in end(watch, -signal.SIGKILL).sentence


def test_a_rank_that_was_killed_before_its_first_step_has_no_step() -> None:
    watch, page = supervision()
    page.step = -1
    sentence = end(watch, -signal.SIGKILL).sentence
    assert "rank 1 on n2 (stage 1), before its first step, was killed" in sentence


def test_a_stopped_rank_is_ended_after_the_limit_and_not_when_it_was_continued() -> None:
    watch, _ = supervision()
    watch.frozen(0.5)
    assert looks(watch, 12) == []  # 3 s more than the limit: the other ranks speak first
    watch.thawed()
    assert looks(watch, 40, 12) == []
    watch.frozen(40.0)
    assert looks(watch, 60, 40) == [(53, "SIGKILL")]
    found = end(watch, -signal.SIGKILL)
    assert found.exit_code == EXIT_PEER_LOST
    assert "was stopped (SIGSTOP) for 13 s" in found.sentence


def test_no_limit_on_silence_is_none_for_a_stopped_rank() -> None:
    watch, page = supervision()
    page.silence_limit_s = 0.0
    watch.frozen(0.5)
    assert looks(watch, 600) == []


def test_time_in_which_the_whole_job_was_suspended_does_not_count() -> None:
    watch, _ = supervision()
    watch.frozen(0.5)
    assert watch.look(1.0, launcher_is_gone=False) is None
    assert watch.look(3600.0, launcher_is_gone=False) is None
    assert looks(watch, 3612, 3600) == []
    assert looks(watch, 3614, 3612) == [(3613, "SIGKILL")]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, EXIT_REQUEUE), (signal.SIGINT, EXIT_INTERRUPTED)]
)
def test_a_rank_that_boots_on_after_a_stop_signal_is_ended(
    number: signal.Signals, code: int
) -> None:
    watch, _ = supervision(RankPhase.BOOTING)
    watch.signalled(number, 0.0)
    assert looks(watch, 10) == [(6, "SIGKILL")]
    found = end(watch, -signal.SIGKILL)
    assert (found.exit_code, found.state) == (code, RunState.STOPPED)
    assert number.name in found.sentence


def test_a_running_rank_has_its_time_after_a_stop_signal_until_the_second() -> None:
    watch, _ = supervision()
    watch.signalled(signal.SIGTERM, 0.0)
    watch.signalled(signal.SIGTERM, 0.1)  # launchers send it twice
    assert looks(watch, 300) == []
    watch.signalled(signal.SIGTERM, 300.0)
    assert looks(watch, 310, 300) == [(307, "SIGKILL")]
    assert end(watch, -signal.SIGKILL).exit_code == EXIT_REQUEUE


def test_without_its_launcher_a_rank_is_told_to_stop_and_then_ended() -> None:
    watch, _ = supervision()
    sent = [watch.look(float(second), launcher_is_gone=second > 1) for second in range(9)]
    assert sent == [None, None, signal.SIGHUP, None, None, None, None, signal.SIGKILL, None]
    for code in (EXIT_REQUEUE, -signal.SIGKILL):
        assert end(watch, code).exit_code == EXIT_PEER_LOST
        assert "its launcher, srun, is gone" in end(watch, code).sentence


def test_a_rank_that_hangs_when_all_is_done_is_ended_with_its_own_code() -> None:
    watch, page = supervision()
    page.ended(4)
    assert looks(watch, 30) == [(21, "SIGKILL")]
    assert end(watch, -signal.SIGKILL) == End(4)


def test_an_abort_that_was_cut_short_has_said_why() -> None:
    watch, _ = supervision()
    assert end(watch, -signal.SIGALRM) == End(EXIT_PEER_LOST)
    watch.signalled(signal.SIGINT, 0.0)
    watch.signalled(signal.SIGINT, 2.0)
    assert end(watch, -signal.SIGALRM) == End(EXIT_INTERRUPTED)


def test_the_end_of_a_run_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    tell_end(tmp_path, RunState.FAILED, "lost")  # no run: nothing is written
    assert not path.exists()
    path.write_text('{"state": "generating", "num_completed": 3}')
    tell_end(tmp_path, RunState.FAILED, "lost")
    tell_end(tmp_path, RunState.STOPPED, "later")
    told = json.loads(path.read_text())
    assert (told["state"], told["error"], told["num_completed"]) == ("failed", "lost", 3)
    path.write_text("[]")
    tell_end(tmp_path, RunState.FAILED, "lost")
    assert path.read_text() == "[]"
