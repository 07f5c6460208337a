"""Several pipelines side by side: the run that one makes, faster. As safe: `test_stop`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpipipe.errors import EXIT_PROMPTS
from mpipipe.logs.facts import read_facts
from mpipipe.logs.reading import RunFiles
from mpipipe.logs.schema import check_line
from mpipipe.logs.step_report import report_steps
from mpipipe.logs.summary import summarise
from tests.e2e.conftest import Outcome, execute, mpiexec, read_jsonl, run
from tests.e2e.test_bench import bench, records
from tests.e2e.warm_server import warm_python

# What a request's tokens, text and end may depend on: all of it must follow from the request alone.
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.3, "seed": 7},
    {"temperature": 1.3},
    {"stop": ["a", "e"], "temperature": 1.0},
    {"num_logprobs": 2, "max_new_tokens": 5},
    {"repetition_penalty": 1.3, "top_k": 20, "temperature": 0.8},
)

COMMON = "All of these prompts begin alike: "  # two pages, a token a byte


def write_prompts(folder: Path, count: int) -> Path:
    path = folder / "many.jsonl"
    lines = [
        {"id": f"p{i}", "prompt": COMMON + f"prompt {i} " * (1 + i % 4), **KINDS[i % len(KINDS)]}
        for i in range(count)
    ]
    lines[5] = {"id": "p5", "prompt": "too long " * 40}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def said(outcome: Outcome) -> list[dict[str, Any]]:
    """The completions in the order of the prompts, without their times."""
    timed = {"queue_s", "ttft_s", "latency_s", "tokens_per_s", "logprobs", "crc32"}
    lines = outcome.completions()
    assert all(line["ttft_s"] >= line["queue_s"] >= 0 for line in lines)
    return [{name: line[name] for name in line if name not in timed} for line in lines]


def paced(num_ranks: int, config: Path, folder: Path, *words: str) -> Outcome:
    """As `run`. Each step sleeps: no replica is quicker than another by what else the cores do."""
    rank = [*warm_python(), "-m", "tests.slowed.slowed_rank", "run", str(config)]
    command = [*mpiexec(num_ranks), *rank, f"output.dir={folder}", *words]
    return execute(command, folder, SLOWED="stage:*:0.02")


def test_two_replicas_complete_what_one_rank_does(tiny_config: Path, tmp_path: Path) -> None:
    words = [f"prompts.path={write_prompts(tmp_path, 40)}"]
    alone = run(0, tiny_config, tmp_path / "alone", *words, "memory.share_prefixes=false",
                "pipeline.num_speculative_tokens=0")  # fmt: skip
    two = paced(2, tiny_config, tmp_path / "two", *words, "pipeline.replicas=2",
                "pipeline.num_stages=1")  # fmt: skip
    longer = paced(4, tiny_config, tmp_path / "longer", *words, "pipeline.replicas=2",
                   "pipeline.lookahead=1", "pipeline.max_sequences_per_slot=4")  # fmt: skip
    for outcome in (alone, two, longer):
        assert outcome.exit_code == EXIT_PROMPTS, outcome.stderr
        assert said(outcome) == said(alone)
        assert len(outcome.completions()) == 40
    shared = [outcome.json("metrics.json")["num_shared_tokens"] for outcome in (alone, two, longer)]
    # The first of each replica computes them; "p5" is too long for the model.
    assert shared == [0, 37 * 32, 37 * 32]
    assert f"{37 * 32:,} of them in shared prefixes" in two.stdout
    assert "replica  prompts  output tokens" in two.stdout
    held_up = [check_figures(two, num_stages=1), check_figures(longer, num_stages=2)]
    # In one run a rank may have got no core for seconds; in both it is ours.
    assert min(starved for starved, _ in held_up) < 0.5, held_up
    assert min(unexplained for _, unexplained in held_up) < 0.1, held_up


def check_figures(outcome: Outcome, *, num_stages: int) -> tuple[float, float]:
    """One summary, with a part of each replica; and what `mpipipe logs` makes of the files.

    Returns the shares of the time in which the worst replica had nothing to do, and of which the
    worst rank cannot tell where it went.
    """
    metrics = outcome.json("metrics.json")
    replicas, ranks = metrics["replicas"], metrics["ranks"]
    assert [(r["replica"], r["head_rank"]) for r in replicas] == [(0, 0), (1, num_stages)]
    places = [(rank["replica"], rank["stage"]["stage"]) for rank in ranks]
    assert places == [(r, s) for r in range(2) for s in range(num_stages)]
    assert sum(r["num_completed"] + r["num_failed"] for r in replicas) == 40
    for name in ("num_output_tokens", "num_prompt_tokens", "num_completed"):
        assert sum(r[name] for r in replicas) == metrics["requests"][name]
    for replica in replicas:
        assert replica["num_completed"] > 5
        assert 0 <= replica["idle_ratio"] <= 1
    plan = outcome.json("manifest.json")["plan"]
    assert (plan["replica"], plan["num_replicas"], len(plan["stages"])) == (0, 2, num_stages)
    config = outcome.json("manifest.json")["config"]["pipeline"]
    assert (config["replicas"], config["num_stages"]) == (2, num_stages)
    requests = read_jsonl(outcome.folder / "requests.jsonl")
    assert len({line["id"] for line in requests}) == len(requests) == 40
    for number in (0, 1):
        done = [line for line in requests if line["on_replica"] == number]
        assert len(done) >= replicas[number]["num_completed"]
    assert [problem for line in requests for problem in check_line("requests.jsonl", line)] == []
    files = RunFiles(outcome.folder)
    facts = read_facts(files)
    assert [(rank.replica, rank.stage) for rank in facts.ranks] == places
    report = report_steps(facts, 1.0)
    heads = [rank.num_steps for rank in facts.ranks if rank.stage == 0]
    assert report.num_steps == sum(heads) > max(heads) > 0
    found = summarise(facts, metrics)
    assert [rank.seconds["compute"] > 0 for rank in found.ranks] == [True] * 2 * num_stages
    starved = max(replica["starved_s"] / replica["generate_s"] for replica in replicas)
    return starved, max(rank.seconds["unexplained"] / rank.wall_s for rank in found.ranks)


LIBRARY = r"""
import asyncio, json, sys
from mpipipe import Pipeline

said = []

async def complete(pipeline, prompts, **settings):
    done = [completion async for completion in pipeline.generate(prompts, **settings)]
    done.sort(key=lambda c: c.index)
    return [[c.index, c.error_kind, list(c.token_ids), c.text] for c in done]

async def main():
    async with Pipeline(sys.argv[1], "pipeline.replicas=2") as pipeline:
        prompts = [f"prompt {i}" for i in range(9)] + [""]
        settings = {"max_new_tokens": 6, "temperature": 1.0}
        # Asked for at once, they are completed one after the other on every rank.
        said.extend(await asyncio.gather(
            *(complete(pipeline, prompts, seed=seed, **settings) for seed in (1, 2))))
        async for completion in pipeline.generate([f"prompt {i}" for i in range(40)]):
            break  # a caller that leaves early leaves the replicas in order
        said.append(await complete(pipeline, ["last"], max_new_tokens=4))
        said.append(pipeline.plan.num_replicas)

asyncio.run(main())
if said[0]:  # of rank 0
    with open(sys.argv[2], "w") as file:
        json.dump(said, file)
"""


def test_the_library_and_the_benchmark_use_all_replicas(
    tiny_model: Path, tiny_config: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(LIBRARY)
    said = []
    for num_ranks in (1, 2):
        path = tmp_path / f"said_{num_ranks}.json"
        text = LIBRARY if num_ranks == 2 else LIBRARY.replace("replicas=2", "replicas=1")
        script.write_text(text)
        command = [*mpiexec(num_ranks), *warm_python(), str(script), str(tiny_model), str(path)]
        outcome = execute(command, tmp_path)
        assert outcome.exit_code == 0, outcome.stderr
        said.append(json.loads(path.read_text()))
    assert said[0][:-1] == said[1][:-1]
    assert (said[0][-1], said[1][-1]) == (1, 2)
    assert [entry[1] for entry in said[1][0]] == [None] * 9 + ["empty_prompt"]

    outcome = bench(2, tiny_config, "--work", "6x16x8", "pipeline.replicas=auto")
    assert outcome.exit_code == 0, outcome.stderr
    (record,) = records(outcome)
    assert record["num_output_tokens"] == 48
    assert record["plan"]["num_replicas"] == 2
    assert [(s["replica"], s["stage"]) for s in record["stages"]] == [(0, 0), (1, 0)]
    assert all(stage["num_steps"] >= 8 for stage in record["stages"])
    assert 0 < record["share_of_floor"] < 1
