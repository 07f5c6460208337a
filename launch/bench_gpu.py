"""Everything that is claimed of the GPU engine, measured on this machine in one go.

    ./launch/bench_gpu.sh                        all parts
    ./launch/bench_gpu.sh --only pipeline_llama3_8b,tests
    ./launch/bench_gpu.sh --quick --device cpu pipeline.device=cpu model.dtype=float32 model.path=…

Parts (one process or one mpirun each): `pipeline_<shape>`, `latency_<shape>` and `chunks_<shape>`
(pipeline.prefill = mixed instead of phases) on two GPUs, `single_<shape>` on one, `transformers_1`
and `transformers_2` (generate on one GPU, device_map over two),
`tests` (launch/test_gpu.sh). A part that fails or takes too long is told of and loses only
its own figures. Writes table.md, records.jsonl, trace.json (50 decode steps of both stages, for
Perfetto) and log.txt to `--out`.

The last measured, on two H200: the benchmarks 250 s, the tests 238 s, each in a call of its own.
A part is stopped after 100 s (transformers 75, the tests 420), all of it after `--budget` seconds.

Figures are output tokens per second of a whole job, prefill included, with random weights, bf16,
greedy decoding and fixed lengths unless a work says mixed. vLLM's and the targets are the issue's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "bench_gpu.toml"
SHAPES = ("openllama_3b", "llama3_8b")
QUICK = ("4x16x8", "1x16x8")

# The order matters: the trace shows the last work of the first part, so that comes last there.
PIPELINE = {
    "openllama_3b": (
        "1x512x128", "32x512x128", "128x512x128", "128x1024x256", "512x512x128", "512xmixed",
        "64x512x128",
    ),
    "llama3_8b": ("64x512x128", "128x512x128", "128x1024x256", "512x512x128"),
}  # fmt: skip
# A plan is balanced for the largest work of its process, so a batch of one has a process of its own
# where that changes the split (the LM head weighs as much as 2.4 layers of Llama-3-8B).
LATENCY = {"llama3_8b": ("1x512x128",)}
SINGLE = {
    "openllama_3b": ("1x512x128", "32x512x128", "64x512x128", "128x1024x256", "512x512x128"),
    "llama3_8b": ("1x512x128", "64x512x128", "128x1024x256", "512x512x128"),
}
# Prompt chunks between the decode steps, for requests that arrive over time: what that costs a job
# whose prompts are all there, for which prompts come first (phases, the default of a run).
MIXED_PREFILL = {"openllama_3b": ("512xmixed",)}
# Small enough that the slowest (32 tokens/s) takes 4 s.
TRANSFORMERS = ("1x512x128", "32x512x128")

TARGETS = {
    ("openllama_3b", "512x512x128"): 16_000,
    ("openllama_3b", "128x1024x256"): 9_500,
    ("openllama_3b", "64x512x128"): 9_500,
    ("openllama_3b", "32x512x128"): 6_200,
    ("openllama_3b", "1x512x128"): 420,
    ("llama3_8b", "512x512x128"): 13_500,
    ("llama3_8b", "128x1024x256"): 9_500,
    ("llama3_8b", "64x512x128"): 6_800,
    ("llama3_8b", "1x512x128"): 225,
}
# vLLM 0.26.0 on the same kind of machine, by ranks.
VLLM = {
    2: {
        ("openllama_3b", "512x512x128"): 9_860,
        ("openllama_3b", "128x1024x256"): 5_236,
        ("openllama_3b", "64x512x128"): 6_368,
        ("openllama_3b", "32x512x128"): 3_641,
        ("openllama_3b", "1x512x128"): 313,
        ("llama3_8b", "512x512x128"): 12_268,
        ("llama3_8b", "128x1024x256"): 7_995,
        ("llama3_8b", "64x512x128"): 5_478,
        ("llama3_8b", "1x512x128"): 196,
    },
    1: {
        ("openllama_3b", "512x512x128"): 5_270,
        ("openllama_3b", "128x1024x256"): 3_057,
        ("openllama_3b", "32x512x128"): 3_698,
        ("openllama_3b", "1x512x128"): 335,
        ("llama3_8b", "512x512x128"): 6_974,
        ("llama3_8b", "128x1024x256"): 5_608,
        ("llama3_8b", "1x512x128"): 200,
    },
}
# Weak scaling: (work on one GPU, work on two) with the same rows in every slot.
SCALING = ("64x512x128", "128x512x128")


@dataclass(frozen=True)
class Part:
    """One thing to run."""

    name: str
    command: list[str]
    limit_s: float
    json_path: Path | None = None  # where the records appear, one by one; None: on standard output
    labels: dict[str, Any] = field(default_factory=dict)  # added to each record


@dataclass
class Result:
    """What became of a part."""

    part: Part
    seconds: float
    problem: str  # "" when all went well
    records: list[dict[str, Any]]
    last_lines: list[str]


def mpirun(num_ranks: int) -> list[str]:
    """The launcher with what it needs here."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which("mpirun", path=beside) or shutil.which("mpiexec", path=beside)
    if found is None:
        sys.exit("bench_gpu: no mpirun: install an MPI, or mpipipe[mpich]")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    command = [found, "-n", str(num_ranks)]
    if "Open MPI" in version.stdout or "OpenRTE" in version.stdout:
        # Bound to one core each, as Open MPI does for two ranks, launching and polling would fight.
        command += ["--bind-to", "none", "--oversubscribe"]
        command += ["--allow-run-as-root"] if os.getuid() == 0 else []
    return command


def throughput_part(
    name: str,
    shape: str,
    works: tuple[str, ...],
    num_ranks: int,
    args: argparse.Namespace,
    *,
    variant: str = "",
) -> Part:
    """`bench throughput` of a shape. `variant`: a key of the section `pipeline` and its value."""
    json_path = args.out / f"{name}.jsonl"
    words = [word for work in works for word in ("--work", work)]
    if name == "pipeline_openllama_3b":
        words += ["--trace", str(args.out / "trace.json"), "--trace-steps", "50"]
    if args.profile and name == f"pipeline_{args.profile}":
        words += ["--profile", str(args.out / "profile.json")]
    command = [*mpirun(num_ranks), sys.executable, "-m", "mpipipe", "bench", "throughput"]
    command += [str(CONFIG), f"model.path={ROOT / 'configs' / 'shapes' / shape}", *args.overrides]
    command += [f"pipeline.{variant}"] if variant else []
    command += [*words, "--json", str(json_path)]
    labels = {"shape": shape, "ranks": num_ranks, "variant": variant}
    return Part(name, command, 100.0, json_path, labels)


def transformers_part(name: str, device_map: str, args: argparse.Namespace) -> Part:
    """`bench transformers` of the first shape."""
    shape = SHAPES[0]
    command = [sys.executable, "-m", "mpipipe", "bench", "transformers", str(CONFIG)]
    command += [f"model.path={ROOT / 'configs' / 'shapes' / shape}", *args.overrides]
    command += ["--device", args.device, "--device-map", device_map]
    for work in QUICK if args.quick else TRANSFORMERS:
        command += ["--work", work]
    return Part(name, command, 75.0, None, {"shape": shape, "ranks": name[-1]})


def tests_part() -> Part:
    """The GPU tests; those that need ranks start them themselves."""
    return Part("tests", ["bash", str(ROOT / "launch" / "test_gpu.sh")], 420.0)


def all_parts(args: argparse.Namespace) -> list[Part]:
    """In the order to run them: the figures of the table first, they matter most."""
    parts = []
    for shape in SHAPES:
        works = QUICK if args.quick else PIPELINE[shape]
        parts.append(throughput_part(f"pipeline_{shape}", shape, works, 2, args))
    for shape, single in LATENCY.items():
        works = QUICK if args.quick else single
        parts.append(throughput_part(f"latency_{shape}", shape, works, 2, args))
    for shape, mixed in MIXED_PREFILL.items():
        works = QUICK if args.quick else mixed
        name = f"chunks_{shape}"
        parts.append(throughput_part(name, shape, works, 2, args, variant="prefill=mixed"))
    for shape in SHAPES:
        works = QUICK if args.quick else SINGLE[shape]
        parts.append(throughput_part(f"single_{shape}", shape, works, 1, args))
    parts.append(transformers_part("transformers_1", "none", args))
    if args.device == "cuda":
        parts.append(transformers_part("transformers_2", "auto", args))
    return [*parts, tests_part()]


def run(part: Part, limit_s: float, log: TextIO) -> Result:
    """Run one part, at most `limit_s`; its output goes to the log."""
    if part.json_path is not None:
        part.json_path.unlink(missing_ok=True)
    log.write(f"\n==== {part.name}: {' '.join(part.command)}\n")
    log.flush()
    started_s = time.monotonic()
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    problem = ""
    try:
        output, _ = process.communicate(timeout=limit_s)
        if process.returncode:
            problem = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        problem = f"stopped after {limit_s:.0f} s"
        output = end(process)
    seconds = time.monotonic() - started_s
    log.write(output)
    log.flush()
    shown = [line for line in output.splitlines() if not line.startswith("{")]
    return Result(part, seconds, problem, records_of(part, output), shown[-25:])


def end(process: subprocess.Popen[str]) -> str:
    """Stop a process that takes too long, ranks included; returns what it had said."""
    for sent, wait_s in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 8.0)):
        try:
            os.killpg(process.pid, sent)
            return process.communicate(timeout=wait_s)[0]
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    return ""


def records_of(part: Part, output: str) -> list[dict[str, Any]]:
    """The JSON records that a part left, also one that failed halfway."""
    lines = output.splitlines()
    if part.json_path is not None:
        lines = part.json_path.read_text().splitlines() if part.json_path.is_file() else []
        part.json_path.unlink(missing_ok=True)
    found = []
    for line in lines:
        if line.startswith("{"):
            try:
                found.append({"part": part.name, **part.labels, **json.loads(line)})
            except ValueError:
                continue  # a line cut off when the part was stopped
    return found


# ---- the table -----------------------------------------------------------------------------------


def table_lines(results: list[Result], seconds: float) -> list[str]:
    """Markdown: ours beside everything it is held against."""
    records = [record for result in results for record in result.records]
    peers = {
        (record["shape"], record["work"], record["ranks"]): record
        for record in records
        if record.get("peer")
    }
    ours = [record for record in records if not record.get("peer")]
    header = (
        "model", "work", "GPUs", "tokens/s", "target", "vLLM", "floor", "of floor",
        "transformers 1 GPU", "device_map 2 GPUs", "ms/lap", "of decode floor", "bubble",
        "steady", "CPU µs/step", "GiB",
    )  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * (len(header) - 2)]
    lines += [row(record, peers) for record in ours]
    lines += ["", *scaling_lines(ours), *boot_lines(ours)]
    if ours:
        devices = ", ".join(sorted({name for record in ours for name in record["devices"]}))
        versions = ", ".join(f"{k} {v}" for k, v in ours[0]["versions"].items() if v)
        lines += [f"{ours[0]['date']}, {devices}; {versions}."]
    lines += ["", "| part | seconds | outcome |", "|---|---:|---|"]
    lines += [f"| {r.part.name} | {r.seconds:.0f} | {r.problem or 'ok'} |" for r in results]
    return [*lines, "", f"All parts: {seconds:.0f} s."]


def row(record: dict[str, Any], peers: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """One line of the table."""
    key, ranks, variant = (record["shape"], record["work"]), record["ranks"], record["variant"]
    target = TARGETS.get(key) if ranks == 2 and not variant else None
    speed = record["tokens_per_s"]
    shown = f"**{speed:,.0f}**" if target and speed >= target else f"{speed:,.0f}"
    stages = record["stages"]
    peer = [peers.get((*key, number), {}) for number in ("1", "2")]
    held = [stage["gpu_peak_bytes"] or stage["peak_rss_bytes"] for stage in stages]
    cells = [
        f"{record['shape']}, {variant}" if variant else record["shape"],
        record["work"],
        str(ranks),
        shown,
        number(target),
        number(VLLM[ranks].get(key)),
        number((record["floor"] or {}).get("tokens_per_s")),
        percent(record["share_of_floor"]),
        *(entry.get("error") or number(entry.get("tokens_per_s")) for entry in peer),
        number(record["ms_per_lap"], 3),
        percent(record["share_of_decode_floor"]),
        "/".join(percent(stage["bubble"]) for stage in stages),
        "/".join(percent(stage["steady_bubble"], 1) for stage in stages),
        "/".join(number(cpu_us(stage)) for stage in stages),
        "/".join(number(size / 2**30, 1) for size in held),
    ]
    return "| " + " | ".join(cells) + " |"


def scaling_lines(ours: list[dict[str, Any]]) -> list[str]:
    """Weak scaling from one GPU to two, every slot keeping its rows."""
    of = {
        (record["shape"], record["work"], record["ranks"]): record
        for record in ours
        if not record["variant"]
    }
    lines = []
    for shape in SHAPES:
        one, two = of.get((shape, SCALING[0], 1)), of.get((shape, SCALING[1], 2))
        if one and two and one["ms_per_lap"] and two["ms_per_lap"]:
            job = two["tokens_per_s"] / (2 * one["tokens_per_s"])
            decode = one["ms_per_lap"] / two["ms_per_lap"]
            text = (
                f"Weak scaling 1 → 2 GPUs, {shape}, {SCALING[0]} → {SCALING[1]} (64 rows in every "
                f"slot): decode {decode:.3f}, whole job {job:.3f}."
            )
            lines += [text, ""]
    return lines


def boot_lines(ours: list[dict[str, Any]]) -> list[str]:
    """From the start of the processes to the first token, once per part."""
    lines = []
    for part in dict.fromkeys(record["part"] for record in ours):
        boot = next(record["boot"] for record in ours if record["part"] == part)
        text = (
            f"{part}: first token {boot['first_token_s']:.1f} s after the process started (meet "
            f"{number(boot['greet_s'], 1)}, import {number(boot['import_s'], 1)}, load "
            f"{number(boot['load_s'], 1)} of which graphs {number(boot['capture_s'], 1)})."
        )
        lines += [text, ""]
    return lines


def cpu_us(stage: dict[str, Any]) -> float | None:
    """Python per step of a rank, the head's scheduling included."""
    known = [stage[key] for key in ("cpu_us_per_step", "head_us_per_step") if stage[key]]
    return sum(known) if known else None


def number(value: float | None, digits: int = 0) -> str:
    """A figure, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share, or a dash."""
    return "–" if value is None else f"{value:.{digits}%}"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="All GPU benchmarks and tests of mpipipe.")
    parser.add_argument("--only", default="", help="comma-separated parts or their first letters")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu_results"))
    parser.add_argument("--budget", type=float, default=900.0, help="seconds for everything")
    parser.add_argument("--quick", action="store_true", help="tiny works, to try the script")
    parser.add_argument("--device", default="cuda", help="of transformers; cpu to try the script")
    parser.add_argument("--profile", default="", help="a shape: profile its first pipeline work")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    args = parser.parse_args()
    args.out = args.out.absolute()
    return args


def main() -> int:
    """Run the parts, print and write the table; 1 if any part failed."""
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [word for word in args.only.split(",") if word]
    parts = [
        part
        for part in all_parts(args)
        if not wanted or any(part.name.startswith(word) for word in wanted)
    ]
    if not parts:
        sys.exit(f"bench_gpu: no part begins with {args.only}")
    started_s = time.monotonic()
    results: list[Result] = []
    with (args.out / "log.txt").open("w", encoding="utf-8") as log:
        for part in parts:
            left_s = args.budget - (time.monotonic() - started_s)
            if left_s < 10:
                results.append(Result(part, 0.0, "no time left", [], []))
                continue
            print(f"== {part.name} …", flush=True)
            result = run(part, min(part.limit_s, left_s), log)
            results.append(result)
            tell(result)
    lines = table_lines(results, time.monotonic() - started_s)
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = [json.dumps(record) + "\n" for result in results for record in result.records]
    (args.out / "records.jsonl").write_text("".join(records), encoding="utf-8")
    print("", *lines, sep="\n", flush=True)
    return 1 if any(result.problem for result in results) else 0


def tell(result: Result) -> None:
    """A line per record; the end of the output where something went wrong."""
    for record in result.records:
        speed = record.get("error") or f"{record['tokens_per_s']:,.0f} tokens/s"
        print(f"   {record['work']}: {speed}", flush=True)
    print(f"   {result.seconds:.0f} s, {result.problem or 'ok'}", flush=True)
    if result.problem:
        print("\n".join(f"   | {line}" for line in result.last_lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
