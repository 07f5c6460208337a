"""What a run writes down of its input."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mpipipe.config.load import load_config
from mpipipe.job.acquire import acquire_folder
from mpipipe.job.manifest import build_manifest
from mpipipe.metrics.identity import is_run_id
from mpipipe.planning.model_facts import ModelFacts
from mpipipe.run_folder.fingerprint import completions_fingerprint
from tests.unit.test_plan import make_plan


def test_the_manifest_tells_the_input_as_it_was_read_and_not_as_it_is_by_now(
    tmp_path: Path,
) -> None:
    """Loading takes minutes. An attempt that goes on must see that the prompts are others."""
    prompts, model = tmp_path / "p.jsonl", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    prompts.write_text('{"id": "a", "prompt": "as it was"}\n')
    words = [f"prompts.path={prompts}", f"output.dir={tmp_path / 'run'}", "model.weights=random"]
    loaded = load_config(None, words)
    spec: Any = None
    facts = ModelFacts(model, spec, model, loaded)
    read = completions_fingerprint(loaded, facts, "float32")
    acquired = acquire_folder(loaded, [], read, None)
    prompts.write_text('{"id": "a", "prompt": "edited"}\n')

    session: Any = SimpleNamespace(
        plan=make_plan(), resources=(), ranks=SimpleNamespace(mpi_library="")
    )
    with closing(acquired):
        manifest = build_manifest(session, loaded, acquired)

    assert manifest["basis"] == read
    assert manifest["hashes"]["prompts"] == read["the SHA-256 of the prompts"]
    assert completions_fingerprint(loaded, facts, "float32") != read


def test_a_run_keeps_its_id_over_its_attempts_and_counts_them(tmp_path: Path) -> None:
    words = [f"output.dir={tmp_path}", "output.resume=true", "model.weights=random"]
    loaded = load_config(None, words)
    with closing(acquire_folder(loaded, [], {"a": 1}, None)) as first:
        assert is_run_id(first.run)
        identity = first.identity(rank=3, stage=1)
        assert identity.fields() == {
            "run": first.run, "attempt": 1, "job": None, "replica": 0, "rank": 3, "stage": 1,
        }  # fmt: skip
    manifest = {"basis": {"a": 1}, "run": first.run, "attempts": [{"num_kept": 0}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with closing(acquire_folder(loaded, [], {"a": 1}, None)) as second:
        assert (second.run, second.attempt) == (first.run, 2)
    # Whatever else stands there is no id: a new one is made.
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "run": ["x"]}))
    with closing(acquire_folder(loaded, [], {"a": 1}, None)) as other:
        assert is_run_id(other.run)
        assert other.run != first.run
