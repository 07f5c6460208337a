"""`mpipipe run MODEL PROMPTS`: no configuration file, and prompts that come through a pipe."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path

from tests.e2e.conftest import LIMIT_S, ROOT, mpipipe, read_jsonl


def piped(
    num_ranks: int, prompts: bytes, model: Path, *words: str
) -> subprocess.CompletedProcess[bytes]:
    """`mpipipe run MODEL - WORDS…` with `prompts` on standard input."""
    return subprocess.run(
        mpipipe(num_ranks, "run", str(model), "-", *words),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input=prompts,
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )


MIXED = [
    '{"id": "good", "prompt": "a good one"}',
    "{not json",
    '{"id": "good", "prompt": "the same id again"}',
    '{"id": "empty", "prompt": ""}',
    json.dumps({"id": "long", "prompt": "x" * 400}),
    '{"id": "hot", "prompt": "x", "temperature": -3}',
    '{"prompt": "another good one"}',
]


def test_standard_input_is_read_by_rank_0_and_bad_prompts_become_error_records(
    tiny_model: Path, tmp_path: Path
) -> None:
    prompts = "".join(f"{line}\n" for line in MIXED).encode()
    words = [f"output.dir={tmp_path / 'run'}", "generation.max_new_tokens=3"]
    first = piped(2, prompts, tiny_model, *words)
    assert first.returncode == 4, first.stderr
    records = read_jsonl(tmp_path / "run" / "completions.jsonl")
    kinds = {record["id"]: record.get("error", {}).get("kind") for record in records}
    assert len(kinds) == len(records) == len(MIXED)
    assert {name for name, kind in kinds.items() if kind is None} == {"good", "7"}
    assert set(kinds.values()) == {
        None,
        "invalid_json",
        "duplicate_id",
        "empty_prompt",
        "too_long",
        "invalid_sampling",
    }
    for record in records:
        failed = kinds[record["id"]] is not None
        assert record["finish_reason"] == ("error" if failed else "length")
        if kinds[record["id"]] == "invalid_json":
            assert "line 2" in record["error"]["message"]
    hashes = json.loads((tmp_path / "run" / "manifest.json").read_text())["hashes"]
    assert len(hashes["prompts"]) == 64
    again = piped(0, prompts, tiny_model, *words, "output.resume=true")
    assert again.returncode == 4, again.stderr
    other = piped(0, b'{"prompt": "z"}\n', tiny_model, *words, "output.resume=true")
    assert other.returncode == 2
    assert b"prompts" in other.stderr


def test_a_compressed_prompt_file_beside_a_model_is_enough(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": "a", "prompt": "x", "max_tokens": 2}\n'))
    command = mpipipe(0, "run", str(tiny_model), str(path), warm=False)
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, timeout=LIMIT_S, check=False
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{tiny_model.name}-")
    assert [record["id"] for record in read_jsonl(folder / "completions.jsonl")] == ["a"]
