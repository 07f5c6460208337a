"""What a run writes down of its input."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpipipe.config.load import load_config
from mpipipe.errors import OutputError
from mpipipe.job import manifest
from mpipipe.job.acquire import acquire_folder
from mpipipe.job.manifest import Surroundings, complete_manifest, first_manifest
from mpipipe.metrics.identity import is_run_id
from mpipipe.planning.layout import Place
from mpipipe.planning.model_facts import ModelFacts
from mpipipe.run_folder.files import write_json
from mpipipe.run_folder.fingerprint import PROMPTS, completions_fingerprint
from mpipipe.topology.launcher import Launcher, LaunchInfo
from mpipipe.topology.node import NodeGpu, NodeRecord
from tests.unit.planned_rank import make_rank
from tests.unit.test_plan import make_plan

SURROUNDINGS = Surroundings(
    resources=tuple(make_rank(rank, host) for rank, host in enumerate(("n1", "n1", "n2"))),
    nodes=(NodeRecord("n1", "Xeon", 8, 2**34, "6.1", (NodeGpu("T4", 2**34, "550", "G"),), ""),),
    launch=LaunchInfo(Launcher.SRUN, detail="pmix"),
    mpi_library="",
    git={"commit": "abc", "dirty": False},
    environment={"OMP_NUM_THREADS": "1"},
    findings=[{"check": "node.shm"}],
    argv=("mpipipe", "run", "x.toml"),
    started_s=500.0,
    started_unix_s=1_800_000_000.0,
)


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

    plan = make_plan()
    session: Any = SimpleNamespace(plan=plan, plans=(plan,))
    with closing(acquired):
        first = first_manifest(loaded, acquired, SURROUNDINGS)
        manifest = complete_manifest(first, session, loaded, acquired)

    assert manifest["basis"] == read
    assert manifest["hashes"]["prompts"] == read["the SHA-256 of the prompts"]
    assert completions_fingerprint(loaded, facts, "float32") != read
    assert read["model.quantize"] == "none"  # an attempt in other weights is refused
    assert first["plan"] is None
    assert manifest["plan"]["num_slots"] == make_plan().num_slots
    # Nothing is lost on the way from the first to the complete one.
    changed = {name for name in first if manifest[name] != first[name]}
    assert changed == {"basis", "config", "plan", "hashes"}


def attempt(folder: Path, words: list[str], fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The first manifest of an attempt that ends while it boots."""
    loaded = load_config(None, [f"output.dir={folder}", "output.resume=true", *words])
    with closing(acquire_folder(loaded, [], fingerprint, None)) as acquired:
        with_work = replace(acquired, done_code=None)
        manifest = first_manifest(loaded, with_work, SURROUNDINGS)
        write_json(folder / "manifest.json", manifest)
    return manifest


def test_the_first_manifest_says_where_the_run_is(tmp_path: Path) -> None:
    told = attempt(tmp_path, [], {PROMPTS: "0"})
    assert told["schema"] == 1
    assert told["argv"] == ["mpipipe", "run", "x.toml"]
    assert told["git"] == {"commit": "abc", "dirty": False}
    assert told["nodes"][0]["gpus"][0]["driver"] == "550"
    assert told["launch"] == {
        "num_nodes": 2, "num_ranks": 3, "launcher": "srun", "mpi": "pmix",
    }  # fmt: skip
    assert told["environment"] == {"OMP_NUM_THREADS": "1"}
    assert told["doctor"] == [{"check": "node.shm"}]
    assert [host["host"] for host in told["hosts"]] == ["n1", "n1", "n2"]
    (own,) = told["attempts"]
    assert own["attempt"] == 1
    assert (own["t_s"], own["unix_s"]) == (500.0, 1_800_000_000.0)
    assert own["started"] == "2027-01-15T08:00:00+00:00"
    assert own["hosts"] == ["n1", "n1", "n2"]
    assert (own["num_kept"], own["num_kept_failed"], own["num_kept_output_tokens"]) == (0, 0, 0)


def test_an_attempt_that_ended_while_it_booted_is_remembered_and_binds_nobody(
    tmp_path: Path,
) -> None:
    first = attempt(tmp_path, [], {PROMPTS: "0"})
    assert first["basis"] is None
    second = attempt(tmp_path, ["model.dtype=float16"], {PROMPTS: "others"})
    assert second["run"] == first["run"]
    assert [entry["attempt"] for entry in second["attempts"]] == [1, 2]
    assert second["attempts"][0]["state"] == "interrupted"
    assert second["basis"] is None
    # Once it has begun to generate, its settings bind.
    write_json(
        tmp_path / "manifest.json", {**second, "basis": {PROMPTS: "others"}, "plan": {"x": 1}}
    )
    third = attempt(tmp_path, [], {PROMPTS: "others"})
    assert third["basis"] == {PROMPTS: "others"}
    assert third["plan"] == {"x": 1}  # of the attempt before, until its own is known
    with pytest.raises(OutputError, match="cannot be resumed"):
        attempt(tmp_path, [], {PROMPTS: "0"})


def test_a_run_with_nothing_left_adds_itself_to_what_was_told(tmp_path: Path) -> None:
    loaded = load_config(None, [f"output.dir={tmp_path}", "output.resume=true"])
    before = {
        "basis": {PROMPTS: "0"}, "run": "0123456789ab", "plan": {"x": 1}, "config": {"y": 2},
        "attempts": [{"num_kept": 0}],
    }  # fmt: skip
    write_json(tmp_path / "manifest.json", before)
    with closing(acquire_folder(loaded, [], {PROMPTS: "0"}, None)) as acquired:
        assert acquired.done_code == 0
        told = first_manifest(loaded, acquired, SURROUNDINGS)
    assert {**told, "attempts": []} == {**before, "schema": 1, "attempts": []}
    assert len(told["attempts"]) == 2


def test_a_run_keeps_its_id_over_its_attempts_and_counts_them(tmp_path: Path) -> None:
    words = [f"output.dir={tmp_path}", "output.resume=true", "model.weights=random"]
    loaded = load_config(None, words)
    with closing(acquire_folder(loaded, [], {"a": 1}, None)) as first:
        assert is_run_id(first.run)
        identity = first.identity(3, Place(replica=2, stage=1))
        assert identity.fields() == {
            "run": first.run, "attempt": 1, "job": None, "replica": 2, "rank": 3, "stage": 1,
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


@pytest.mark.parametrize("has_manifest", [False, True])
def test_a_start_that_ended_before_its_manifest_has_used_its_number(
    has_manifest: bool, tmp_path: Path
) -> None:
    words = [f"output.dir={tmp_path}", "output.resume=true", "model.weights=random"]
    loaded = load_config(None, words)
    run = "0123456789ab"
    if has_manifest:
        entry = {"attempt": 1, "num_kept": 0}
        write_json(tmp_path / "manifest.json", {"basis": None, "run": run, "attempts": [entry]})
    lines = [{"event": "x", "run": run, "attempt": n} for n in (1, 2)]
    log = "".join(f"{json.dumps(line)}\n" for line in lines) + '{"event": "torn", "attempt": 3'
    (tmp_path / "rank_0.log").write_text("x" * (1 << 20) + "\n" + log)
    with closing(acquire_folder(loaded, [], {PROMPTS: "0"}, None)) as third:
        assert (third.run, third.attempt) == (run, 3)
        told = first_manifest(loaded, replace(third, done_code=None), SURROUNDINGS)
    write_json(tmp_path / "manifest.json", told)
    (tmp_path / "rank_0.log").unlink()  # the manifest alone tells it, too
    with closing(acquire_folder(loaded, [], {PROMPTS: "0"}, None)) as fourth:
        assert (fourth.run, fourth.attempt) == (run, 4)
        assert [entry["attempt"] for entry in fourth.earlier.attempts][-1] == 3


def test_a_source_that_fails_is_left_out_of_the_manifest_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> Any:
        raise ZeroDivisionError("an odd answer")

    told: list[str] = []
    monkeypatch.setattr(manifest, "read_node", fails)
    monkeypatch.setattr(manifest, "source_commit", lambda: {"commit": "abc"})
    seen = manifest._look(speaks=True, is_head=True, examine=fails, warn=told.append)
    assert seen == (b"", {"commit": "abc"}, None)
    (warning,) = told
    assert "the node (ZeroDivisionError: an odd answer), the doctor's findings (Zero" in warning

    monkeypatch.setattr(manifest, "source_commit", fails)
    assert manifest._look(speaks=False, is_head=False, examine=fails, warn=told.append)[0] == b""
    assert len(told) == 1  # another rank than the head asks nothing
    seen = manifest._look(speaks=False, is_head=True, examine=lambda: [{"a": 1}], warn=told.append)
    assert seen == (b"", None, [{"a": 1}])
    assert "does not tell the commit (" in told[1]
