"""Staging from a hub: what is fetched, what is not, and what stays of it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mpipipe.checkpoint.staged import MANIFEST_NAME
from mpipipe.errors import CheckpointError, EnvironmentSetupError, OutputError, StoppedError
from mpipipe.staging import hub_source, stage
from mpipipe.staging.expected import ExpectedHash
from mpipipe.staging.hub import HubAddress, HubFile, HubListing
from mpipipe.staging.hub_source import SOURCE_FOLDER, fetched_bytes
from mpipipe.staging.record import Conversion
from mpipipe.staging.stage import StagingOutcome, StagingRequest, stage_model, verify_folder
from tests.contract.checkpoint_cases import (
    make_model,
    save_bin,
    save_safetensors,
    save_sharded_bin,
    save_sharded_safetensors,
)
from tests.contract.staging_view import SilentView

ADDRESS = "hf:org/name"
KEPT, HALVED = Conversion(), Conversion(dtype="float16")
CONVERTED = pytest.mark.parametrize(
    ("form", "conversion"),
    [(save_safetensors, KEPT), (save_bin, KEPT), (save_safetensors, HALVED)],
)


class FolderHub:
    """A folder in the place of a hub: notes what is fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit = "a" * 40
        self.num_parameters = 0
        self.fetched: list[str] = []
        self.listed = 0
        self.damaged = ""

    def list_model(self, _: HubAddress) -> HubListing:
        """As `hub.list_model`."""
        self.listed += 1
        files = {path.name: self._file(path) for path in self.folder.iterdir()}
        return HubListing(self.commit, files, self.num_parameters)

    def fetch_file(
        self,
        _: HubAddress,
        commit: str,
        name: str,
        folder: Path,
        took: Callable[[int], object],
    ) -> Path:
        """As `hub.fetch_file`: a file that is there is not fetched again."""
        assert commit == self.commit
        if not (folder / name).exists():
            self.fetched.append(name)
            folder.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)
            if name == self.damaged:
                (folder / name).write_bytes(bytes((folder / name).stat().st_size))
            took((folder / name).stat().st_size)
        return folder / name

    @staticmethod
    def _file(path: Path) -> HubFile:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return HubFile(path.stat().st_size, ExpectedHash("sha256", sha256, "the hub"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    """Of an empty folder."""
    (tmp_path / "hub").mkdir()
    hub = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(hub_source, "list_model", hub.list_model)
    monkeypatch.setattr(hub_source, "fetch_file", hub.fetch_file)
    return hub


def from_hub(
    destination: Path,
    conversion: Conversion = KEPT,
    *,
    at: str = "",
    stop_after: int | None = None,
) -> StagingOutcome:
    address = ADDRESS + (f"@{at}" if at else "")
    request = StagingRequest(address, destination, conversion, "")
    return stage_model(request, SilentView(stop_after))


def save(form: Callable[..., Path], hub: FolderHub) -> None:
    form(make_model("llama"), hub.folder)
    (hub.folder / "tokenizer.model").write_bytes(b"pieces")


@CONVERTED
def test_a_second_command_fetches_nothing(
    form: Callable[..., Path], conversion: Conversion, hub: FolderHub, tmp_path: Path
) -> None:
    save(form, hub)
    staged = tmp_path / "staged"
    assert from_hub(staged, conversion).num_written > 0
    assert not (staged / SOURCE_FOLDER).exists()
    hub.fetched.clear()
    (staged / SOURCE_FOLDER).mkdir()  # as an earlier version left it
    assert from_hub(staged, conversion).num_written == 0
    assert hub.fetched == []
    assert not (staged / SOURCE_FOLDER).exists()


@pytest.mark.parametrize(("revision", "listed"), [("", 1), ("a" * 40, 0)])
@pytest.mark.parametrize("form", [save_sharded_safetensors, save_sharded_bin])
def test_a_file_that_is_gone_is_written_again(
    form: Callable[..., Path], revision: str, listed: int, hub: FolderHub, tmp_path: Path
) -> None:
    save(form, hub)
    staged = tmp_path / "staged"
    from_hub(staged, at="a" * 40)
    hub.listed = 0
    from_hub(staged, at=revision)
    assert hub.listed == listed
    lost = next(staged.glob("model*.safetensors"))
    before = lost.read_bytes()
    lost.unlink()
    assert from_hub(staged, at=revision).num_written == 1
    assert lost.read_bytes() == before
    os.truncate(lost, 100)
    assert from_hub(staged, at=revision).num_written == 1
    verify_folder(staged, SilentView())
    assert not (staged / SOURCE_FOLDER).exists()


def test_another_commit_or_form_is_refused_before_a_byte_is_fetched(
    hub: FolderHub, tmp_path: Path
) -> None:
    save(save_bin, hub)
    staged = tmp_path / "staged"
    from_hub(staged)
    hub.fetched.clear()
    with pytest.raises(OutputError, match="--dtype float16 is asked for"):
        from_hub(staged, HALVED)
    hub.commit = "b" * 40
    (staged / SOURCE_FOLDER).mkdir()
    with pytest.raises(OutputError, match=r"at aaaaaaaaaaaa, not of hf:org/name .*the revision"):
        from_hub(staged)
    assert hub.fetched == []
    assert not (staged / SOURCE_FOLDER).exists()
    assert (staged / MANIFEST_NAME).exists()


def test_another_tokenizer_is_refused_before_a_byte_is_fetched(
    hub: FolderHub, tmp_path: Path
) -> None:
    save(save_bin, hub)
    staged, own = tmp_path / "staged", tmp_path / "own"
    own.mkdir()
    conversion = Conversion(tokenizer=str(own))
    (own / "tokenizer.json").write_text("{}")
    from_hub(staged, conversion)
    assert from_hub(staged, conversion).num_written == 0
    hub.fetched.clear()
    (own / "tokenizer.json").write_text("[]")
    os.utime(own / "tokenizer.json", ns=(1, 1))
    with pytest.raises(OutputError, match=r"its tokenizer\.json differs"):
        from_hub(staged, conversion)
    assert hub.fetched == []
    assert not (staged / SOURCE_FOLDER).exists()


def test_a_damaged_file_is_fetched_again_the_next_time(hub: FolderHub, tmp_path: Path) -> None:
    save(save_bin, hub)
    hub.damaged = "config.json"
    with pytest.raises(CheckpointError, match="config"):
        from_hub(tmp_path / "staged")
    assert not (tmp_path / "staged").exists()
    hub.damaged = ""
    from_hub(tmp_path / "staged")


def test_a_fetch_that_was_stopped_is_kept_and_gone_on_with(
    hub: FolderHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(save_bin, hub)
    staged = tmp_path / "staged"
    fetch = hub.fetch_file

    def lost(*arguments: object) -> Path:
        if arguments[2] == "pytorch_model.bin":
            raise EnvironmentSetupError("no network")
        return fetch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hub_source, "fetch_file", lost)
    with pytest.raises(EnvironmentSetupError):
        from_hub(staged)
    monkeypatch.setattr(hub_source, "fetch_file", fetch)
    with pytest.raises(StoppedError):
        from_hub(staged, stop_after=1)
    with pytest.raises(OutputError, match="--dtype float16 is asked for"):
        from_hub(staged, HALVED)
    from_hub(staged)
    assert sorted(hub.fetched) == sorted(set(hub.fetched))


def test_what_was_fetched_of_another_model_does_not_come_along(
    hub: FolderHub, tmp_path: Path
) -> None:
    save(save_bin, hub)
    left = tmp_path / "staged" / SOURCE_FOLDER
    left.mkdir(parents=True)
    (left / "tokenizer.json").write_text("{}")
    from_hub(tmp_path / "staged")
    assert not (tmp_path / "staged/tokenizer.json").exists()


@CONVERTED
def test_space_for_fetch_and_copy_is_asked_for_before_the_fetch(
    form: Callable[..., Path],
    conversion: Conversion,
    hub: FolderHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(form, hub)
    sizes = {path.name: path.stat().st_size for path in hub.folder.iterdir()}
    weights = max(sizes.values())
    hub.num_parameters = weights // 4
    needed = sum(sizes.values()) + (weights // 2 if conversion.dtype else weights) - 2000
    asked: list[int] = []

    def too_little(_: Path, needed_bytes: int, __: int | None) -> None:
        asked.append(needed_bytes)
        raise OutputError("no space")

    monkeypatch.setattr(stage, "require_space", too_little)
    with pytest.raises(OutputError, match="no space"):
        from_hub(tmp_path / "staged", conversion)
    assert needed < asked[0] < needed + 6000
    assert hub.fetched == []
    assert not (tmp_path / "staged").exists()


def test_what_is_there_already_needs_no_space(
    hub: FolderHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(save_safetensors, hub)
    staged = tmp_path / "staged"
    from_hub(staged)
    (staged / "tokenizer.model").unlink()
    asked: list[int] = []
    monkeypatch.setattr(stage, "require_space", lambda _, needed, __: asked.append(needed))
    assert from_hub(staged).num_written == 1
    assert asked == [2 * len(b"pieces"), len(b"pieces")]
    assert fetched_bytes(staged) == 0
