"""Files that are no JSON lines, and those that are compressed or come through a pipe."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import sys
import threading
from pathlib import Path

import pytest
import zstandard

from mpipipe.config import prompt_file
from mpipipe.config.files import parse_json
from mpipipe.config.prompt_file import prompts_hash
from mpipipe.config.prompts import PromptLine, read_prompts
from mpipipe.config.schema import GenerationConfig
from mpipipe.errors import ConfigError

TWO = b'{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "y"}\n'
PRETTY = b'{\n  "id": "a",\n  "prompt": "x"\n}\n'


def read(folder: Path, raw: bytes, name: str = "p.jsonl") -> list[PromptLine]:
    path = folder / name
    path.write_bytes(raw)
    return read_prompts(path, GenerationConfig())


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"", "holds no prompts"),
        (b"\n \n", "holds no prompts"),
        (b"id,prompt\n1,hello\n2,world\n", "table such as CSV"),
        (b'id\tprompt\n1\t"hello"\n', "table such as CSV"),
        (b'[{"prompt": "x"}, {"prompt": "y"}]', "one JSON array"),
        (b'[\n{"prompt": "x"},\n{"prompt": "y"}\n]\n', "one JSON array"),
        (b'["x", "y"]\n', "one JSON array"),
        (b'[\n  "x",\n  "y"\n]\n', "one JSON array"),
        (b'[\n  {\n    "prompt": "x"\n', "no line that is a JSON object"),
        (b'[\n{"prompt": "x"},\n{"prompt": "y"},\n{"pro', "no line that is a JSON object"),
        (b'[\n{"prompt": "x"},\n{"prompt": },\n{"prompt": "y"}\n]', "one JSON array"),
        (PRETTY, "one JSON object over several lines"),
        (PRETTY + PRETTY, "no line that is a JSON object"),
        (b"{'prompt': 'x'}\n{'prompt': 'y'}\n", "no line that is a JSON object"),
        (b"- prompt: x\n- prompt: y\n", "no line that is a JSON object"),
        (b"1\n2\n3\n", "no line that is a JSON object"),
        (b"PAR1\x15\x04\x15", "Parquet"),
        (b"PK\x03\x04rest", "zip"),
        (b"BZh91AY", "bunzip2"),
        (TWO.decode().encode("utf-16"), "UTF-16"),
        (TWO.decode().encode("utf-16-le"), "UTF-16"),
        (TWO.decode().encode("utf-16-be"), "UTF-16"),
        (TWO.decode().encode("utf-32"), "UTF-32"),
        (TWO.decode().encode("utf-32-le"), "UTF-32"),
        (TWO.decode().encode("utf-32-be"), "UTF-32"),
        (TWO.replace(b"\n", b"\r"), "CR alone"),
        (TWO.replace(b"\n", b"\r").strip(), "CR alone"),
        (bytes(range(128, 256)) * 9 + b"\n" + bytes(range(20)) * 9, "binary"),
        (gzip.compress(TWO, mtime=0), "ends in .gz"),
        (zstandard.ZstdCompressor().compress(TWO), "ends in .zst"),
    ],
)
def test_a_mistake_of_the_whole_file_is_one_sentence_about_it(
    tmp_path: Path, raw: bytes, part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, raw)
    assert part in str(caught.value)
    assert "p.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [b"id,prompt", b"[", b"{", b'[{"prompt": "x"}]', b"\xff\xfe\xfd", b"\0\0\0", b'{"prompt": "x',
     b"just text", b"3", b"\x00\x01\x02" * 50, b"{'prompt': 'x'}"],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_line_among_good_ones_is_its_own_error(
    tmp_path: Path, bad: bytes, first: bool
) -> None:
    if first and bad.startswith(b"\xff\xfe"):
        return  # the mark of a UTF-16 file
    found = read(tmp_path, bad + b"\n" + TWO if first else TWO + bad)
    assert [line.error is None for line in found].count(False) == 1
    assert {"a", "b"} < {line.prompt_id for line in found}


def test_a_file_of_nothing_but_cut_lines_is_error_records(tmp_path: Path) -> None:
    found = read(tmp_path, b'{"id": 1, "prompt": "x\n{"id": 2, "prompt\n')
    assert [(line.prompt_id, line.error is None) for line in found] == [("1", False), ("2", False)]


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("p.jsonl.gz", gzip.compress(TWO, mtime=0)),
        ("p.jsonl.gz", gzip.compress(TWO[:27], mtime=0) + gzip.compress(TWO[27:], mtime=0)),
        ("p.gz", gzip.compress(b"\xef\xbb\xbf" + TWO, mtime=0)),
        ("p.jsonl.zst", zstandard.ZstdCompressor().compress(TWO)),
        (
            "p.jsonl.zst",
            zstandard.ZstdCompressor().compress(TWO[:27])
            + zstandard.ZstdCompressor().compress(TWO[27:]),
        ),
    ],
)
def test_compressed_files_are_read(tmp_path: Path, name: str, raw: bytes) -> None:
    assert [line.prompt_id for line in read(tmp_path, raw, name)] == ["a", "b"]
    assert prompts_hash(tmp_path / name) == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl.zst"])
def test_damaged_compressed_files_are_a_sentence(tmp_path: Path, name: str) -> None:
    pack = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor().compress
    whole = pack(random.Random(0).randbytes(300).hex().encode())
    torn = (whole[:-1], whole[: len(whole) // 2], whole[:6], whole + b"tail")
    for raw in (*torn, whole[:40] + b"\xff" * 20 + whole[60:]):
        with pytest.raises(ConfigError, match=r"truncated|binary|no line"):
            read(tmp_path, raw, name)
    with pytest.raises(ConfigError, match="not compressed as its name says"):
        read(tmp_path, TWO, name)


def test_a_file_that_unpacks_without_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_file, "_LARGE_BYTES", 1 << 20)
    for name, pack in (("p.gz", gzip.compress), ("p.zst", zstandard.ZstdCompressor().compress)):
        with pytest.raises(ConfigError, match="these are no prompts"):
            read(tmp_path, pack(bytes(4 << 20)), name)


def test_without_a_zstd_library_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(ConfigError, match="unzstd"):
        read(tmp_path, zstandard.ZstdCompressor().compress(TWO), "p.zst")


@pytest.mark.parametrize("raw", [TWO, gzip.compress(TWO, mtime=0)])
def test_standard_input_is_read_once_and_its_hash_is_known(
    monkeypatch: pytest.MonkeyPatch, raw: bytes
) -> None:
    prompt_file._standard_input.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    for _ in range(2):
        found = read_prompts(Path("-"), GenerationConfig())
        assert [line.prompt_id for line in found] == ["a", "b"]
    assert prompts_hash(Path("-")) == hashlib.sha256(raw).hexdigest()
    prompt_file._standard_input.cache_clear()


def test_closed_and_empty_standard_input_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_file._standard_input.cache_clear()
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="closed"):
        read_prompts(Path("-"), GenerationConfig())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ConfigError, match="standard input holds no prompts"):
        read_prompts(Path("-"), GenerationConfig())
    prompt_file._standard_input.cache_clear()


def test_a_pipe_with_a_name_is_hashed_as_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(TWO,))
    writer.start()
    assert len(read_prompts(path, GenerationConfig())) == 2
    writer.join(timeout=10)
    assert prompts_hash(path) == hashlib.sha256(TWO).hexdigest()


def test_a_repeated_key_is_found_in_linear_time() -> None:
    keys = ",".join(f'"k{n}": 1' for n in range(200_000))
    with pytest.raises(ValueError, match="'k199999' is there twice"):
        parse_json(f'{{{keys}, "k199999": 2}}')  # half an hour, when each key was counted
