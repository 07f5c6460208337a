"""Any bytes in a status file: values of the right types, or one sentence, never a traceback."""

from __future__ import annotations

import json
import math
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mpipipe.cli.status import status_command
from mpipipe.errors import OutputError
from mpipipe.run_folder.status_file import parse_status

WHOLE: dict[str, Any] = {
    "state": "generating", "mpipipe": "0.1.0", "started_at": "2026-11-22T11:00:00+00:00",
    "updated_at": "2026-11-22T12:00:00+00:00", "update_interval_s": 5.0, "hosts": ["n1", "n2"],
    "job_id": "7_1", "num_restarts": 1, "num_prompts": 100, "num_kept": 10, "num_completed": 30,
    "num_failed": 1, "num_output_tokens": 3000, "tokens_per_s": 50.0, "generating_s": 60.0,
    "stops_in_s": 1800, "stop_reason": "SIGTERM", "error": "no space", "num_running": 4,
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 5, 10**30, 10**400, -(10**400), 0.5, math.nan, math.inf, -math.inf,
    1e308, "", "x", "\ud800", "\x1b[2J\n", "1e999", "²", "9" * 5000, "2026-11-22T12:00:00",
    "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-11-22T12:00:00+00:00",
    "running", "failed", "stopped", "done", "loading", [], [1], ["n1", 2], [[[]]], {}, {"a": {}},
    ["\udfff"],
)  # fmt: skip
NUM_FUZZED = 4000  # a hundred thousand were run once; BENCHMARKS.md


def dumped(values: object) -> bytes:
    return json.dumps(values).encode()


def test_what_a_run_writes_is_read_whole() -> None:
    told = parse_status(dumped(WHOLE))
    assert dict(told.values) == WHOLE
    assert told.left_out == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hosts", 5), ("hosts", ["n1", None]), ("updated_at", "x"), ("updated_at", 3),
        ("updated_at", "2026-11-22T12:00:00"), ("num_prompts", "many"), ("num_kept", -1),
        ("num_completed", 1.5), ("num_failed", True), ("tokens_per_s", math.nan),
        ("generating_s", math.inf), ("num_output_tokens", 10**400), ("state", "asleep"),
        ("state", ["done"]), ("job_id", {"a": 1}), ("error", 3), ("stops_in_s", "soon"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_left_out_and_named(name: str, value: object) -> None:
    told = parse_status(dumped({**WHOLE, name: value}))
    assert told.left_out == (name,)
    assert dict(told.values) == {key: WHOLE[key] for key in WHOLE if key != name}


def test_what_a_newer_version_adds_is_kept_where_it_is_plain() -> None:
    more = {"num_stages": 3, "speed": 2.5, "note": "a\nb", "parts": [1], "is_new": False, "a b": 1}
    told = parse_status(dumped({**WHOLE, **more}))
    assert told.left_out == ()
    new = {name: told.values[name] for name in told.values if name not in WHOLE}
    assert new == {"num_stages": 3, "speed": 2.5, "note": "a b", "is_new": False}


def test_a_text_can_be_shown_on_a_terminal() -> None:
    told = parse_status(b'{"error": "\\ud800 \\u001b[2J \\n \xc3\xa9"}')
    assert told.values["error"] == "?  [2J   é"


NO_OBJECTS = {
    "empty": b"",
    "torn": b"{",
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "UTF-16": "{}".encode("utf-16"),
    "zeros": b"\0" * 100,
    "deep list": b"[" * 200_000,
    "deep object": b'{"a":' * 100_000,
    "large": b" " * (2 << 20),
    "digits": b'{"num_prompts": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS.keys())
def test_what_is_no_object_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(OutputError, match=r"status\.json cannot be read"):
        status_command(str(tmp_path), as_json=False, run=no_slurm)


def test_a_folder_in_the_place_of_the_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()
    with pytest.raises(OutputError, match=r"status\.json cannot be read"):
        status_command(str(tmp_path), as_json=False, run=no_slurm)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "²", "7_", "1" * 300 + "/x"])
def test_a_name_that_no_folder_and_no_job_has_is_one_sentence(name: str) -> None:
    with pytest.raises(OutputError):
        status_command(name, as_json=False, run=no_slurm)


def no_slurm(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    raise FileNotFoundError(command[0])


class OddSlurm:
    """Slurm's programs on a bad day: lines that are cut, mixed up, or of something else."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        if self._rng.random() < 0.1:
            raise subprocess.TimeoutExpired(command, limit_s)
        lines = {
            "squeue": "7_1|7|RUNNING|None|2020-11-22T11:00:00|30:00|n[1-2]|/w",
            "sacct": "7_1|7|FAILED|6:0|00:01:00|2026-11-22T11:00:00|/w",
            "scontrol": "JobId=7 StdOut=/w/a b.log NumNodes=2 TimeLimit=01:00:00 Power=",
        }
        fields = lines[command[0]].split("|")
        for _ in range(self._rng.randrange(3)):
            odd = ODD[self._rng.randrange(len(ODD))]
            at = self._rng.randrange(len(fields))
            fields[at] = "" if isinstance(odd, int) and abs(odd) > 10**40 else str(odd)
        line = "|".join(fields)
        text = f"{line[: self._rng.randrange(len(line) + 1)]}\n{line}\n\n|\n"
        text = text.encode("utf-8", "replace").decode()  # as run_child reads any bytes
        return subprocess.CompletedProcess(command, self._rng.randrange(2), text, "")


def mutated(rng: random.Random) -> bytes:
    """A status file with odd values, or with bytes exchanged, added or cut off."""
    values = dict(WHOLE)
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([*WHOLE, "other"])
        if rng.random() < 0.2:
            values.pop(name, None)
        else:
            values[name] = rng.choice(ODD)
    try:
        content = bytearray(dumped(values))
    except ValueError:  # an integer of too many digits for Python to write
        content = bytearray(dumped(WHOLE))
    for _ in range(rng.choice([0, 0, 1, 3])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.1:
        del content[rng.randrange(len(content)) :]
    return bytes(content)


def fuzz(folder: Path, num_inputs: int, seed: int) -> tuple[int, int]:
    """How many inputs were shown, and how many refused; anything else is raised."""
    rng = random.Random(seed)
    shown = refused = 0
    for number in range(num_inputs):
        (folder / "status.json").write_bytes(mutated(rng))
        try:
            status_command(str(folder), as_json=number % 2 == 0, run=OddSlurm(rng))
            shown += 1
        except OutputError:
            refused += 1
    return shown, refused


def test_mutated_files_and_odd_answers_of_slurm_end_in_no_foreign_exception(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, refused = fuzz(tmp_path, NUM_FUZZED, seed=9)
    assert shown > NUM_FUZZED / 3
    assert refused > NUM_FUZZED / 50
    capsys.readouterr().out.encode("utf-8")  # can be printed
