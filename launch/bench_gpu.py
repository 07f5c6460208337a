"""Everything that is claimed of the GPU engine, measured on this machine in one go.

    ./launch/bench_gpu.sh                        all parts
    ./launch/bench_gpu.sh --only pipeline_llama3_8b,tests
    ./launch/bench_gpu.sh --only boot,file       whole runs: starts, and a file of 10,000 prompts
    ./launch/bench_gpu.sh --only boot,file --tree ../before --out before
    ./launch/bench_gpu.sh --compare before after
    ./launch/bench_gpu.sh --quick --device cpu pipeline.device=cpu model.dtype=float32 model.path=…

`mpipipe.bench.gpu_suite` has the parts. A part that fails or takes too long is told of and loses
only its own figures. Writes table.md, records.jsonl, trace.json (50 decode steps of both stages,
for Perfetto) and log.txt to `--out`; records.jsonl grows as parts end. Whole runs leave their
folders there, their prompts (*.prompts.jsonl), and kernels/, which is Triton's cache of the starts.
`--tree` measures another checkout, e.g. of the commit before, which says what it does not know;
`--compare` puts what two calls left side by side. A relative path of these is the caller's, one in
an override is looked up in the tree that is measured.

All of it takes about 12 minutes by estimate. The last measured, on two H200: the benchmarks 250 s
without `prefix` and what follows it (440 s with it, by estimate), the tests 238 s.
A part is stopped after 100 s (transformers 75, the tests 420), all of it after `--budget` seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mpipipe.bench.gpu_suite import Result, SuiteOptions, all_parts, run_part
from mpipipe.bench.gpu_suite_table import compare_lines, table_lines
from mpipipe.errors import MpipipeError
from mpipipe.plain_values import json_object

ROOT = Path(__file__).resolve().parents[1]
RECORDS = "records.jsonl"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="All GPU benchmarks and tests of mpipipe.")
    parser.add_argument("--only", default="", help="comma-separated parts or their first letters")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu_results"))
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds for everything")
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
    if not (args.tree / "mpipipe").is_dir():
        sys.exit(f"bench_gpu: there is no {args.tree / 'mpipipe'}: give a checkout as --tree")
    return args


def main() -> int:
    """Run the parts, print and write the table; 1 if any part failed."""
    args = parsed()
    if args.compare:
        print(*compare_lines(*map(records_of, args.compare)), sep="\n")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    options = SuiteOptions(
        root=args.tree,
        out=args.out,
        device=args.device,
        quick=args.quick,
        profile=args.profile,
        overrides=tuple(args.overrides),
    )
    os.chdir(args.tree)  # where its parts run, so that a path in an override means one file
    wanted = [word for word in args.only.split(",") if word]
    try:
        parts = all_parts(options)
    except MpipipeError as error:
        sys.exit(f"bench_gpu: {error}")
    parts = [p for p in parts if not wanted or any(p.name.startswith(word) for word in wanted)]
    if not parts:
        sys.exit(f"bench_gpu: no part begins with {args.only}")
    started_s = time.monotonic()
    results: list[Result] = []
    with (
        (args.out / "log.txt").open("w", encoding="utf-8") as log,
        (args.out / RECORDS).open("w", encoding="utf-8") as kept,
    ):
        for part in parts:
            left_s = args.budget - (time.monotonic() - started_s)
            if left_s < 10:
                results.append(Result(part, 0.0, "no time left", [], []))
                continue
            print(f"== {part.name} …", flush=True)
            result = run_part(part, args.tree, min(part.limit_s, left_s), log)
            results.append(result)
            kept.write("".join(json.dumps(record) + "\n" for record in result.records))
            kept.flush()
            tell(result)
    lines = table_lines(results, time.monotonic() - started_s)
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("", *lines, sep="\n", flush=True)
    return 1 if any(result.problem for result in results) else 0


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
