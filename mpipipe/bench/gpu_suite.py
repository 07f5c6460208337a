"""All benchmarks and tests of the GPU engine, as parts to run on one machine.

Parts (one process or one mpirun each): `pipeline_<shape>`, `latency_<shape>` and `chunks_<shape>`
(pipeline.prefill = mixed instead of phases) on two GPUs, `single_<shape>` on one, `int8_<shape>`
and `fp8_<shape>` on one (model.quantize), `fp8_pipeline_<shape>` on two, `lanes_<shape>` on two
that share one stage (pipeline.tensor_parallel), `offload_…` on one (weights that stream from pinned
host memory under a limit of GPU memory); on two, `prefix_<shape>` and `apart_<shape>` (prompts that
begin alike, with and without sharing), `tail_<shape>` (a few long outputs, and the same tokens at
fixed lengths), `drafts_<shape>` and `undrafted_<shape>` (text that repeats), `boot_cold_<shape>`
and `boot_warm_<shape>` (a whole `mpipipe run` of few tokens, with an empty kernel cache and with
what that left), `file_bench_<shape>` and `file_run_<shape>` (10,000 prompts: `bench throughput`,
and a whole run from a file of them to the merged file); `transformers_1` and `transformers_2`
(generate on one GPU, device_map over two), `tests` (launch/test_gpu.sh). `launch/bench_gpu.py` runs
them, `gpu_suite_table` shows what they left.

Figures are output tokens per second of a whole job, prefill included, with random weights, bf16,
greedy decoding and fixed lengths unless a work says mixed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from mpipipe.bench.whole_run import KernelCache, WholeRun
from mpipipe.errors import EnvironmentSetupError, MpipipeError

__all__ = [
    "SHAPES",
    "Part",
    "Result",
    "SuiteOptions",
    "all_parts",
    "mpirun_command",
    "run_part",
]

SHAPES = ("openllama_3b", "llama3_8b")
_QUICK = ("4x16x8", "1x16x8")

# The order matters: the trace shows the last work of the first part, so that comes last there.
_PIPELINE = {
    "openllama_3b": (
        "1x512x128", "32x512x128", "128x512x128", "128x1024x256", "512x512x128", "512xmixed",
        "64x512x128",
    ),
    "llama3_8b": ("64x512x128", "128x512x128", "128x1024x256", "512x512x128"),
}  # fmt: skip
# A plan is balanced for the largest work of its process, so a batch of one has a process of its own
# where that changes the split (the LM head weighs as much as 2.4 layers of Llama-3-8B).
_LATENCY = {"llama3_8b": ("1x512x128",)}
_SINGLE = {
    "openllama_3b": ("1x512x128", "32x512x128", "64x512x128", "128x1024x256", "512x512x128"),
    "llama3_8b": ("1x512x128", "64x512x128", "128x1024x256", "512x512x128"),
}
# Prompt chunks between the decode steps, for requests that arrive over time: what that costs a job
# whose prompts are all there, for which prompts come first (phases, the default of a run).
_MIXED_PREFILL = {"openllama_3b": ("512xmixed",)}
# Held against `single_` and `pipeline_`: decode of few rows, of many, and a job with much prefill.
_QUANTIZED = {"llama3_8b": ("1x512x128", "64x512x128", "512x512x128")}
# Two GPUs as the lanes of one stage, held against `single_` and against the same GPUs as stages.
_LANES = {"llama3_8b": ("1x512x128", "64x512x128", "512x512x128")}
_QUANTIZED_PIPELINE = {"llama3_8b": ("512x512x128",)}
# Of 1,152 tokens 1,024 are the same in all prompts; 512x512x128 shares nothing: what looking costs.
_PREFIX = dict.fromkeys(SHAPES, ("512x1024+128x16", "512x1024+128x128", "512x512x128"))
_TAIL = dict.fromkeys(
    SHAPES, ("512xmixed", "512xmixedxeven", "2000x512x64xtail", "2000x512x64xtailxeven")
)
_REPEATING = {"openllama_3b": ("1x512x128xrepeat", "1x512x512xrepeat")}
# Enough prompts for steps of many rows; what it makes matters less than when.
_BOOT = "32x128x8"
# 760 prompts a second by forecast: few tokens each, so that rank 0 has much to do.
_FILE = "10000x128x32"
# Under a limit of GPU memory. A number of pages keeps the rows, which the plan would lower else.
_OFFLOAD = {
    "offload_32_rows": (
        "openllama_7b",
        "memory.device_bytes=11.5GiB memory.num_kv_pages=1104 pipeline.max_sequences_per_slot=32",
        ("32x512x32",),
    ),
    "offload_512_rows": (
        "openllama_7b",
        "memory.device_bytes=26GiB memory.num_kv_pages=2816 pipeline.max_sequences_per_slot=512",
        ("512x64x16",),
    ),
    "offload_half": (
        "openllama_7b",
        "memory.device_bytes=17GiB memory.num_kv_pages=1104 pipeline.max_sequences_per_slot=32",
        ("32x512x32",),
    ),
    "offload_4gb": ("openllama_7b", "memory.device_bytes=4GB", ("16x256x32",)),
    "offload_8gb": ("llama3_8b", "memory.device_bytes=8GB", ("64x512x32",)),
    "offload_16gb": ("opt_6p7b", "memory.device_bytes=16GB", ("64x512x32",)),
}  # fmt: skip
# Small enough that the slowest (32 tokens/s) takes 4 s.
_TRANSFORMERS = ("1x512x128", "32x512x128")


@dataclass(frozen=True, slots=True)
class SuiteOptions:
    """What all parts share."""

    root: Path  # of the source tree whose mpipipe is measured
    out: Path  # where results go
    device: str = "cuda"  # of transformers; cpu to try the suite
    quick: bool = False  # tiny works, to try the suite
    profile: str = ""  # a shape: profile its first pipeline work
    overrides: tuple[str, ...] = ()  # section.key=value for every run


@dataclass(frozen=True)
class Part:
    """One thing to run."""

    name: str
    command: list[str]
    limit_s: float
    json_path: Path | None = None  # where the records appear, one by one; None: on standard output
    labels: dict[str, Any] = field(default_factory=dict)  # added to each record
    whole_run: WholeRun | None = None  # the record is made of what it left


@dataclass
class Result:
    """What became of a part."""

    part: Part
    seconds: float
    problem: str  # "" when all went well
    records: list[dict[str, Any]]
    last_lines: list[str]


def mpirun_command(num_ranks: int) -> list[str]:
    """The launcher with what it needs here."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which("mpirun", path=beside) or shutil.which("mpiexec", path=beside)
    if found is None:
        raise EnvironmentSetupError("there is no mpirun: install an MPI, or mpipipe[mpich]")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    command = [found, "-n", str(num_ranks)]
    if "Open MPI" in version.stdout or "OpenRTE" in version.stdout:
        # Bound to one core each, as Open MPI does for two ranks, launching and polling would fight.
        command += ["--bind-to", "none", "--oversubscribe"]
        command += ["--allow-run-as-root"] if os.getuid() == 0 else []
    return command


_MPIPIPE = (sys.executable, "-m", "mpipipe")


def _bench(kind: str, shape: str, options: SuiteOptions) -> list[str]:
    """`mpipipe bench <kind>` of a shape."""
    config = options.root / "configs" / "bench_gpu.toml"
    return [*_MPIPIPE, "bench", kind, str(config), *_settings(shape, options)]


def _settings(shape: str, options: SuiteOptions) -> tuple[str, ...]:
    return (f"model.path={options.root / 'configs' / 'shapes' / shape}", *options.overrides)


def _throughput_part(
    name: str,
    shape: str,
    works: tuple[str, ...],
    num_ranks: int,
    options: SuiteOptions,
    *,
    variant: str,
) -> Part:
    """`bench throughput` of a shape. `variant`: settings and their values."""
    json_path = options.out / f"{name}.jsonl"
    command = [*mpirun_command(num_ranks), *_bench("throughput", shape, options)]
    command += variant.split()
    command += [word for work in _works(works, options) for word in ("--work", work)]
    if name == f"pipeline_{SHAPES[0]}":
        command += ["--trace", str(options.out / "trace.json"), "--trace-steps", "50"]
    if options.profile and name == f"pipeline_{options.profile}":
        command += ["--profile", str(options.out / "profile.json")]
    labels = {"shape": shape, "ranks": num_ranks, "variant": _short(variant)}
    return Part(name, [*command, "--json", str(json_path)], 100.0, json_path, labels)


def _short(variant: str) -> str:
    """Of the first setting, without its section."""
    return variant.partition(" ")[0].partition(".")[2]


def _works(works: tuple[str, ...], options: SuiteOptions) -> tuple[str, ...]:
    return _QUICK if options.quick else works


def _whole_run_part(
    name: str,
    shape: str,
    work: str,
    options: SuiteOptions,
    *,
    kernels: KernelCache = "",
    more: tuple[str, ...] = (),
) -> Part:
    """A whole `mpipipe run` of a shape over two ranks. `more`: settings."""
    run = WholeRun(
        work=_works((work,), options)[0],
        config=options.root / "configs" / "bench_gpu.toml",
        settings=(*_settings(shape, options), *more),
        folder=options.out / f"{name}_{shape}",
        kernels=kernels,
    )
    command = [*mpirun_command(2), *_MPIPIPE, *run.words]
    labels = {"shape": shape, "ranks": 2, "variant": ""}
    return Part(f"{name}_{shape}", command, 100.0, labels=labels, whole_run=run)


def _transformers_part(name: str, device_map: str, options: SuiteOptions) -> Part:
    """`bench transformers` of the first shape."""
    command = _bench("transformers", SHAPES[0], options)
    command += ["--device", options.device, "--device-map", device_map]
    command += [word for work in _works(_TRANSFORMERS, options) for word in ("--work", work)]
    return Part(name, command, 75.0, None, {"shape": SHAPES[0], "ranks": name[-1]})


def _whole_run_parts(options: SuiteOptions) -> list[Part]:
    """Starts, the warm one behind the cold one, and a file beside the bench of its work."""
    shape = SHAPES[0]
    return [
        _whole_run_part("boot_cold", shape, _BOOT, options, kernels="cold"),
        _whole_run_part("boot_warm", shape, _BOOT, options, kernels="warm"),
        _throughput_part(f"file_bench_{shape}", shape, (_FILE,), 2, options, variant=""),
        # Without drafts, as `bench throughput` does works that do not repeat.
        _whole_run_part(
            "file_run", shape, _FILE, options, more=("pipeline.num_speculative_tokens=0",)
        ),
    ]


def all_parts(options: SuiteOptions) -> list[Part]:
    """In the order to run them: the figures of the table first, they matter most."""
    throughput = (
        ("pipeline", 2, "", _PIPELINE),
        ("latency", 2, "", _LATENCY),
        ("chunks", 2, "pipeline.prefill=mixed", _MIXED_PREFILL),
        ("single", 1, "", _SINGLE),
        ("int8", 1, "model.quantize=int8", _QUANTIZED),
        ("fp8", 1, "model.quantize=fp8", _QUANTIZED),
        ("lanes", 2, "pipeline.tensor_parallel=2", _LANES),
        ("fp8_pipeline", 2, "model.quantize=fp8", _QUANTIZED_PIPELINE),
        ("prefix", 2, "memory.share_prefixes=true", _PREFIX),
        ("apart", 2, "memory.share_prefixes=false", _PREFIX),
        ("tail", 2, "", _TAIL),
        ("drafts", 2, "", _REPEATING),
        ("undrafted", 2, "pipeline.num_speculative_tokens=0", _REPEATING),
    )
    parts = [
        _throughput_part(f"{kind}_{shape}", shape, works, ranks, options, variant=variant)
        for kind, ranks, variant, by_shape in throughput
        for shape, works in by_shape.items()
    ]
    parts += [
        _throughput_part(name, shape, works, 1, options, variant=settings)
        for name, (shape, settings, works) in _OFFLOAD.items()
    ]
    parts += [*_whole_run_parts(options), _transformers_part("transformers_1", "none", options)]
    if options.device == "cuda":
        parts.append(_transformers_part("transformers_2", "auto", options))
    # The GPU tests; those that need ranks start them themselves.
    tests = ["bash", str(options.root / "launch" / "test_gpu.sh")]
    return [*parts, Part("tests", tests, 420.0)]


def run_part(part: Part, root: Path, limit_s: float, log: TextIO) -> Result:
    """Run one part, at most `limit_s`; its output goes to the log."""
    if part.json_path is not None:
        part.json_path.unlink(missing_ok=True)
    output, problem, seconds = "", "", 0.0
    records: list[dict[str, Any]] = []
    try:
        if part.whole_run is None:
            output, problem, seconds = _ran(part, {}, root, limit_s, log)
            records = _records_of(part, output)
        else:
            part.whole_run.prepare()
            if part.whole_run.kernels:
                _read_libraries(root, limit_s)
            environ = part.whole_run.environ
            output, problem, seconds = _ran(part, environ, root, limit_s, log)
            if not problem:
                record = part.whole_run.record(seconds)
                records = [{"part": part.name, **part.labels, **record}]
    except MpipipeError as error:
        problem = str(error)
    except (KeyError, TypeError, OSError) as error:
        # Such as files of another tree that lack what this one reads.
        problem = f"not measured, {type(error).__name__}: {error}"
    finally:
        if part.whole_run is not None and not records:
            part.whole_run.failed()
    shown = [line for line in output.splitlines() if not line.startswith("{")]
    return Result(part, seconds, problem, records, shown[-25:])


def _read_libraries(root: Path, limit_s: float) -> None:
    """Have a start find its libraries in memory: it is the kernels that are cold or warm.

    The first start on a machine would read some gigabytes of them from disk.
    """
    log = subprocess.DEVNULL  # the start that follows says what is missing
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-c", "import torch, transformers"],
            cwd=root,
            env=_environ(root),
            stdout=log,
            stderr=log,
            timeout=limit_s,
            check=False,
        )


def _ran(
    part: Part, environ: Mapping[str, str], root: Path, limit_s: float, log: TextIO
) -> tuple[str, str, float]:
    """The part's output, what went wrong, and its seconds."""
    log.write(f"\n==== {part.name}: {' '.join(part.command)}\n")
    log.flush()
    started_s = time.monotonic()
    process = subprocess.Popen(
        part.command,
        cwd=root,
        env={**_environ(root), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",  # a rank that is killed may leave half a character
        start_new_session=True,
    )
    problem = ""
    try:
        output, _ = process.communicate(timeout=limit_s)
        if process.returncode:
            problem = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        problem = f"stopped after {limit_s:.0f} s"
        output = _end(process)
    except BaseException:
        _end(process)  # no interrupt of ours reaches a session of its own
        raise
    seconds = time.monotonic() - started_s
    log.write(output)
    log.flush()
    return output, problem, seconds


def _environ(root: Path) -> dict[str, str]:
    """Of everything that is started: mpipipe is that of the tree to measure."""
    python_path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path}
    return {**os.environ, **own}


def _end(process: subprocess.Popen[str]) -> str:
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


def _records_of(part: Part, output: str) -> list[dict[str, Any]]:
    """The JSON records that a part left, also one that failed halfway.

    What tests print may be JSON too (a line of a log), and is no record.
    """
    lines = output.splitlines() if part.labels else []
    if part.json_path is not None:
        found_file = part.json_path.is_file()
        lines = part.json_path.read_text("utf-8", "replace").splitlines() if found_file else []
        part.json_path.unlink(missing_ok=True)
    found = []
    for line in lines:
        if line.startswith("{"):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line cut off when the part was stopped
            if "work" in record:
                found.append({"part": part.name, **part.labels, **record})
    return found
