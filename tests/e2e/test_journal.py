"""What becomes of a run whose files others touch: complete, or an exit code that says so."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import LIMIT_S, launched, read_jsonl, run
from tests.e2e.warm_server import warm_python

NUM_PROMPTS = 150


@pytest.fixture
def job(tiny_config: Path, tiny_model: Path, tmp_path: Path) -> list[str]:
    """Most prompts are left after the first completions; the model may be changed."""
    prompts, model = tmp_path / "many.jsonl", tmp_path / "model"
    lines = [{"id": f"p{i}", "prompt": f"prompt {i}"} for i in range(NUM_PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(tiny_model, model)
    return [
        f"prompts.path={prompts}", f"model.path={model}", "generation.max_new_tokens=60",
        "generation.ignore_eos=true",
    ]  # fmt: skip


def test_a_journal_that_is_removed_and_damaged_and_weights_that_are_others(
    job: list[str], tiny_config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    journal = folder / "completions_rank_0.jsonl"
    held = f"held:*:{journal}"  # each step sleeps from the first completion until that is gone
    rank = [*warm_python(), "-m", "tests.slowed.slowed_rank", "run", str(tiny_config)]
    with launched([*rank, f"output.dir={folder}", *job], SLOWED=held) as process:
        until = time.monotonic() + LIMIT_S
        while not has_content(journal) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        journal.unlink()
        _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, stderr
    assert "was replaced, cut or removed" in stderr
    complete = read_jsonl(folder / "completions.jsonl")
    assert [record["id"] for record in complete] == [f"p{i}" for i in range(NUM_PROMPTS)]

    written_again = folder / "completions_rank_0.2.jsonl"
    lines = written_again.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"length", b"lengtg")
    damaged = lines[3] + b'{"id": "of another run"}\n' + b"[" * 5000 + b"\n"
    written_again.write_bytes(b"".join(lines[:3]) + damaged + b"".join(lines[4:]))
    resumed = run(0, tiny_config, folder, *job, "output.resume=true")
    assert resumed.exit_code == 0, resumed.stderr
    assert "3 lines of completions_rank_*.jsonl were damaged" in resumed.stderr
    assert (folder / "damaged_rank_0.2.jsonl").read_bytes() == damaged
    text = [(record["id"], record["text"]) for record in complete]
    assert [(record["id"], record["text"]) for record in resumed.completions()] == text
    requests = resumed.json("metrics.json")["requests"]
    assert (requests["num_kept"], requests["num_completed"]) == (NUM_PROMPTS - 1, 1)

    # Nothing is left to do: the figures stay those of the attempt that finished the run.
    figures = resumed.json("metrics.json")
    again = run(0, tiny_config, folder, *job, "output.resume=true")
    assert again.exit_code == 0, again.stderr
    metrics = again.json("metrics.json")
    assert len(metrics["attempts"]) == len(figures["attempts"]) + 1
    changed = {name for name in figures if metrics[name] != figures[name]}
    assert changed == {"attempts", "total"}

    model = tmp_path / "model"
    (written_again).write_bytes(b"".join(lines[5:]))  # as if it had been stopped
    model.rename(tmp_path / "elsewhere")
    moved = f"model.path={tmp_path / 'elsewhere'}"
    weights = tmp_path / "elsewhere" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    original = weights.read_bytes()
    save_file(tensors, weights, metadata={"format": "pt"})
    other = run(0, tiny_config, folder, *job, moved, "output.resume=true")
    assert other.exit_code == 2
    assert "the model's weights are others now (model.safetensors differ)" in other.stderr
    weights.write_bytes(original)
    same = run(0, tiny_config, folder, *job, moved, "output.resume=true")
    assert same.exit_code == 0, same.stderr
    assert [(record["id"], record["text"]) for record in same.completions()] == text


def has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
