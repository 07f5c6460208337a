"""The progress display: plain lines by the clock, a bar where it is wanted, silence otherwise."""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path

import pytest

from mpipipe.cli.run_view import ProgressView, TerminalView
from mpipipe.cli.terminal import Terminal as GuardedTerminal
from mpipipe.clock import ScriptedClock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_at_the_interval_and_at_the_end() -> None:
    clock, stream = ScriptedClock(100.0), io.StringIO()
    with closing(ProgressView("plain", 10, stream, clock=clock, interval_s=5.0)) as view:
        view.start()
        for second in range(1, 13):
            clock.advance(1.0)
            view.update(done=second // 2, failed=0, output_tokens=10 * second, running=4)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == (
        "2/10 prompts · 50 tokens · 10.0 tokens/s · 4 running · 4 waiting · ETA 20 s"
    )
    assert lines[1].startswith("5/10 prompts")
    assert lines[2].startswith("6/10 prompts")


def test_failed_prompts_are_named_and_make_no_time_left_shorter() -> None:
    clock, stream = ScriptedClock(), io.StringIO()
    view = ProgressView("plain", 4, stream, clock=clock)
    view.start()
    clock.advance(90.0)
    view.update(done=1, failed=2, output_tokens=9, running=1)
    assert stream.getvalue() == (
        "3/4 prompts · 9 tokens · 0.1 tokens/s · 1 running · 0 waiting · 2 failed · ETA 90 s\n"
    )


def test_no_time_left_is_guessed_before_the_first_prompt_or_after_the_last() -> None:
    clock, stream = ScriptedClock(), io.StringIO()
    view = ProgressView("plain", 2, stream, clock=clock, interval_s=0.0)
    view.update(done=0, failed=0, output_tokens=0, running=2)
    clock.advance(1.0)
    view.update(done=0, failed=1, output_tokens=0, running=1)
    view.update(done=2, failed=0, output_tokens=8, running=0)
    assert "ETA" not in stream.getvalue()


@pytest.mark.parametrize(
    ("elapsed_s", "shown"), [(59.0, "59 s"), (601.0, "10 min"), (7500.0, "2 h 05 min")]
)
def test_the_time_left_is_readable(elapsed_s: float, shown: str) -> None:
    clock, stream = ScriptedClock(), io.StringIO()
    view = ProgressView("plain", 2, stream, clock=clock, interval_s=1.0)
    view.start()
    clock.advance(elapsed_s)
    view.update(done=1, failed=0, output_tokens=1, running=1)
    assert stream.getvalue().endswith(f"ETA {shown}\n")


def test_closing_twice_writes_once_and_updates_after_it_are_silent() -> None:
    clock, stream = ScriptedClock(), io.StringIO()
    view = ProgressView("plain", 2, stream, clock=clock)
    view.update(done=1, failed=0, output_tokens=1, running=1)
    view.close()
    view.close()
    clock.advance(60.0)
    view.update(done=2, failed=0, output_tokens=2, running=0)
    assert len(stream.getvalue().splitlines()) == 1


def test_none_writes_nothing_even_on_a_terminal() -> None:
    stream = Terminal()
    with closing(ProgressView("none", 2, stream, clock=ScriptedClock(), interval_s=0.0)) as view:
        view.start()
        view.update(done=1, failed=0, output_tokens=1, running=1)
    assert stream.getvalue() == ""


def test_auto_is_plain_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with closing(ProgressView("auto", 2, stream, clock=ScriptedClock(), interval_s=0.0)) as view:
        view.start()
        view.update(done=1, failed=0, output_tokens=1, running=1)
    assert stream.getvalue().startswith("1/2 prompts")
    assert "\x1b" not in stream.getvalue()


def test_an_unknown_mode_is_an_error_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'fancy' is not one of auto, bar, plain, none"):
        ProgressView("fancy", 1, io.StringIO()).start()


def test_auto_on_a_terminal_is_a_bar_that_ends_with_the_last_state() -> None:
    pytest.importorskip("rich")
    clock, stream = ScriptedClock(), Terminal()
    with closing(ProgressView("auto", 2, stream, clock=clock)) as view:
        view.start()
        clock.advance(1.0)
        view.update(done=1, failed=0, output_tokens=30, running=1)
        assert "30.0 tokens/s" in stream.getvalue()
        clock.advance(0.01)
        view.update(done=2, failed=0, output_tokens=99, running=0)
        assert "99 tokens" not in stream.getvalue(), "redraws are limited by the clock"
    assert "2/2" in stream.getvalue()
    assert "99 tokens" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()


class FullDisk(io.StringIO):
    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_warning_on_a_full_or_closed_standard_error_is_no_reason_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = TerminalView(GuardedTerminal(), show=False)
    closed = io.StringIO()
    closed.close()
    for stream in (FullDisk(), closed):
        monkeypatch.setattr("sys.stderr", stream)
        view.warned("the log cannot be written")


def test_one_prompt_is_not_several(capsys: pytest.CaptureFixture[str]) -> None:
    view = TerminalView(GuardedTerminal(), show=False)
    view.stopped("SIGTERM", 1, Path("runs/x"))
    view.stopped("SIGTERM", 2, Path("runs/x"))
    told = capsys.readouterr()
    assert "(SIGTERM): 1 prompt is not done; to go on" in told.err
    assert "(SIGTERM): 2 prompts are not done; to go on" in told.err
