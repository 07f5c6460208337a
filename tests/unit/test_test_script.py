"""launch/test.sh with a stand-in for tox: what it runs, and that one failure fails it all."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60
TOX = """#!/usr/bin/env bash
echo "${MPIPIPE_TEST_SETUP-brings full up to date}: $*" >>"$CALLS"
echo "said $*"
[ "${!#}" != "${HANGS-}" ] || sh -c 'echo $$ >"$CHILD"; exec sleep 300'
[ "${!#}" != full ] || [ -z "${HANGS-}" ] || until [ -s "$CHILD" ]; do sleep 0.01; done
[ -z "${FORCE_COLOR-}" ] && [ -n "${NO_COLOR-}" ] || echo "in colours"
# What the words after -- are for is the second try, of the suite before them.
if [[ " $* " = *" -- "* ]]; then exit "${AGAIN-0}"; fi
[ "${!#}" != "$FAILS" ] || { cat "$REPORT"; exit 7; }
"""
# What tox prints of a suite in which a test fails, one hangs, and the ranks of a third do.
REPORT = """\
tests/e2e/test_a.py:7: AssertionError
+++++++++++++++++++++++++++++ Timeout +++++++++++++++++++++++++++++
  File "tests/chaos/test_b.py", line 9, in test_that_hangs
    time.sleep(9)
+++++++++++++++++++++++++++++ Timeout +++++++++++++++++++++++++++++
the MPI suite hung for 600 s on 4 ranks
=========================== short test summary info ============================
FAILED tests/e2e/test_a.py::test_that_fails[1] - AssertionError: assert 1 == 2
ERROR tests/e2e/test_c.py::test_without_its_fixture
"""
NAMED = (
    '  File "tests/chaos/test_b.py", line 9, in test_that_hangs',
    "the MPI suite hung for 600 s on 4 ranks",
    "FAILED tests/e2e/test_a.py::test_that_fails[1] - AssertionError: assert 1 == 2",
    "ERROR tests/e2e/test_c.py::test_without_its_fixture",
)
FIRST = "unit,contract"
REST = "mpi-1,mpi-2,mpi-4,e2e,chaos,slowed,page"
ALL = ("lint", "type", "slurm", FIRST, REST)


def run(folder: Path, *words: str, fails: str = "", **environ: str) -> tuple[int, str, list[str]]:
    """The exit code, the output and each call of tox, with `fails`: the environments that do."""
    programs = folder / "venv/bin"
    programs.mkdir(parents=True)
    for name, text in (("python", "#!/bin/sh\nexit 9\n"), ("tox", TOX)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    launch = folder / "tree" / "launch"  # a copy: the script removes what is in its tree
    launch.mkdir(parents=True)
    for name in ("test.sh", "common.sh", "constraints.txt"):
        shutil.copy(ROOT / "launch" / name, launch)
    calls = folder / "calls"
    report = folder / "report"
    report.write_text(REPORT + "said\n" * 200 + f"  {fails}: FAIL code 1 (7.00 seconds)\n")
    ours = {
        "MPIPIPE_VENV": str(folder / "venv"), "CALLS": str(calls), "FAILS": fails,
        "REPORT": str(report), **environ,
    }  # fmt: skip
    kept = {name: text for name, text in os.environ.items() if not name.startswith("MPIPIPE_")}
    result = subprocess.run(
        [launch / "test.sh", *words],
        env={**kept, **ours},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    called = calls.read_text().splitlines() if calls.exists() else []
    return result.returncode, result.stdout, called


def test_all_environments_run_and_the_shared_one_is_made_once(tmp_path: Path) -> None:
    code, said, calls = run(tmp_path, FORCE_COLOR="1")
    assert code == 0, said
    assert "in colours" not in said, "its end looks for lines that begin with a word"
    full = "brings full up to date: run --notest -e full"
    # Lint begins beside the installation, types and Slurm beside the first suites.
    beside = [f": run -e {name}" for name in ("type", "slurm", FIRST, REST)]
    assert sorted(calls) == sorted([full, "brings full up to date: run -e lint", *beside])
    for after in beside:
        assert calls.index(full) < calls.index(after)
    assert calls[-1] == f": run -e {REST}", "nothing runs beside what knows time limits"
    for environment in ALL:
        assert f"said run -e {environment}\n" in said


@pytest.mark.parametrize("fails", ["full", *ALL])
def test_one_failure_fails_it_all_and_hides_no_other(fails: str, tmp_path: Path) -> None:
    code, said, calls = run(tmp_path, fails=fails)
    assert code == 7, said
    if fails == "full":
        assert not [call for call in calls if call.startswith(": ")], "nothing runs without it"
    else:
        assert f"said run -e {fails}" in said
        assert len(calls) == 1 + len(ALL)
        end = said.splitlines()[-60:]
        assert [line for line in NAMED if line not in end] == [], "the end of a log names them"
        told = said.partition("= what failed =")[2]
        assert told.count(f"  {fails}: FAIL") <= 1, "said once"
        assert f"  {fails}: FAIL code 1 (7.00 seconds)" in end or "," in fails


def write_report(folder: Path, suite: str, *failed: str, code: int = 1, more: str = "") -> str:
    """A file like what tox prints of a suite in which those tests fail."""
    path = folder / f"{suite}.txt"
    lines = [f"FAILED tests/{suite}/test_a.py::{test} - assert 1 == 2" for test in failed]
    path.write_text("\n".join([*lines, more, f"  {suite}: FAIL code {code} (7.00 seconds)", ""]))
    return str(path)


@pytest.mark.parametrize(("again", "code"), [("0", 0), ("1", 7)])
def test_a_run_that_failed_is_tried_once_more_and_named(
    again: str, code: int, tmp_path: Path
) -> None:
    report = write_report(tmp_path, "slurm", "test_one", "test_two[1]")
    ended, said, calls = run(tmp_path, fails="slurm", REPORT=report, AGAIN=again)
    assert ended == code, said
    assert calls[-1] == ": run -e slurm -- --last-failed --last-failed-no-failures=none"
    told = said.partition("= what failed =")[2]
    assert "FAILED tests/slurm/test_a.py::test_two[1]" in told
    assert ("passed on the second try: slurm" in told) == (code == 0)


@pytest.mark.parametrize(
    ("fails", "suite", "failed"),
    [
        ("slurm", "slurm", ["a", "b", "c", "d"]),  # more than an accident
        ("slurm", "slurm", []),  # a test hung, which ends pytest without a word
        (FIRST, "unit", ["a"]),  # no processes: nothing to blame the machine for
        (REST, "mpi-2", ["a"]),
        ("lint", "slurm-is-not-lint", ["a"]),
    ],
)
def test_what_is_no_accident_of_a_run_is_not_tried_again(
    fails: str, suite: str, failed: list[str], tmp_path: Path
) -> None:
    report = write_report(tmp_path, suite, *failed)
    code, said, calls = run(tmp_path, fails=fails, REPORT=report)
    assert code == 7, said
    assert not [call for call in calls if " -- " in call]


@pytest.mark.parametrize(
    ("code", "more"),
    [
        (2, ""),  # a file could not be collected: no test has run
        (1, "FAILED tests/e2e/test_b.py::test_hangs - worker 'gw0' crashed while running"),
        (1, "[gw0] node down: Not properly terminated"),
        (1, "+++++++++++ Timeout +++++++++++"),
        (1, "the MPI suite hung for 600 s on 4 ranks"),
    ],
)
def test_a_suite_that_has_not_run_to_its_end_is_not_tried_again(
    code: int, more: str, tmp_path: Path
) -> None:
    report = write_report(tmp_path, "e2e", "test_one", code=code, more=more)
    ended, said, calls = run(tmp_path, fails=REST, REPORT=report)
    assert ended == 7, said
    assert not [call for call in calls if " -- " in call]


def test_a_suite_that_ended_without_a_word_hides_behind_no_second_try(tmp_path: Path) -> None:
    report = write_report(tmp_path, "e2e", "test_one")
    code, said, _ = run(tmp_path, fails=REST, REPORT=report)
    assert code == 0, said
    (tmp_path / "e2e.txt").write_text("FAILED tests/e2e/test_a.py::test_one\n")
    code, said, _ = run(tmp_path / "untold", fails=REST, REPORT=report)
    assert code == 7, said


def test_what_needs_root_is_left_out_by_choice_and_environments_may_be_named(
    tmp_path: Path,
) -> None:
    off = {"MPIPIPE_PAGE_TESTS": "off", "MPIPIPE_SLURM_TESTS": "off"}
    _, _, calls = run(tmp_path / "off", **off)
    assert f": run -e {REST.removesuffix(',page')}" in calls
    assert not [call for call in calls if "slurm" in call]
    _, _, calls = run(tmp_path / "named", "unit,mpi-2")
    assert calls == ["brings full up to date: run -e unit,mpi-2"]
    assert run(tmp_path / "failing", "unit", fails="unit")[0] == 7


def test_what_runs_beside_ends_with_the_script_and_with_what_it_has_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code, said, _ = run(tmp_path, fails="full", HANGS="lint", CHILD=str(child))
    assert code == 7, said
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)


def test_a_second_list_of_environments_is_refused_not_left_out(tmp_path: Path) -> None:
    code, said, calls = run(tmp_path, "unit", "contract")
    assert (code, calls) == (2, [])
    assert said.endswith(": unit,contract\n")


@pytest.mark.parametrize("name", ["plain", "a#b%20c", "with #a b%c space"])
def test_pip_finds_the_constraints_of_a_checkout_of_any_name(name: str, tmp_path: Path) -> None:
    constraints = tmp_path / name / "launch/constraints.txt"
    constraints.parent.mkdir(parents=True)
    shutil.copy(ROOT / "launch/common.sh", constraints.parent)
    result = subprocess.run(
        ["bash", "-euc", 'source "$0"; echo "$PIP_CONSTRAINT"', constraints.with_name("common.sh")],
        env={key: text for key, text in os.environ.items() if key != "PIP_CONSTRAINT"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    is_url = " " in name  # pip reads a list with spaces between
    assert result.stdout == f"{constraints.as_uri() if is_url else constraints}\n"


def test_every_folder_of_tests_has_an_environment_that_runs() -> None:
    """But for those of a GPU. A folder that is gone is an error of pytest."""
    written = (ROOT / "tox.ini").read_text(encoding="utf-8").partition("[pytest]")[0]
    named = set(re.findall(r"tests/(\w+)\b(?!\.py)", written))
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= named | {"gpu"}
    for folder in named - {"mpi"}:
        assert any((ROOT / "tests" / folder).glob("test_*.py")), folder
