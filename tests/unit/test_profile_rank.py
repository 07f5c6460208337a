"""launch/profile_rank.sh, with stand-ins for the profilers: what is started, what is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.unit.launch_stand import Stand

PERF = """
    echo "perf $*" >>"$CALLS"
    case $1 in
    report) echo "42 % of it" ;;
    record)
        [ -z "${REFUSES:-}" ] || exit 255
        while [ "$1" != -- ] && [ "$1" != true ]; do
            case $1 in --output=*) [ "${1#*=}" = /dev/null ] || echo x >"${1#*=}" ;; esac
            shift
        done
        [ "$1" = -- ] || exit 0
        shift
        [ -z "${TOLD:-}" ] || { "$@" & exit 143; } # perf 6.1 that was told to end
        "$@" ;;
    esac"""
NSYS = 'echo "nsys $*" >>"$CALLS"; while [[ $1 != work ]]; do shift; done; "$@"'
COMMAND = 'echo "work $* under ${MPIPIPE_PROFILER}" >>"$CALLS"; exit "${COMMAND_CODE:-0}"'


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    stand = Stand(tmp_path).build()
    stand.program("work", COMMAND)
    # Only stand-ins: this machine may have the real ones.
    stand.environ["PATH"] = f"{stand.bin}:{tools(tmp_path)}"
    return stand


def tools(folder: Path) -> Path:
    """A folder with the programs that the script itself needs."""
    found = folder / "tools"
    found.mkdir()
    for name in ("bash", "env", "mkdir", "rm", "timeout", "sleep"):
        place = next(Path(p) / name for p in os.get_exec_path() if (Path(p) / name).exists())
        (found / name).symlink_to(place)
    return found


def test_perf_leaves_a_text_for_each_rank_and_the_code_of_the_command(stand: Stand) -> None:
    stand.program("perf", PERF)
    runs = stand.folder / "runs"
    words = ("perf", str(runs), "work", "run", "a b")
    code, text = stand.run("profile_rank.sh", *words, PMI_RANK="3", COMMAND_CODE="75")
    assert code == 75, text
    assert stand.asked("work") == ["work run a b under perf"]
    assert (runs / "perf_rank_3.txt").read_text() == "42 % of it\n"
    assert (runs / "perf_rank_3.data").exists()


def test_a_command_that_ends_in_its_own_time_after_perf_was_told_to_end_keeps_its_code(
    stand: Stand,
) -> None:
    stand.program("perf", PERF)
    fifo = stand.folder / "fifo"
    os.mkfifo(fifo)
    stand.program(
        "work",
        """trap 'exit 75' TERM
        echo $$ >"$FIFO"
        while :; do sleep 0.01; done""",
    )
    words = ("profile_rank.sh", "perf", str(stand.folder), "work")
    process = stand.start(*words, environ={"TOLD": "yes"})
    os.kill(int(fifo.read_text()), signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert (stand.folder / "perf_rank_0.txt").exists()


def test_nsys_is_given_the_file_of_the_rank_and_flags_of_the_site(stand: Stand) -> None:
    stand.program("nsys", NSYS)
    runs = stand.folder / "runs"
    words = ("nsys", str(runs), "work", "run")
    code, text = stand.run("profile_rank.sh", *words, SLURM_PROCID="1", COMMAND_CODE="4")
    assert code == 4, text
    output = f"nsys profile --output={runs}/nsys_rank_1 --force-overwrite=true"
    assert stand.asked("nsys") == [f"{output} --trace=cuda,nvtx,osrt work run"]
    stand.run("profile_rank.sh", *words, OMPI_COMM_WORLD_RANK="0", MPIPIPE_NSYS_FLAGS="--a --b=c")
    assert "nsys_rank_0 --force-overwrite=true --a --b=c work run" in stand.asked("nsys")[-1]


@pytest.mark.parametrize("tool", ["perf", "nsys"])
def test_without_the_profiler_the_command_runs_alone_and_is_told(stand: Stand, tool: str) -> None:
    words = (tool, str(stand.folder / "runs"), "work", "run")
    code, text = stand.run("profile_rank.sh", *words, COMMAND_CODE="4")
    assert (code, text) == (4, "")
    assert stand.asked("work") == ["work run under missing"]


def test_a_perf_that_may_not_record_is_no_reason_not_to_run(stand: Stand) -> None:
    stand.program("perf", PERF)
    code, text = stand.run("profile_rank.sh", "perf", "/no", "work", "run", REFUSES="yes")
    assert (code, text) == (0, "")
    assert stand.asked("work") == ["work run under refused"]


def test_words_that_are_missing_are_named(stand: Stand) -> None:
    code, text = stand.run("profile_rank.sh", "perf", "runs")
    assert code == 2
    assert "a folder and a command" in text
