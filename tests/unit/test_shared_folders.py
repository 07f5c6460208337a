"""Whether a rank sees what the head sees: two folders stand for two nodes' views of one path."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from mpipipe.clock import MonotonicClock, ScriptedClock
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.errors import CheckpointError, OutputError
from mpipipe.progress import ProgressEngine
from mpipipe.runtime import shared_folders
from mpipipe.runtime.ranks import AgreedError, Ranks
from mpipipe.runtime.shared_folders import (
    check_output_folder,
    describe_model,
    see_model,
    see_output,
)
from mpipipe.topology.launcher import Launcher, LaunchInfo

HEADER = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)


@pytest.fixture
def head_view(tmp_path: Path) -> Path:
    folder = tmp_path / "head" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.fixture
def view(head_view: Path, tmp_path: Path) -> Path:
    """Another node's view: a copy."""
    folder = tmp_path / "other" / "model"
    shutil.copytree(head_view, folder)
    return folder


def test_equal_copies_are_as_good_as_one_folder(head_view: Path, view: Path) -> None:
    files = describe_model(head_view, with_weights=True)
    assert files.keys() == {"config.json", "model.safetensors"}
    see_model(view, files, "n0")


def test_a_folder_with_a_configuration_alone_is_compared_by_it(head_view: Path, view: Path) -> None:
    (view / "model.safetensors").unlink()
    see_model(view, describe_model(head_view, with_weights=False), "n0")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("", None, "there is no model folder"),
        ("config.json", None, "has no config.json here"),
        ("model.safetensors", None, "has no model.safetensors here"),
        ("config.json", b'{"model_type": "llamb"}', "config.json is another file"),
        ("model.safetensors", WEIGHTS[:-1], "model.safetensors is another file"),
    ],
)
def test_what_a_node_lacks_is_named(
    name: str, content: bytes | None, said: str, head_view: Path, view: Path
) -> None:
    if not name:
        shutil.rmtree(view)
    elif content is None:
        (view / name).unlink()
    else:
        (view / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as raised:
        see_model(view, describe_model(head_view, with_weights=True), "n0")
    assert str(view) in str(raised.value)
    assert "rank 0 on n0" in str(raised.value)
    assert "do not share this folder" in str(raised.value)


def test_a_run_folder_that_is_seen_late_is_waited_for(tmp_path: Path) -> None:
    clock = ScriptedClock()

    def sleep(seconds: float) -> None:
        clock.advance(seconds)
        if clock.now_s() > 5:
            (tmp_path / shared_folders._TOKEN_FILE).write_text("abc")

    see_output(tmp_path, "abc", "n0", 1, now_s=clock.now_s, sleep=sleep)
    assert 5 < clock.now_s() < 6
    assert (tmp_path / "rank_1.log").exists()


@pytest.mark.parametrize("there", [None, "another run's", b"\xff\xfe"])
def test_another_folder_of_the_same_name_is_not_the_run_folder(
    there: str | bytes | None, tmp_path: Path
) -> None:
    clock = ScriptedClock()
    if there is not None:
        content = there if isinstance(there, bytes) else there.encode()
        (tmp_path / shared_folders._TOKEN_FILE).write_bytes(content)
    with pytest.raises(OutputError, match="do not share this folder") as raised:
        see_output(tmp_path, "abc", "n0", 1, now_s=clock.now_s, sleep=clock.advance)
    assert str(tmp_path) in str(raised.value)
    assert not (tmp_path / "rank_1.log").exists()


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / shared_folders._TOKEN_FILE).write_text("abc")
    (tmp_path / "rank_1.log").mkdir()
    with pytest.raises(OutputError, match=r"rank_1\.log cannot be written"):
        see_output(tmp_path, "abc", "n0", 1)


def test_all_ranks_hear_of_the_one_that_sees_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr(shared_folders, "_SEEN_LIMIT_S", 0.0)

    async def main(folders: list[Path]) -> list[BaseException | None]:
        engine, clock, info = ProgressEngine(), MonotonicClock(), LaunchInfo(Launcher.SRUN)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(engine.run())
            ranks = []
            for channel in open_memory_channels(len(folders), engine):
                mesh = Mesh(channel, engine, clock)
                mesh.start()
                ranks.append(Ranks(mesh, engine, clock, info, tasks, "", None))
            outcomes = await asyncio.gather(
                *map(check_output_folder, ranks, folders), return_exceptions=True
            )
            polling.cancel()
        return outcomes

    assert asyncio.run(main([tmp_path, tmp_path])) == [None, None]
    assert not (tmp_path / shared_folders._TOKEN_FILE).exists()
    outcomes = asyncio.run(main([tmp_path, tmp_path, elsewhere]))
    assert [type(outcome) for outcome in outcomes] == [AgreedError] * 3
    head = outcomes[0]
    assert isinstance(head, AgreedError)
    assert head.error.exit_code == 2
    assert str(head.error).startswith("rank 2: output.dir")
    assert not (tmp_path / shared_folders._TOKEN_FILE).exists()


def test_what_the_head_tells_fits_into_json(head_view: Path) -> None:
    files = describe_model(head_view, with_weights=True)
    assert json.loads(json.dumps(files)) == files
