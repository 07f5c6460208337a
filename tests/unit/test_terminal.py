"""A terminal that cannot be written."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpipipe.cli.terminal import Terminal, _GuardedOutput

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")
PRINTING = """
import sys
from mpipipe.cli.terminal import guard_terminal
terminal, told = guard_terminal(), []
terminal.listen(told.append)
for number in range(10_000):
    print("a line of some length", number)
    print("another", file=sys.stderr)
sys.stdout.flush()
open(sys.argv[1], "w").write("\\n".join(told))
print("more, at the last flush of Python itself")
"""


def told(tmp_path: Path, redirection: str) -> tuple[int, list[str]]:
    """The exit code of a program that prints much, and what it was told of its output."""
    program, report = tmp_path / "program.py", tmp_path / "told"
    program.write_text(PRINTING)
    command = f'"{sys.executable}" "{program}" "{report}" {redirection}'
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "Error" not in result.stderr
    return result.returncode, report.read_text().splitlines()


@pytest.mark.parametrize(
    ("redirection", "names"),
    [
        (">/dev/null 2>&1", []),
        (">/dev/full", ["standard output"]),
        (">/dev/full 2>/dev/full", ["standard output", "standard error"]),
        ("2>/dev/full >/dev/null", ["standard error"]),
        ("2>/dev/null | head -1", ["standard output"]),
        (">&- 2>&-", []),
    ],
)
def test_each_stream_that_fails_is_told_once(
    redirection: str, names: list[str], tmp_path: Path
) -> None:
    code, found = told(tmp_path, redirection)
    assert code == 0
    assert sorted(line.split(" cannot be written")[0] for line in found) == sorted(names)


def test_a_reader_that_does_not_read_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpipipe.cli.terminal._READER_LIMIT_S", 0.01)
    reader, writer = os.pipe()
    terminal, found = Terminal(), list[str]()
    terminal.listen(found.append)
    output = _GuardedOutput(writer, "standard output", terminal)
    size = 1 << 20  # more than a pipe takes
    assert output.write(b"x" * size) == size
    assert output.write(b"dropped") == 7
    assert len(found) == 1
    assert "read too slowly" in found[0]
    os.set_blocking(reader, False)
    with contextlib.suppress(BlockingIOError):
        while os.read(reader, 1 << 16):
            pass
    output.write(b"again")
    assert os.read(reader, 1 << 16) == b"again"
    os.close(reader)
    os.close(writer)


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_other_commands_say_so_or_end_quietly() -> None:
    def run(command: str) -> tuple[int, str]:
        result = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=ROOT,
        )
        return result.returncode, result.stderr

    help_text = f'"{sys.executable}" -m mpipipe --help'
    code, err = run(f"{help_text} >/dev/full")
    assert code == 2
    assert err == "mpipipe: error: the output cannot be written (No space left on device)\n"
    assert run(f"{help_text} | true") == (141, "")
    assert run(f"{help_text} >&-") == (0, "")
