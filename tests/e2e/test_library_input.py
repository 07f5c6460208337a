"""The library is given what is wrong: all ranks hear of it alike, and go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import execute, mpiexec

# One start for everything that a script can get wrong: loading is what takes the time.
SCRIPT = r"""
import json, sys
from mpi4py import MPI
from mpipipe import Pipeline

rank = MPI.COMM_WORLD.rank
said = []

def broken():
    yield "a"
    raise KeyError("lost")

def attempt(name, prompts, **settings):
    try:
        done = list(pipeline.generate_sync(prompts, max_new_tokens=3, **settings))
    except ValueError as error:
        said.append([name, "ValueError", str(error)])
    except KeyError as error:
        said.append([name, "KeyError", str(error)])
    else:
        done.sort(key=lambda c: c.index)
        said.append([name, [[c.request_id, c.error_kind, len(c.token_ids)] for c in done]])

with Pipeline(sys.argv[1]) as pipeline:
    for name, settings in (
        ("seed", {"seed": -1}), ("nan", {"temperature": float("nan")}), ("typo", {"sed": 1}),
        ("bool", {"top_k": True}), ("huge", {"seed": 10**30}), ("ids", {"stop_token_ids": [-1]}),
        ("empty stop", {"stop": ["a", ""]}), ("half", {"stop": "\ud800"}), ("n", {"n": 2}),
    ):
        attempt(name, ["x"], **settings)
    attempt("text", "one text")
    attempt("broken", broken())
    attempt("records", ["a", "\ud800", 7, {"id": "own", "prompt": "b", "max_tokens": 2}, "",
                        {"prompt": "c", "seed": -1}, object()])
    whole = [c.text for c in pipeline.generate_sync(["a"], max_new_tokens=8, ignore_eos=True)]
    if pipeline.is_head:
        letters = whole[0][2:4]
        said.append(["letters", whole[0], letters])
    letters = MPI.COMM_WORLD.bcast(whole[0][2:4] if rank == 0 else None)
    cut = [c.text for c in pipeline.generate_sync(
        ["a"], max_new_tokens=8, ignore_eos=True, stop=letters)]
    said.append(["cut", cut])
with open(f"{sys.argv[2]}/said_{rank}.json", "w") as file:
    json.dump(said, file)
"""


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_is_wrong_is_told_on_every_rank_and_the_session_goes_on(
    num_ranks: int, tiny_model: Path, tmp_path: Path
) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(SCRIPT)
    command = [*mpiexec(num_ranks), sys.executable, str(script), str(tiny_model), str(tmp_path)]
    outcome = execute(command, tmp_path)
    assert outcome.exit_code == 0, outcome.stderr
    said = [json.loads((tmp_path / f"said_{rank}.json").read_text()) for rank in range(num_ranks)]
    words = ["seed", "nan", "typo", "bool", "huge", "ids", "empty stop", "half", "n"]
    for heard in said:
        wrong = {entry[0]: entry[1] for entry in heard[: len(words)]}
        assert wrong == dict.fromkeys(words, "ValueError")
    assert all(heard[: len(words)] == said[0][: len(words)] for heard in said)
    head = {entry[0]: entry[1:] for entry in said[0]}
    assert head["text"][0] == "ValueError"
    assert head["broken"] == ["KeyError", "'lost'"]
    for heard in said[1:]:
        others = {entry[0]: entry[1:] for entry in heard}
        assert others["text"][0] == "ValueError"
        assert others["broken"][0] == "ValueError"
        assert "KeyError: 'lost'" in others["broken"][1]
        assert others["records"] == [[]]
    assert head["records"][0] == [
        ["0", None, 3],
        ["1", "invalid_json", 0],
        ["2", "invalid_json", 0],
        ["own", None, 2],
        ["4", "empty_prompt", 0],
        ["5", "invalid_sampling", 0],
        ["6", "invalid_prompt", 0],
    ]
    text, letters = head["letters"]
    assert head["cut"] == [[text[: text.index(letters)]]], (
        "stops at the text, not at a letter of it"
    )
