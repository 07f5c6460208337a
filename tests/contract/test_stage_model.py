"""Staging: what lands in the folder is what the source holds, whatever ended an attempt before."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from mpipipe.checkpoint.index import read_index
from mpipipe.checkpoint.spec import read_spec
from mpipipe.checkpoint.staged import MANIFEST_NAME, UNFINISHED_NAME
from mpipipe.errors import CheckpointError, OutputError, StoppedError, UnsupportedModelError
from mpipipe.staging import pieces
from mpipipe.staging.record import Conversion, partial_path, read_record
from mpipipe.staging.stage import StagingOutcome, StagingRequest, stage_model, verify_folder
from tests.contract.checkpoint_cases import (
    FORMS,
    make_model,
    rewrite_bin,
    save_bin,
    save_safetensors,
    save_sharded_bin,
    save_sharded_safetensors,
)
from tests.contract.staging_view import SilentView

COMMAND = "mpipipe stage-model SRC DST"
SHARD_BYTES = 4000


def stage(
    source: Path, destination: Path, *, stop_after: int | None = None, **conversion: object
) -> StagingOutcome:
    request = StagingRequest(str(source), destination, Conversion(**conversion), COMMAND)  # type: ignore[arg-type]
    return stage_model(request, SilentView(stop_after))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in read_index(folder).files:
        found |= load_file(path)
    return found


def saved(tmp_path: Path, family: str, form: Callable[[PreTrainedModel, Path], Path]) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    form(make_model(family), folder)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "LICENSE.txt").write_text("as you like")
    (folder / "notes.txt").write_text("mine")
    return folder


# ---- what lands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "opt"])
@pytest.mark.parametrize("shard_bytes", [None, SHARD_BYTES])
def test_every_tensor_arrives_in_every_form(
    form: str, family: str, shard_bytes: int | None, tmp_path: Path
) -> None:
    source = saved(tmp_path, family, FORMS[form])
    staged = tmp_path / "staged"
    outcome = stage(source, staged, shard_bytes=shard_bytes)
    wanted = make_model(family).state_dict()
    found = tensors_of(staged)
    tied = {"lm_head.weight"} if "tied" in family or family == "opt" else set()
    assert wanted.keys() - found.keys() <= tied
    assert found.keys() <= wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
    assert len(read_index(staged).files) > 1 or shard_bytes is None
    assert (staged / "tokenizer.model").read_bytes() == b"pieces"
    assert (staged / "LICENSE.txt").exists()
    assert outcome.left_out == ("notes.txt",)
    assert read_spec(staged) == read_spec(source)
    verify_folder(staged, SilentView())


def test_safetensors_files_are_copied_as_they_are(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_sharded_safetensors)
    stage(source, tmp_path / "staged")
    names = {path.name for path in source.iterdir()} - {"notes.txt"}
    assert {path.name for path in (tmp_path / "staged").iterdir()} == {*names, MANIFEST_NAME}
    for name in names:
        assert (tmp_path / "staged" / name).read_bytes() == (source / name).read_bytes()


def test_a_shared_tensor_of_a_bin_file_is_stored_once(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama-tied", save_bin)
    assert "lm_head.weight" in torch.load(source / "pytorch_model.bin", weights_only=True)
    stage(source, tmp_path / "staged")
    assert "lm_head.weight" not in tensors_of(tmp_path / "staged")


def test_a_head_that_is_not_the_embedding_stays(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama-tied", save_bin)
    rewrite_bin(source, lambda state: {**state, "lm_head.weight": state["lm_head.weight"] + 1})
    stage(source, tmp_path / "staged")
    assert "lm_head.weight" in tensors_of(tmp_path / "staged")


@pytest.mark.parametrize("form", [save_bin, save_safetensors])
def test_bfloat16_is_kept(form: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    model = make_model("llama", torch.bfloat16)
    form(model, source)
    stage(source, tmp_path / "staged", shard_bytes=SHARD_BYTES)
    found = tensors_of(tmp_path / "staged")
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor)


def test_another_dtype_is_made_and_said(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    stage(source, tmp_path / "staged", dtype="bfloat16")
    found = tensors_of(tmp_path / "staged")
    for name, tensor in make_model("llama").state_dict().items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16))
    config = json.loads((tmp_path / "staged/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    assert config["hidden_size"] == 16


def test_a_value_that_the_dtype_does_not_hold_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_bin)
    rewrite_bin(source, lambda state: {**state, "model.norm.weight": torch.full((16,), 1e6)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values up to 1e\+06"):
        stage(source, tmp_path / "staged", dtype="float16")


# ---- going on ------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    first = stage(source, tmp_path / "staged")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "staged").iterdir()}
    second = stage(source, tmp_path / "staged")
    assert (first.num_written, second.num_written) == (len(first.record.files), 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "staged").iterdir()} == before


@pytest.mark.parametrize("form", [save_sharded_safetensors, save_sharded_bin])
@pytest.mark.parametrize("stop_after", [1, 6000, 14000])
def test_a_broken_copy_goes_on_and_keeps_what_is_complete(
    form: Callable[..., Path], stop_after: int, tmp_path: Path
) -> None:
    source = saved(tmp_path, "llama", form)
    staged = tmp_path / "staged"
    with pytest.raises(StoppedError):
        stage(source, staged, stop_after=stop_after, shard_bytes=SHARD_BYTES)
    with pytest.raises(CheckpointError, match=rf"is not finished \(\d+ of \d+ files.*{COMMAND}"):
        read_spec(staged)
    record = read_record(staged)
    assert record is not None
    assert record.finished_at is None
    times = {name: (staged / name).stat().st_mtime_ns for name in record.files}
    outcome = stage(source, staged, shard_bytes=SHARD_BYTES)
    assert outcome.num_kept == len(record.files)
    assert {name: (staged / name).stat().st_mtime_ns for name in record.files} == times
    assert outcome.num_kept + outcome.num_written == len(outcome.record.files)
    whole = tmp_path / "whole"
    stage(source, whole, shard_bytes=SHARD_BYTES)
    for path in whole.iterdir():
        if path.name != MANIFEST_NAME:
            assert (staged / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (staged / UNFINISHED_NAME).exists()
    assert not list(staged.glob("*.partial"))


def test_a_kept_file_that_was_damaged_is_written_anew(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    staged = tmp_path / "staged"
    with pytest.raises(StoppedError):
        stage(source, staged, stop_after=15000, shard_bytes=SHARD_BYTES)
    (damaged,) = staged.glob("model-00001-*.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    stage(source, staged, shard_bytes=SHARD_BYTES)
    verify_folder(staged, SilentView())


def test_what_a_killed_copy_left_half_written_is_removed(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    staged = tmp_path / "staged"
    with pytest.raises(StoppedError):
        stage(source, staged, stop_after=1)
    half_written = partial_path(staged / "model.safetensors")
    half_written.write_bytes(b"half")
    (staged / "model.partial").write_bytes(b"the user's own")
    (staged / "config.json").write_text("a name without a record")
    stage(source, staged)
    assert not half_written.exists()
    assert (staged / "model.partial").read_bytes() == b"the user's own"
    assert (staged / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_copy_elsewhere_of_the_same_files_is_the_same_source(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    stage(source, tmp_path / "staged")
    shutil.copytree(source, tmp_path / "moved", copy_function=shutil.copyfile)
    assert stage(tmp_path / "moved", tmp_path / "staged").num_written == 0


# ---- refused -------------------------------------------------------------------------------------


def test_another_model_in_the_folder_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    stage(source, tmp_path / "staged")
    before = (tmp_path / "staged/model.safetensors").read_bytes()
    model = make_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    save_safetensors(model, source)
    with pytest.raises(OutputError, match=r"not of .* as it is now \(its model\.safetensors"):
        stage(source, tmp_path / "staged")
    assert (tmp_path / "staged/model.safetensors").read_bytes() == before


def test_other_options_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    stage(source, tmp_path / "staged")
    with pytest.raises(OutputError, match=r"with no options, and --dtype bfloat16 is asked for"):
        stage(source, tmp_path / "staged", dtype="bfloat16")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"did not put there \(thesis\.tex\)"):
        stage(source, staged)
    assert [path.name for path in staged.iterdir()] == ["thesis.tex"]


def test_the_folder_itself_is_no_destination(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    before = sorted(source.iterdir())
    with pytest.raises(OutputError, match="is where the model is already"):
        stage(source, source)
    assert sorted(source.iterdir()) == before


def cut_shard(folder: Path) -> None:
    path = read_index(folder).files[1]
    os.truncate(path, path.stat().st_size - 7)


def lose_shard(folder: Path) -> None:
    read_index(folder).files[1].unlink()


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("form", [save_sharded_safetensors, save_sharded_bin])
@pytest.mark.parametrize(
    ("damage", "words"),
    [(cut_shard, "cut off"), (lose_shard, "weight files"), (lose_config, "no config.json")],
)
def test_a_source_that_is_not_whole_leaves_nothing_behind(
    form: Callable[..., Path], damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    source = saved(tmp_path, "llama", form)
    damage(source)
    with pytest.raises(CheckpointError, match=words):
        stage(source, tmp_path / "staged")
    assert not (tmp_path / "staged").exists()


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("must_not_be_there",)


def test_a_bin_file_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = saved(tmp_path, "llama", save_bin)
    torch.save({"weight": Code()}, source / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="could run code"):
        stage(source, tmp_path / "staged")
    assert not (tmp_path / "must_not_be_there").exists()
    assert not (tmp_path / "staged").exists()


def test_a_family_that_cannot_run_is_refused_before_a_byte_is_copied(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="mamba"):
        stage(source, tmp_path / "staged")
    assert not (tmp_path / "staged").exists()


# ---- hashes --------------------------------------------------------------------------------------


def test_sums_that_do_not_fit_stop_the_copy_of_that_file(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    (source / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has the sha256.*SHA256SUMS"):
        stage(source, tmp_path / "staged")
    assert not (tmp_path / "staged/model.safetensors").exists()


def test_a_listed_file_that_did_not_arrive_is_missed(tmp_path: Path) -> None:
    source, own = saved(tmp_path, "llama", save_safetensors), tmp_path / "own"
    sums = "".join(f"{'0' * 64}  {name}\n" for name in ("notes.doc", "tokenizer.json", "x.h5"))
    (source / "SHA256SUMS").write_text(sums)
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.json, which SHA256SUMS lists"):
        stage(source, tmp_path / "staged")
    assert not (tmp_path / "staged").exists()
    own.mkdir()
    (own / "tokenizer.json").write_text("{}")
    (own / "SHA256SUMS").write_text(f"{'0' * 64}  merges.txt\n")
    with pytest.raises(CheckpointError, match=r"own lacks merges\.txt, which SHA256SUMS lists"):
        stage(source, tmp_path / "staged", tokenizer=str(own))
    (own / "SHA256SUMS").unlink()
    stage(source, tmp_path / "staged", tokenizer=str(own))
    (tmp_path / "staged/tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.json, which its manifest lists"):
        stage(tmp_path / "staged", tmp_path / "second")


def test_a_bin_file_is_compared_with_its_sum_before_it_is_converted(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_bin)
    (source / "SHA256SUMS").write_text(f"{'0' * 64} *pytorch_model.bin\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin has the sha256"):
        stage(source, tmp_path / "staged")
    assert not list((tmp_path / "staged").glob("*.safetensors"))


def test_a_staged_folder_is_a_source_whose_hashes_are_known(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    stage(source, tmp_path / "first")
    stage(tmp_path / "first", tmp_path / "second")
    weights = tmp_path / "first/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="its manifest says"):
        stage(tmp_path / "first", tmp_path / "third")
    with pytest.raises(CheckpointError, match=r"1 of the \d+ files .*model\.safetensors"):
        verify_folder(tmp_path / "first", SilentView())


def test_a_disk_that_returns_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path, "llama", save_safetensors)

    def faulty(path: Path, took: Callable[[int], object]) -> str:
        return "f" * 64

    monkeypatch.setattr(pieces, "file_hash", faulty)
    with pytest.raises(OutputError, match="does not read back as it was written"):
        stage(source, tmp_path / "staged")


# ---- no room -------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    monkeypatch.setattr("mpipipe.staging.stage.free_bytes", lambda _: 1000)
    with pytest.raises(OutputError, match=r"0\.00 GB free, and 0\.0\d GB are still"):
        stage(source, tmp_path / "staged")
    assert not (tmp_path / "staged").exists()


def test_a_disk_that_fills_up_keeps_what_is_complete(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    staged = tmp_path / "staged"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        with pytest.raises(OutputError, match=r"File too large.*files that are complete are kept"):
            stage(source, staged)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(staged.glob("*.partial"))
    assert stage(source, staged).num_kept > 0


def test_a_destination_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", save_safetensors)
    (tmp_path / "file").write_text("")
    for destination in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(OutputError, match="file"):
            stage(source, destination)
