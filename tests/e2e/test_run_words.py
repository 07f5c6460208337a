"""`mpipipe run MODEL PROMPTS`: no configuration file, and prompts that come through a pipe."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import LIMIT_S, ROOT, mpiexec, read_jsonl


def piped(
    num_ranks: int, prompts: bytes, model: Path, *words: str
) -> subprocess.CompletedProcess[bytes]:
    """`mpipipe run MODEL - WORDS…` with `prompts` on standard input."""
    launch = mpiexec(num_ranks) if num_ranks else []
    return subprocess.run(
        [*launch, sys.executable, "-m", "mpipipe", "run", str(model), "-", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input=prompts,
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_standard_input_is_read_by_rank_0_and_a_resumed_run_knows_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    prompts = b'{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": \n{"prompt": "y"}\n'
    words = [f"output.dir={tmp_path / 'run'}", "generation.max_new_tokens=3"]
    first = piped(2, prompts, tiny_model, *words)
    assert first.returncode == 4, first.stderr
    records = read_jsonl(tmp_path / "run" / "completions.jsonl")
    assert [(record["id"], record["finish_reason"]) for record in records] == [
        ("a", "length"),
        ("b", "error"),
        ("3", "length"),
    ]
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
    command = [sys.executable, "-m", "mpipipe", "run", str(tiny_model), str(path)]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, timeout=LIMIT_S, check=False
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{tiny_model.name}-")
    assert [record["id"] for record in read_jsonl(folder / "completions.jsonl")] == ["a"]
