"""What is staged of a folder, what its hashes should be, and who may write where."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mpipipe.checkpoint.spec import require_model_folder
from mpipipe.checkpoint.staged import MANIFEST_NAME, UNFINISHED_NAME, require_finished
from mpipipe.errors import CheckpointError, OutputError
from mpipipe.run_folder.lock import lock_file
from mpipipe.staging.destination import claimed, require_same, require_space, tidy
from mpipipe.staging.expected import Digests, ExpectedHash, expected_hashes, lost_files
from mpipipe.staging.hub import HubAddress
from mpipipe.staging.hub_source import weight_names
from mpipipe.staging.record import (
    Conversion,
    FileRecord,
    SourceFile,
    StagingRecord,
    partial_path,
    read_record,
    write_record,
)
from mpipipe.staging.source import Source, chosen_names

HELLO = hashlib.sha256(b"hello").hexdigest()
# Of the same bytes, as `git hash-object` names them.
HELLO_BLOB = "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"


def record(**changes: object) -> StagingRecord:
    values: dict[str, object] = {
        "source": "/models/a",
        "revision": "",
        "conversion": Conversion(),
        "read": {"config.json": SourceFile(5, 100, HELLO), "model.safetensors": SourceFile(9, 100)},
        "num_files": 2,
        "command": "mpipipe stage-model /models/a /shared/a",
        "mpipipe_version": "1",
        "files": {"config.json": FileRecord(5, HELLO)},
    }
    return StagingRecord(**{**values, **changes})  # type: ignore[arg-type]


# ---- the choice ----------------------------------------------------------------------------------


def test_what_decides_a_completion_comes_along_and_weights_do_not() -> None:
    kept = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
            "merges.txt", "vocab.txt", "chat_template.jinja", "modeling_own.py", "LICENSE",
            "additional_chat_templates/tools.jinja", "README.md", "qwen.tiktoken"]  # fmt: skip
    others = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
              "onnx/model.onnx", "onnx/config.json", "tf_model.h5", "image.png", "x.gguf",
              MANIFEST_NAME, UNFINISHED_NAME, ".gitattributes", "training_args.bin"]  # fmt: skip
    assert chosen_names([*others, *kept]) == tuple(sorted(kept))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["pytorch_model.bin", "model.safetensors"], ["model.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "model.safetensors.index.json", "consolidated.safetensors", "pytorch_model.bin"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "model.safetensors.index.json"],
        ),
        (["pytorch_model.bin", "config.json"], ["pytorch_model.bin"]),
    ],
)  # fmt: skip
def test_one_form_of_weights_is_fetched(names: list[str], chosen: list[str]) -> None:
    assert list(weight_names(names)) == chosen


def test_a_repository_of_gguf_files_asks_for_one_of_them() -> None:
    with pytest.raises(CheckpointError, match=r"name one: …/a\.q8\.gguf"):
        weight_names(["a.q8.gguf", "config.json"])


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf:org/name", HubAddress("org/name")),
        ("hf:org/name@v1.0", HubAddress("org/name", "", "v1.0")),
        ("hf:org/name/sub/a.gguf@main", HubAddress("org/name", "sub/a.gguf", "main")),
        ("/models/hf:org/name", None),
        ("org/name", None),
    ],
)
def test_addresses_of_a_hub(text: str, address: HubAddress | None) -> None:
    assert HubAddress.parse(text) == address


@pytest.mark.parametrize(
    "text", ["hf:", "hf:name", "hf:org/name/other", "hf:org/name@", "hf:a/b@c d"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="hf:ORG/NAME"):
        HubAddress.parse(text)


# ---- hashes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", [f"{HELLO}  a.bin", f"{HELLO.upper()} *a.bin", f"# made by x\n\n{HELLO}  ./a.bin\r"]
)
def test_a_sums_file_tells_what_to_expect(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"hello")
    (tmp_path / "SHA256SUMS").write_text(f"{line}\n{'0' * 64}  gone.bin\n")
    assert expected_hashes(tmp_path) == {"a.bin": ExpectedHash("sha256", HELLO, "SHA256SUMS")}


def test_files_that_are_told_of_and_not_there_are_lost(tmp_path: Path) -> None:
    hub_download(tmp_path, HELLO, 0.5)
    write_record(tmp_path, record(finished_at="now"))
    (tmp_path / "SHA256SUMS").write_text(f"{HELLO}  a.bin\n{HELLO}  gone.json\n")
    assert lost_files(tmp_path) == {"gone.json": "SHA256SUMS", "config.json": "its manifest"}
    (tmp_path / "SHA256SUMS").unlink()
    (tmp_path / "a.bin").unlink()
    assert lost_files(tmp_path) == {"a.bin": "the hub's metadata", "config.json": "its manifest"}


def test_a_sums_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("a.bin: fine\n")
    with pytest.raises(CheckpointError, match=r"'a\.bin: fine'.*sha256sum"):
        expected_hashes(tmp_path)


def hub_download(folder: Path, etag: str, age_s: float) -> None:
    """A file as `hf download --local-dir` leaves it, `age_s` before its metadata."""
    (folder / "a.bin").write_bytes(b"hello")
    place = folder / ".cache/huggingface/download"
    place.mkdir(parents=True)
    (place / "a.bin.metadata").write_text(f"{'c' * 40}\n{etag}\n1000.0\n")
    os.utime(folder / "a.bin", (1000.0 - age_s, 1000.0 - age_s))


@pytest.mark.parametrize(("etag", "kind"), [(HELLO, "sha256"), (HELLO_BLOB, "git")])
def test_a_download_of_the_hub_tells_what_to_expect(etag: str, kind: str, tmp_path: Path) -> None:
    hub_download(tmp_path, etag, 0.5)
    expected = expected_hashes(tmp_path)["a.bin"]
    assert (expected.kind, expected.hexdigest) == (kind, etag)
    digests = Digests(tmp_path / "a.bin", 5, expected).start()
    digests.update(b"hel")
    digests.update(b"lo")
    assert digests.finish() == HELLO


def test_a_file_that_was_edited_after_the_download_is_the_users_own(tmp_path: Path) -> None:
    hub_download(tmp_path, HELLO, -60.0)
    assert expected_hashes(tmp_path) == {}


@pytest.mark.parametrize("kind", ["sha256", "git"])
def test_another_hash_is_an_error_with_both(kind: str, tmp_path: Path) -> None:
    digests = Digests(tmp_path / "a.bin", 5, ExpectedHash(kind, "0" * 40, "the hub")).start()
    digests.update(b"hello")
    found = HELLO if kind == "sha256" else HELLO_BLOB
    with pytest.raises(CheckpointError, match=f"{kind} hash {found}, and the hub says 0000"):
        digests.finish()


# ---- the record ----------------------------------------------------------------------------------


def test_an_unfinished_record_becomes_the_manifest(tmp_path: Path) -> None:
    write_record(tmp_path, record())
    assert [path.name for path in tmp_path.iterdir()] == [UNFINISHED_NAME]
    assert read_record(tmp_path) == record()
    finished = record(finished_at="2026-01-01T00:00:00+00:00")
    write_record(tmp_path, finished)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]
    assert read_record(tmp_path) == finished


def test_a_model_is_refused_until_its_copy_is_finished(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_record(tmp_path, record())
    with pytest.raises(CheckpointError, match=r"not finished \(1 of 2.*stage-model /models/a"):
        require_model_folder(tmp_path)
    (tmp_path / UNFINISHED_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="not finished: it is being made"):
        require_model_folder(tmp_path)
    write_record(tmp_path, record(finished_at="now"))
    require_model_folder(tmp_path)


def test_a_manifest_beside_the_record_ends_it(tmp_path: Path) -> None:
    (tmp_path / UNFINISHED_NAME).write_text("{}")
    (tmp_path / MANIFEST_NAME).write_text("{}")
    require_finished(tmp_path)  # killed between the last two acts


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 1}'])
def test_a_damaged_record_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=MANIFEST_NAME):
        read_record(tmp_path)


def test_what_was_read_is_noted_with_the_file() -> None:
    file = FileRecord(9, "f" * 64)
    grown = record().with_file("model.safetensors", file, {"model.safetensors": "e" * 64, "x": ""})
    assert grown.files["model.safetensors"] == file
    assert grown.read["model.safetensors"].sha256 == "e" * 64
    assert grown.read.keys() == record().read.keys()


# ---- the destination -----------------------------------------------------------------------------


def test_a_folder_is_made_and_removed_again_when_nothing_came_of_it(tmp_path: Path) -> None:
    with claimed(tmp_path / "new/model") as found:
        assert found is None
        assert (tmp_path / "new/model").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_the_user_made_stays(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name in ("own", "own/new"):
        with pytest.raises(CheckpointError), claimed(tmp_path / name):
            raise CheckpointError("no model")
    assert list(tmp_path.rglob("*")) == [tmp_path / "own"]


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    lock, held = lock_file(tmp_path / ".mpipipe-staging.lock")
    assert held
    with (
        pytest.raises(OutputError, match="another `mpipipe stage-model` writes"),
        claimed(tmp_path),
    ):
        pass
    lock.close()
    with claimed(tmp_path):
        pass


def nowhere(_: str) -> Path | None:
    return None


def source(read: dict[str, SourceFile], revision: str = "") -> Source:
    return Source("/models/a", revision, read, (), {})


@pytest.mark.parametrize(
    ("now", "is_same"),
    [
        ({"config.json": SourceFile(5, 100), "model.safetensors": SourceFile(9, 100)}, True),
        # Touched: the hash of what is known decides.
        ({"config.json": SourceFile(5, 200), "model.safetensors": SourceFile(9, 100)}, True),
        # Not read before the copy broke off: nothing of the older file is in the folder.
        ({"config.json": SourceFile(5, 100), "model.safetensors": SourceFile(9, 200)}, True),
        ({"config.json": SourceFile(6, 100), "model.safetensors": SourceFile(9, 100)}, False),
        ({"config.json": SourceFile(5, 100)}, False),
        ({**record().read, "tokenizer.json": SourceFile(1, 1)}, False),
    ],
)
def test_a_copy_goes_on_with_the_same_files_only(
    now: dict[str, SourceFile], is_same: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(b"hello")
    locate: Callable[[str], Path | None] = lambda name: tmp_path / name  # noqa: E731
    if is_same:
        require_same(tmp_path, record(), source(now), Conversion(), locate)
        return
    with pytest.raises(OutputError, match="holds a copy of /models/a, not of /models/a as it is"):
        require_same(tmp_path, record(), source(now), Conversion(), locate)


def test_a_file_of_the_same_size_with_another_hash_is_another(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"HELLO")
    now = {**record().read, "config.json": SourceFile(5, 200)}
    with pytest.raises(OutputError, match=r"its config\.json differs"):
        require_same(tmp_path, record(), source(now), Conversion(), lambda name: tmp_path / name)


def test_another_revision_or_conversion_is_refused(tmp_path: Path) -> None:
    known = record(revision="a" * 40)
    with pytest.raises(OutputError, match=r"at aaaaaaaaaaaa, .*the revision differs"):
        require_same(tmp_path, known, source(dict(known.read), "b" * 40), Conversion(), nowhere)
    with pytest.raises(OutputError, match="no options, and --shard-size 7 is asked for"):
        require_same(tmp_path, known, source(dict(known.read)), Conversion(shard_bytes=7), nowhere)


def test_leftovers_of_these_files_only_are_removed(tmp_path: Path) -> None:
    weights, thesis = tmp_path / "model.safetensors", tmp_path / "thesis.tex"
    users = ("model.partial", "config.partial")
    for path in (partial_path(weights), partial_path(thesis), *(tmp_path / n for n in users)):
        path.write_text("half")
    tidy(tmp_path, ["model.safetensors", "config.json"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {partial_path(thesis).name, *users}


def test_a_record_that_was_half_written_is_no_foreign_file(tmp_path: Path) -> None:
    partial = partial_path(tmp_path / UNFINISHED_NAME)
    partial.write_text("{")
    with claimed(tmp_path) as found:
        assert found is None
        tidy(tmp_path, [])
    assert not partial.exists()


def test_space_is_asked_for_with_some_to_spare(tmp_path: Path) -> None:
    require_space(tmp_path, 10**9, None)
    require_space(tmp_path, 10**9, 2 * 10**9)
    with pytest.raises(OutputError, match=r"1\.01 GB free, and 1\.00 GB are still to be written"):
        require_space(tmp_path, 10**9, 10**9 + 10**7)
