from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpipipe.checkpoint.index import read_index
from mpipipe.errors import CheckpointError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors(*names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((3, 4), dtype=np.float32) for name in names}


def single(folder: Path) -> Path:
    save_file(tensors("a", "b"), folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def sharded(folder: Path) -> Path:
    save_file(tensors("a", "b"), folder / SHARDS[0])
    save_file(tensors("c"), folder / SHARDS[1])
    listing = folder / "model.safetensors.index.json"
    weight_map = {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}
    listing.write_text(json.dumps({"metadata": {"total_size": 144}, "weight_map": weight_map}))
    return listing


def archive(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"x" * 100)
        file.writestr("archive/data/0", b"y" * 5000)
    return path


def raw_safetensors(path: Path, header: object, num_data_bytes: int) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_data_bytes))


def test_every_tensor_is_where_the_header_says(tmp_path: Path) -> None:
    path = single(tmp_path)
    index = read_index(tmp_path)
    assert (index.format, index.files) == ("safetensors", (path,))
    for name, array in tensors("a", "b").items():
        entry = index.tensors[name]
        content = path.read_bytes()[entry.offset : entry.offset + entry.num_bytes]
        assert (entry.dtype, entry.shape) == ("float32", (3, 4))
        assert content == array.tobytes()
    assert index.file_bytes == path.stat().st_size


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = read_index(tmp_path)
    assert [path.name for path in index.files] == list(SHARDS)
    assert {name: entry.file.name for name, entry in index.tensors.items()} == {
        "a": SHARDS[0],
        "b": SHARDS[0],
        "c": SHARDS[1],
    }


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    archive(tmp_path / "pytorch_model.bin")
    sharded(tmp_path)
    assert read_index(tmp_path).format == "safetensors"


def test_bin_files_are_found_single_and_sharded(tmp_path: Path) -> None:
    first = archive(tmp_path / "pytorch_model-00001-of-00001.bin")
    listing = tmp_path / "pytorch_model.bin.index.json"
    listing.write_text(json.dumps({"weight_map": {"a": first.name}}))
    index = read_index(tmp_path)
    assert (index.format, index.files, dict(index.shard_of)) == ("torch", (first,), {"a": first})
    whole = archive(tmp_path / "pytorch_model.bin")
    assert read_index(tmp_path).files == (whole,)


def test_a_legacy_bin_file_is_left_to_the_loader(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02\x8a\nl\xfc" + bytes(100))
    assert read_index(tmp_path).format == "torch"


@pytest.mark.parametrize("shard", SHARDS)
def test_a_missing_shard_is_named(tmp_path: Path, shard: str) -> None:
    sharded(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=f"1 of the 2 weight files .*{shard}.*copied in part"):
        read_index(tmp_path)


@pytest.mark.parametrize("make", [single, sharded])
def test_a_cut_off_file_says_how_much_is_missing(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-20])
    words = f"{path.name} is cut off: its header says {size} bytes and it has {size - 20}"
    with pytest.raises(CheckpointError, match=words):
        read_index(tmp_path)


def test_a_file_cut_inside_its_header_is_cut_off(tmp_path: Path) -> None:
    path = single(tmp_path)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(CheckpointError, match="cut off"):
        read_index(tmp_path)


def test_a_file_longer_than_its_header_says_is_broken(tmp_path: Path) -> None:
    path = single(tmp_path)
    path.write_bytes(path.read_bytes() + b"tail")
    with pytest.raises(CheckpointError, match="longer"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (LFS, "git-lfs pointer")])
def test_a_stand_in_for_a_file_is_told_from_it(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("header", "num_data_bytes"),
    [
        (b"{not json", 0),
        (b"[]", 0),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 8),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8),
        ({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}}, 8),
        ({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, 8),
        ({"a": {"dtype": "F4", "shape": [8], "data_offsets": [9, 4]}}, 4),
        ({"a": {"dtype": "F4", "shape": [8], "data_offsets": [2**63, 2**63 + 4]}}, 4),
        ({"a": 3}, 0),
    ],
)
def test_a_broken_header_is_named(tmp_path: Path, header: object, num_data_bytes: int) -> None:
    raw_safetensors(tmp_path / "model.safetensors", header, num_data_bytes)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has a broken header"):
        read_index(tmp_path)


def test_a_page_of_text_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"<!doctype html><html>not found</html>")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_index(tmp_path)


@pytest.mark.parametrize("kept", [50, 3000])
def test_a_cut_off_bin_file_is_found_without_torch(tmp_path: Path, kept: int) -> None:
    path = archive(tmp_path / "pytorch_model.bin")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=f"pytorch_model.bin is cut off: it has {kept:,} bytes"
    ):
        read_index(tmp_path)


def test_a_bin_file_that_was_compressed_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", b"y" * 5000)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is compressed.*packed anew"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "changes",  # offset in the directory's first entry → byte
    [
        {6: 0x7F},  # the version that is needed to read it
        {9: 0x08, 46: 0x80},  # its name is said to be UTF-8
    ],
)
def test_a_bin_file_whose_directory_is_damaged_is_broken(
    tmp_path: Path, changes: dict[int, int]
) -> None:
    path = archive(tmp_path / "pytorch_model.bin")
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    for offset, byte in changes.items():
        content[directory + offset] = byte
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is broken"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        ({"metadata": {}}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "expected a file name"),
        ({"weight_map": {"a": 3}}, "expected a file name"),
        ({"weight_map": {"a": "x" * 300}}, "expected a file name"),
        ({"weight_map": {"a": "x\0"}}, "expected a file name"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, listing: object, words: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(listing))
    with pytest.raises(CheckpointError, match=words):
        read_index(tmp_path)


def test_an_index_that_promises_more_than_the_shards_hold(tmp_path: Path) -> None:
    listing = sharded(tmp_path)
    content = json.loads(listing.read_text())
    content["weight_map"]["d"] = SHARDS[1]
    listing.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"first d in {SHARDS[1]}"):
        read_index(tmp_path)


def test_shards_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file(tensors("c", "a"), tmp_path / SHARDS[1])
    with pytest.raises(CheckpointError, match="both hold a"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "no weights"),
        (["config.json"], "no weights"),
        ([SHARDS[0]], "1 of 2 shards but not model.safetensors.index.json"),
        (["pytorch_model-00001-of-00003.bin"], "not pytorch_model.bin.index.json"),
        (["adapter_model.safetensors"], "LoRA adapter"),
        (["model.Q4_1.gguf"], r"not read \(model.Q4_1.gguf\)"),
    ],
)
def test_a_folder_without_weights_says_what_it_is(
    tmp_path: Path, names: list[str], words: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=words):
        read_index(tmp_path)


def test_an_unknown_element_type_is_listed_not_refused(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    raw_safetensors(tmp_path / "model.safetensors", header, 2)
    assert read_index(tmp_path).tensors["a"].dtype == "F4"


@pytest.mark.parametrize("shard", ["x" * 5000, "a\0b", "\ud800", "ü" * 200, "..", "", 7, ["a"]])
def test_an_index_that_names_no_file_is_refused(shard: object, tmp_path: Path) -> None:
    listing = tmp_path / "model.safetensors.index.json"
    listing.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError) as raised:
        read_index(tmp_path)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("offsets", [[16, 0], [True, 16], [-1, 16], [0, 1.5]])
def test_a_tensor_lies_where_one_can_lie(offsets: list[object], tmp_path: Path) -> None:
    """Also one of a type that nothing is known of, whose size follows from nothing else."""
    tensors = {
        "a": {"dtype": "F4", "shape": [2], "data_offsets": offsets},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    }
    raw_safetensors(tmp_path / "model.safetensors", tensors, 16)
    with pytest.raises(CheckpointError, match="broken header"):
        read_index(tmp_path)
