"""`python -m tests.chaos --points 60 --seed 1`: a table of blows; exit code 1 on a violation.

A point is one start of the real command with `output.resume=true`, and one blow (`blows`) at a
drawn moment. Points form chains: the same command in the same folder until all is done. Each end is
judged (`judge`): exit code, time, processes left, `status.json`; at the end of a chain
`completions.jsonl` is held against a run of one rank that nothing was done to.

`--folder` keeps the runs and what they said; `--report` gets a JSON line a point. Needs Linux and
an MPI with `mpiexec`; run it alone on the machine, as a rank that gets no core looks frozen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from random import Random

from tests.chaos.blows import BLOWS, draw
from tests.chaos.chain import Job, Point, attempt, final_faults, reference
from tests.chaos.model import write_model, write_prompts
from tests.chaos.summary import summary

__all__ = ["prepare", "run_points"]

_POINTS_OF_A_CHAIN = 6  # at most, before the rest is done undisturbed


def prepare(folder: Path, *, num_prompts: int, seed: int, deadline_s: float) -> Job:
    """A model, its prompts and a configuration in `folder`."""
    model = write_model(folder / "model")
    names = write_prompts(folder / "prompts.jsonl", num_prompts, seed)
    config = folder / "chaos.toml"
    config.write_text(
        f'model.path = "{model}"\nprompts.path = "{folder / "prompts.jsonl"}"\n'
        "generation.ignore_eos = true\nmemory.num_kv_pages = 128\n"
        "pipeline.max_sequences_per_slot = 4\n"
    )
    return Job(config, names, deadline_s=deadline_s)


def run_points(
    job: Job,
    folder: Path,
    right: Mapping[str, Sequence[int]],
    kinds: Iterable[str],
    num_ranks: Iterable[int],
    seed: int,
) -> Iterator[Point]:
    """A point for each of `kinds`, in chains that are brought to their end, with tokens as `right`.

    The sizes in `num_ranks` take turns. A blow that came after the end is dealt again.
    """
    rng, sizes = Random(f"chaos:{seed}"), cycle(num_ranks)
    left = list(kinds)
    trials_left = 3 * len(left)
    chain = 0
    while left and trials_left:
        chain, size, run = chain + 1, next(sizes), folder / f"chain_{chain + 1}"
        code: int | None = None
        for _ in range(min(_POINTS_OF_A_CHAIN, trials_left)):
            if not left or code == 0:
                break
            trials_left -= 1
            point = attempt(job, run, chain, size, draw(rng, left[0], size, job.deadline_s))
            code = point.end.exit_code
            if point.dealt:
                del left[0]
            yield point
        if code != 0:
            yield attempt(job, run, chain, size, None)
        for fault in final_faults(job, run, right):
            yield Point.of_files(chain, size, fault)


def main() -> int:
    """Run the points and show them."""
    arguments = _arguments()
    rng = Random(f"kinds:{arguments.seed}")
    kinds = [kind for kind, _ in zip(cycle(BLOWS), range(arguments.points), strict=False)]
    rng.shuffle(kinds)
    points: list[Point] = []
    with tempfile.TemporaryDirectory(prefix="mpipipe-chaos-") as name:
        folder = Path(arguments.folder or name)
        job = prepare(
            folder,
            num_prompts=arguments.prompts,
            seed=arguments.seed,
            deadline_s=arguments.deadline_s,
        )
        right = reference(job, folder / "reference")
        for point in run_points(job, folder, right, kinds, arguments.ranks, arguments.seed):
            points.append(point)
            print(point.line(), flush=True)
            if arguments.report:
                with Path(arguments.report).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(point.document()) + "\n")
    print("\n".join(summary(points)))
    return 1 if any(point.faults for point in points) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--deadline-s", type=float, default=10.0)
    parser.add_argument("--report", help="a JSON line for each point is added to this file")
    parser.add_argument("--folder", help="keep model, runs and outputs in this new folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
