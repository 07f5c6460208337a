"""The library is given what is wrong: all ranks hear of it alike, and go on or end together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import execute, mpiexec
from tests.e2e.warm_server import warm_python

ONE_AT_A_TIME = "pipeline.max_sequences_per_slot=1"  # a loop that breaks leaves prompts waiting
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

with Pipeline(sys.argv[1], *sys.argv[3:]) as pipeline:
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
    # Planned before it sees a prompt: it must hold the whole context, whatever comes first.
    for prompt, options in (
        ("a", {"max_new_tokens": 2}),
        ("long words " * 8, {"max_new_tokens": 100, "num_logprobs": 1}),
        ("many words " * 40, {"max_new_tokens": 2}),
        ("a", {"max_new_tokens": 3, "temperature": 1.0, "repetition_penalty": 2.0}),
    ):
        for c in pipeline.generate_sync([prompt], ignore_eos=True, **options):
            number = len(c.token_ids)
            said.append(["length", number, c.num_prompt_tokens + number, c.error_kind])
    for c in pipeline.generate_sync(["a", "b", "c", "d"], max_new_tokens=9):
        break
    done = list(pipeline.generate_sync(["a", "b", ""], max_new_tokens=9))
    said.append(["after a break", sorted(c.index for c in done)])
    with open(f"{sys.argv[2]}/said_{rank}.json", "w") as file:
        json.dump(said, file)
    for c in pipeline.generate_sync(["x", "y"], max_new_tokens=4):
        raise RuntimeError("the script is wrong")
"""


@pytest.mark.parametrize(
    ("num_ranks", "words"), [(1, []), (2, ["pipeline.lookahead=1", "pipeline.device=cpu"])]
)
def test_what_is_wrong_is_told_on_every_rank_and_the_session_goes_on_until_the_script_fails(
    num_ranks: int, words: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(SCRIPT)
    ours = [*warm_python(), str(script), str(tiny_model), str(tmp_path), ONE_AT_A_TIME, *words]
    outcome = execute([*mpiexec(num_ranks), *ours], tmp_path)
    assert outcome.exit_code != 0
    assert "the script is wrong" in outcome.stderr
    said = [json.loads((tmp_path / f"said_{rank}.json").read_text()) for rank in range(num_ranks)]
    wrong_names = ["seed", "nan", "typo", "bool", "huge", "ids", "empty stop", "half", "n"]
    for heard in said:
        wrong = {entry[0]: entry[1] for entry in heard[: len(wrong_names)]}
        assert wrong == dict.fromkeys(wrong_names, "ValueError")
    assert all(heard[: len(wrong_names)] == said[0][: len(wrong_names)] for heard in said)
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
    lengths = [entry[1:] for entry in said[0] if entry[0] == "length"]
    assert [lengths[0], lengths[2][::2], lengths[3]] == [
        [2, 3, None],
        [0, "too_long"],
        [3, 4, None],
    ]
    assert lengths[1][1:] == [128, None], "it ends at the context"
    assert head["after a break"] == [[0, 1, 2]]
