"""Everything that is claimed of the GPU engine, measured on this machine.

    ./launch/bench_gpu.sh                        all parts
    ./launch/bench_gpu.sh --only prefix,tail     some, by the first letters of their names
    ./launch/bench_gpu.sh --only prefix --list   what that would run, and about how long
    ./launch/bench_gpu.sh --only boot,file --tree ../before --out before
    ./launch/bench_gpu.sh --compare before after
    ./launch/bench_gpu.sh --quick --device cpu pipeline.device=cpu model.dtype=float32 model.path=…

`mpipipe.bench.gpu_parts` has the parts. A part that fails or takes too long is told of and loses
only its own figures. Writes table.md, records.jsonl, log.txt, tests.txt (which tests failed) and
trace.json (50 decode steps of both stages, for Perfetto) to `--out`; records.jsonl grows as parts
end. Folders of whole runs, their prompts, compiled kernels and a generated model go to `--scratch`
(`--out`/scratch). `--tree` measures another checkout, e.g. of the commit before, which says what
it does not know; `--compare` puts what two calls left side by side. A relative path of these is
the caller's, one in an override is looked up in the tree that is measured. Each part is stopped
after its own limit, all of it after `--limit-s` seconds. `disk` runs where `--disk` names a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpipipe.bench.gpu_parts import all_parts
from mpipipe.bench.gpu_suite import Part, Result, SuiteOptions, run_part
from mpipipe.bench.gpu_suite_pairs import lines_of_tests
from mpipipe.bench.gpu_suite_table import compare_lines, table_lines
from mpipipe.errors import MpipipeError
from mpipipe.plain_values import json_object
from mpipipe.topology.nvml import opened_nvml

ROOT = Path(__file__).resolve().parents[1]
RECORDS = "records.jsonl"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="All GPU benchmarks and tests of mpipipe.")
    parser.add_argument("--only", default="", help="comma-separated parts or their first letters")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu_results"))
    parser.add_argument("--scratch", type=Path, help="for large files; default: OUT/scratch")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="for everything")
    parser.add_argument("--list", action="store_true", help="say what would run, and for how long")
    parser.add_argument("--disk", type=Path, help="a folder on a disk, for the part disk")
    parser.add_argument("--gpus", type=int, help="default: those in sight, or 2 with --device cpu")
    parser.add_argument("--quick", action="store_true", help="tiny works, to try the script")
    parser.add_argument("--device", default="cuda", help="of transformers; cpu to try the script")
    parser.add_argument("--profile", default="", help="a shape: profile its first pipeline work")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="`--out` of two calls"
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    args = parser.parse_args()
    args.out, args.tree = args.out.absolute(), args.tree.absolute()
    args.scratch = (args.scratch or args.out / "scratch").absolute()
    args.disk = args.disk and args.disk.absolute()
    if not (args.tree / "mpipipe").is_dir():
        sys.exit(f"bench_gpu: there is no {args.tree / 'mpipipe'}: give a checkout as --tree")
    return args


def main() -> int:
    """Run the parts, print and write the table; 1 if any part failed."""
    args = parsed()
    if args.compare:
        print(*compare_lines(*map(records_of, args.compare)), sep="\n")
        return 0
    parts = wanted_parts(args)
    for part in parts:
        print(f"{part.name}: about {part.about_s:.0f} s, at most {part.limit_s:.0f} s")
    print(f"all: about {sum(part.about_s for part in parts):.0f} s, at most {args.limit_s:.0f} s")
    if args.list:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    args.scratch.mkdir(parents=True, exist_ok=True)
    os.chdir(args.tree)  # where its parts run, so that a path in an override means one file
    started_s = time.monotonic()
    try:
        results = ran(parts, args, started_s)
    finally:
        shutil.rmtree(args.scratch / "copying_model", ignore_errors=True)  # gigabytes
    lines = table_lines(results, time.monotonic() - started_s)
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if tests := lines_of_tests(results):
        (args.out / "tests.txt").write_text("\n".join(tests) + "\n", encoding="utf-8")
    print("", *lines, *tests, sep="\n", flush=True)
    return 1 if any(result.problem for result in results) else 0


def wanted_parts(args: argparse.Namespace) -> list[Part]:
    """Those of `--only`, of which this machine has the GPUs."""
    options = SuiteOptions(
        root=args.tree,
        out=args.out,
        scratch=args.scratch,
        device=args.device,
        quick=args.quick,
        profile=args.profile,
        overrides=tuple(args.overrides),
        num_gpus=args.gpus or num_gpus_here(args.device),
        disk=args.disk,
    )
    words = [word for word in args.only.split(",") if word]
    try:
        parts = all_parts(options)
    except MpipipeError as error:
        sys.exit(f"bench_gpu: {error}")
    parts = [part for part in parts if not words or any(map(part.name.startswith, words))]
    if not parts:
        why = f"begins with {args.only} and needs at most {options.num_gpus} GPUs"
        sys.exit(f"bench_gpu: no part {why}; disk also needs --disk FOLDER")
    return parts


def num_gpus_here(device: str) -> int:
    """In sight of this process; 2 where ranks on CPUs stand for them."""
    if device == "cpu":
        return 2
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    with opened_nvml() as nvml:
        found = 0 if nvml is None else int(nvml.ask("nvmlDeviceGetCount") or 0)
    if not found:
        sys.exit(
            "bench_gpu: no GPU was found, or nvidia-ml-py, which counts them, is not installed: "
            "give --gpus N, or --device cpu for a trial"
        )
    return found


def ran(parts: Sequence[Part], args: argparse.Namespace, started_s: float) -> list[Result]:
    """What became of each."""
    results: list[Result] = []
    with (
        (args.out / "log.txt").open("w", encoding="utf-8") as log,
        (args.out / RECORDS).open("w", encoding="utf-8") as kept,
    ):
        for part in parts:
            left_s = args.limit_s - (time.monotonic() - started_s)
            if left_s < 10:
                results.append(Result(part, 0.0, "no time left", [], []))
                continue
            print(f"== {part.name} … about {part.about_s:.0f} s", flush=True)
            result = run_part(part, args.tree, min(part.limit_s, left_s), log)
            results.append(result)
            kept.write("".join(json.dumps(record) + "\n" for record in result.records))
            kept.flush()
            tell(result)
    return results


def records_of(out: Path) -> list[dict[str, Any]]:
    """What an earlier call left in its `--out`."""
    path = out / RECORDS
    if not path.is_file():
        sys.exit(f"bench_gpu: there is no {path}: give the --out folders of two calls")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := json_object(line)) is not None]


def tell(result: Result) -> None:
    """A line per record; the end of the output where something went wrong."""
    for record in result.records:
        figure = record.get("error") or f"{record['tokens_per_s']:,.0f} tokens/s"
        if first_s := record.get("first_token_s"):
            figure += f", first token {first_s:.1f} s after the start"
        print(f"   {record['work']}: {figure}", flush=True)
    print(f"   {result.seconds:.0f} s, {result.problem or 'ok'}", flush=True)
    if result.problem:
        print("\n".join(f"   | {line}" for line in result.last_lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
