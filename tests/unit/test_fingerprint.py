"""Whether two model folders are told apart, and by how many reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpipipe.checkpoint import fingerprint as module
from mpipipe.checkpoint.fingerprint import digest_files, model_fingerprint
from mpipipe.errors import CheckpointError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    (folder / "README.md").write_text("of no consequence")
    save_file({"a": np.arange(1000, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def read(folder: Path, *, has_code: bool = False) -> dict[str, dict[str, str]]:
    return model_fingerprint(folder, folder, has_weights=True, has_code=has_code)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


CHANGES: list[tuple[str, Callable[[Path], object]]] = [
    ("the model's weights", lambda folder: flip(folder / "model.safetensors", 2000)),
    ("the model's config.json", lambda folder: flip(folder / "config.json", 3)),
    (
        "the model's generation_config.json",
        lambda folder: (folder / "generation_config.json").write_text("{}"),
    ),
    ("the tokenizer", lambda folder: flip(folder / "tokenizer.json", 3)),
    ("the tokenizer", lambda folder: (folder / "special_tokens_map.json").write_text("{}")),
    ("the tokenizer", lambda folder: (folder / "tokenizer_config.json").unlink()),
    ("the tokenizer", lambda folder: (folder / "spiece.model").touch()),
    ("the chat templates", lambda folder: (folder / "chat_template.jinja").write_text("{{ x }}")),
    ("the chat templates", lambda folder: make(folder / "additional_chat_templates" / "a.jinja")),
]


def make(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("{{ x }}")


@pytest.mark.parametrize(("part", "change"), CHANGES)
def test_the_part_that_differs_is_known(
    part: str, change: Callable[[Path], object], model: Path
) -> None:
    before = read(model)
    change(model)
    after = read(model)
    assert [name for name in before if before[name] != after[name]] == [part]


def test_neither_place_nor_time_nor_other_files_count(model: Path, tmp_path: Path) -> None:
    before = read(model)
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy)
    os.utime(copy / "model.safetensors", (0, 0))
    (copy / "README.md").write_text("another")
    (copy / "modeling.py").write_text("of code that is not run")
    assert read(copy) == before
    assert read(copy, has_code=True)["the model's code"].keys() == {"modeling.py"}


def test_random_weights_need_no_files(model: Path) -> None:
    (model / "model.safetensors").unlink()
    parts = model_fingerprint(model, model, has_weights=False, has_code=False)
    assert parts["the model's weights"] == {}
    with pytest.raises(CheckpointError, match="has no weights"):
        read(model)


def test_a_large_file_is_sampled_with_few_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model-00001-of-00008.safetensors"
    size = 2 * 1024**3
    with path.open("wb") as file:
        file.truncate(size)  # sparse: no bytes on the disk
    reads: list[tuple[int, int]] = []
    pread = os.pread

    def count(descriptor: int, num_bytes: int, offset: int) -> bytes:
        reads.append((offset, num_bytes))
        return pread(descriptor, num_bytes, offset)

    monkeypatch.setattr(os, "pread", count)
    (before,) = digest_files([path], sampled=True).values()
    assert len(reads) <= 40
    assert sum(num_bytes for _, num_bytes in reads) < 1024**2
    assert max(offset + num_bytes for offset, num_bytes in reads) == size
    for where in (8, reads[5][0], reads[-2][0] + 4095, size - 1):
        flip(path, where)
        (after,) = digest_files([path], sampled=True).values()
        assert after != before
        flip(path, where)
    os.truncate(path, size + 1)
    assert digest_files([path], sampled=True) != {path.name: before}


def test_a_file_at_the_limit_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(module._WHOLE_BYTES))
    before = digest_files([path], sampled=True)
    flip(path, module._WHOLE_BYTES // 2 + 12345)
    assert digest_files([path], sampled=True) != before


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        digest_files([tmp_path / "gone"])
