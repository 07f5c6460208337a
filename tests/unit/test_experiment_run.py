"""The launches of an experiment with a scripted launcher: order, records, going on, refusals."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mpipipe.errors import ConfigError, OutputError, StoppedError
from mpipipe.experiments.folder import ExperimentFolder
from mpipipe.experiments.launch import RankLauncher
from mpipipe.experiments.record import Matrix, Record, RunSlot
from mpipipe.experiments.recording import Launched
from mpipipe.experiments.run import Launching, run_experiment
from mpipipe.experiments.verdict import judge
from mpipipe.topology.host import host_name
from tests.unit.experiment_records import a_matrix

MATRIX = a_matrix("strong", batches=(4,), repeat=2)
STARTED = "2026-01-01T00:00:00+00:00"


class ScriptedLaunches:
    """Writes what a run would leave; ends runs as `codes` says."""

    def __init__(self, **codes: int | None) -> None:
        self.names: list[str] = []
        self.commands: list[tuple[str, ...]] = []
        self.codes = codes

    def __call__(self, command: Sequence[str], log: Path, limit_s: float) -> Launched:
        folder = log.with_suffix("")
        self.names.append(folder.name)
        self.commands.append(tuple(command))
        assert not folder.exists(), "a launch finds no files of an earlier one"
        code = self.codes.get(folder.name, 0)
        folder.mkdir()
        log.write_text("")
        if code == 0:
            write_run(folder, tokens_per_s=20.0)
        elif code == 5:
            error = {"state": "failed", "error": "memory ran out (bad_alloc)"}
            (folder / "status.json").write_text(json.dumps(error))
        return Launched(tuple(command), STARTED, code, wall_s=limit_s / 2)


def write_run(folder: Path, tokens_per_s: float, **manifest: Any) -> None:
    requests = {"num_output_tokens": 8}
    metrics = {
        "output_tokens_per_s": tokens_per_s,
        "requests": requests,
        "phases": {"generate_s": 3.0},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "manifest.json").write_text(json.dumps({"mpipipe": "0", **manifest}))
    lines = [{"id": name, "token_ids": [1, 2, 3, 4]} for name in "ab"]
    (folder / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class View:
    def __init__(self) -> None:
        self.planned_cells: list[int] = []
        self.records: list[Record] = []

    def planned(self, matrix: Matrix, num_missing: int) -> None:
        self.planned_cells.append(num_missing)

    def launching(self, slot: RunSlot) -> None:
        pass

    def measured(self, record: Record, num_left: int) -> None:
        self.records.append(record)


def run(
    folder: ExperimentFolder,
    launches: ScriptedLaunches,
    matrix: Matrix = MATRIX,
    view: View | None = None,
    **options: Any,
) -> list[Record]:
    folder.keep_matrix(matrix)
    launching = Launching(RankLauncher("mpirun"), launches, **options)
    run_experiment(folder, matrix, launching, view or View())
    return folder.records()


def names(matrix: Matrix = MATRIX) -> list[str]:
    return [f"{slot.case}_r{slot.repeat}" for slot in matrix.order]


def test_every_cell_is_launched_in_order_after_a_warm_up_for_each_number_of_stages(
    tmp_path: Path,
) -> None:
    launches, folder, view = ScriptedLaunches(), ExperimentFolder(tmp_path), View()
    records = run(folder, launches, view=view)
    warm_ups, measured = launches.names[:2], launches.names[2:]
    assert {name.rpartition("_n")[2] for name in warm_ups} == {"1_r0", "2_r0"}
    assert measured == names()
    assert [record.name for record in records] == names()
    assert [record.order for record in records] == list(range(8))
    assert judge(MATRIX, records).is_sound
    assert view.planned_cells == [8]
    assert [record.name for record in view.records] == names()


def test_a_launch_says_everything_that_its_run_depends_on(tmp_path: Path) -> None:
    launches = ScriptedLaunches()
    (record, *_) = run(ExperimentFolder(tmp_path), launches)
    command = launches.commands[2]
    case = record.case
    assert command[:3] == ("mpirun", "-n", str(case.num_stages))
    assert command[6:9] == ("run", "c.toml", "generation.max_new_tokens=16")
    assert set(case.words) <= set(command)
    assert f"output.dir={tmp_path / 'runs' / record.name}" in command
    assert record.command == command
    assert (record.tokens_per_s, record.started, record.wall_s) == (20.0, STARTED, 300.0)
    assert record.run_folder == f"runs/{record.name}"


def test_the_same_command_again_runs_only_what_is_missing(tmp_path: Path) -> None:
    folder = ExperimentFolder(tmp_path)
    run(folder, ScriptedLaunches())
    before = {path: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    again = ScriptedLaunches()
    run(folder, again)
    assert again.names == []
    gone = tmp_path / "records" / "fixed-total_n2_r2.json"
    gone.unlink()
    run(folder, again)
    assert again.names == ["fixed-total_n2_r0", "fixed-total_n2_r2"]
    after = {path: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    assert after == before


def test_an_interrupted_launch_leaves_no_record_and_runs_again(tmp_path: Path) -> None:
    folder = ExperimentFolder(tmp_path)
    third = names()[2]
    with pytest.raises(StoppedError, match="same command again"):
        run(folder, ScriptedLaunches(**{third: 75}))
    assert [record.name for record in folder.records()] == names()[:2]
    again = ScriptedLaunches()
    assert len(run(folder, again)) == 8
    assert [name for name in again.names if not name.endswith("_r0")] == names()[2:]


def test_a_cell_that_fails_is_a_result_and_the_others_go_on(tmp_path: Path) -> None:
    endings = {names()[0]: 5, names()[1]: None, names()[2]: 1}
    folder = ExperimentFolder(tmp_path)
    records = run(folder, ScriptedLaunches(**endings))
    outcomes = [record.outcome for record in records]
    assert outcomes[:4] == ["out_of_memory", "timeout", "failed", "ok"]
    assert "bad_alloc" in records[0].reason
    assert [record.exit_code for record in records[:3]] == [5, None, 1]
    assert not judge(MATRIX, records).is_sound
    again = ScriptedLaunches()
    run(folder, again)
    assert again.names == []


def test_a_launch_that_leaves_no_evidence_has_failed(tmp_path: Path) -> None:
    class Unproved(ScriptedLaunches):
        def __call__(self, command: Sequence[str], log: Path, limit_s: float) -> Launched:
            launched = super().__call__(command, log, limit_s)
            folder = log.with_suffix("")
            if folder.name == names()[0]:
                (folder / "completions.jsonl").unlink()
            if folder.name == names()[1]:
                write_run(folder, tokens_per_s=0.0)
            if folder.name == names()[2]:
                (folder / "completions.jsonl").write_text('{"id": "a", "token_ids": null}\n')
            return launched

    records = run(ExperimentFolder(tmp_path), Unproved())
    assert [record.outcome for record in records[:4]] == ["failed"] * 3 + ["ok"]
    assert [record.reason.split(" ")[3] for record in records[:3]] == [
        "completions",
        "throughput",
        "completions",
    ]
    assert not judge(MATRIX, records).is_sound


def test_another_experiment_in_the_folder_is_refused_by_what_differs(tmp_path: Path) -> None:
    folder = ExperimentFolder(tmp_path)
    run(folder, ScriptedLaunches())
    other = dataclasses.replace(MATRIX, settings={**MATRIX.settings, "model.path": "other"})
    with pytest.raises(ConfigError, match=r"model.path: m → other.*--out"):
        folder.keep_matrix(other)
    assert folder.read_matrix() == MATRIX


def test_files_of_another_version_are_refused(tmp_path: Path) -> None:
    folder = ExperimentFolder(tmp_path)
    run(folder, ScriptedLaunches())
    record = tmp_path / "records" / f"{names()[0]}.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "unknown": 1}))
    with pytest.raises(OutputError, match="remove it"):
        folder.records()
    (tmp_path / "experiment.json").write_text("{}")
    with pytest.raises(OutputError, match="--out"):
        folder.read_matrix()


def test_a_record_is_never_written_twice(tmp_path: Path) -> None:
    folder = ExperimentFolder(tmp_path)
    (record, *_) = run(folder, ScriptedLaunches())
    with pytest.raises(OutputError, match="another process"):
        folder.keep_record(record)


def test_a_case_that_another_process_runs_is_left_alone(tmp_path: Path) -> None:
    folder = ExperimentFolder(tmp_path)
    folder.keep_matrix(MATRIX)
    held = folder.lock_case("fixed-total_n2")
    theirs = tmp_path / "runs" / "fixed-total_n2_r1"
    theirs.mkdir()
    launches = ScriptedLaunches()
    process = f"the process {os.getpid()} on {host_name()}"
    with pytest.raises(OutputError, match=f"{process} runs the case fixed-total_n2 of"):
        run(folder, launches)
    assert launches.names == []
    assert theirs.is_dir()
    assert len(run(folder, launches, only_case="fixed-total_n1")) == 2  # as the tasks of an array
    held.close()
    assert len(run(folder, launches)) == 8
    assert not list((tmp_path / "runs").glob("*.lock"))


def test_the_cases_of_an_experiment_are_locked_while_it_runs(tmp_path: Path) -> None:
    refused: list[str] = []

    class Intruding(ScriptedLaunches):
        def __call__(self, command: Sequence[str], log: Path, limit_s: float) -> Launched:
            with pytest.raises(OutputError, match="runs the case") as error:
                run(ExperimentFolder(tmp_path), ScriptedLaunches())
            refused.append(str(error.value))
            return super().__call__(command, log, limit_s)

    assert len(run(ExperimentFolder(tmp_path), Intruding())) == 8
    assert len(refused) == 10


def test_folders_that_were_removed_are_made_again(tmp_path: Path) -> None:
    folder = ExperimentFolder(tmp_path)
    before = run(folder, ScriptedLaunches())
    for name in ("records", "runs"):
        shutil.rmtree(tmp_path / name)
    launches = ScriptedLaunches()
    assert run(folder, launches) == before
    assert len(launches.names) == 10


def test_what_cannot_be_kept_or_removed_has_a_remedy_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ExperimentFolder(tmp_path)
    (record, *_) = run(folder, ScriptedLaunches())
    (tmp_path / "records" / f"{record.name}.json").unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    remedy = "No space left on device.*: free space and give the same command again"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=f"written .{remedy}") as error:
            folder.keep_record(record)
    assert "output.dir" not in str(error.value)
    assert len(list((tmp_path / "records").iterdir())) == 7  # nothing half written
    monkeypatch.setattr(shutil, "rmtree", full)
    with pytest.raises(OutputError, match=f"removed .{remedy}"):
        folder.remove_run(RunSlot(record.case.name, 1))


def test_only_the_first_repeat_and_failures_keep_their_run_folders(tmp_path: Path) -> None:
    failed = next(name for name in names() if name.endswith("_r2"))
    run(ExperimentFolder(tmp_path / "a"), ScriptedLaunches(**{failed: 1}))
    kept = {path.name for path in (tmp_path / "a/runs").iterdir() if path.is_dir()}
    assert kept == {name for name in names() if name.endswith("_r1")} | {failed}
    run(ExperimentFolder(tmp_path / "b"), ScriptedLaunches(), keep_runs=True)
    assert {path.name for path in (tmp_path / "b/runs").iterdir() if path.is_dir()} == set(names())


def test_one_case_alone(tmp_path: Path) -> None:
    launches = ScriptedLaunches()
    records = run(ExperimentFolder(tmp_path), launches, only_case="fixed-total_n1")
    assert launches.names == ["fixed-total_n1_r0", "fixed-total_n1_r1", "fixed-total_n1_r2"]
    assert {record.case.name for record in records} == {"fixed-total_n1"}
