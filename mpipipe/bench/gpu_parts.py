"""All benchmarks and tests of the GPU engine, as parts to run on one machine.

Parts (one process or one mpirun each): `pipeline_<shape>`, `latency_<shape>` and `chunks_<shape>`
(pipeline.prefill = mixed instead of phases) on two GPUs, `single_<shape>` on one, `four_<shape>` on
four, `int8_<shape>` and `fp8_<shape>` on one (model.quantize), `fp8_pipeline_<shape>` on two,
`lanes_<shape>` on two that share one stage (pipeline.tensor_parallel), `offload_…` on one (weights
that stream from pinned host memory under a limit of GPU memory), `disk` on one (weights that stream
from a disk past the page cache, where a folder is given); on two, `prefix_<shape>`,
`prefix_each_<shape>` (shared pages read by each row, not once) and
`apart_<shape>` (prompts that begin alike, with and without sharing), `tail_<shape>` (a few long
outputs, and the same tokens at fixed lengths), `drafts_<shape>` and `undrafted_<shape>` (text that
is not foreseen), `drafts_copying` and `undrafted_copying` (text that repeats: `copying_model`),
`boot_cold_<shape>` and `boot_warm_<shape>` (a whole `mpipipe run` of few tokens, with an empty
kernel cache and with what that left), `file_bench_<shape>` and `file_run_<shape>` (10,000 prompts:
`bench throughput`, and a whole run from a file of them to the merged file); `predictions_<shape>`
on as many GPUs as there are, and on half and a quarter of them; `transformers_1` and
`transformers_2` (generate on one GPU, device_map over two), `tests_cold` and `tests_warm`
(launch/test_gpu.sh with an empty kernel cache, and with what that left). `gpu_suite` runs them,
`gpu_suite_table` and `gpu_suite_pairs` show what they left.

Figures are output tokens per second of a whole job, prefill included, with random weights, bf16,
greedy decoding and fixed lengths unless a work says mixed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from mpipipe.bench.copying_model import write_copying_model
from mpipipe.bench.gpu_suite import Part, SuiteOptions, mpirun_command
from mpipipe.bench.whole_run import KernelCache, WholeRun
from mpipipe.bench.workloads import BenchWork, quick_work
from mpipipe.errors import ConfigError

__all__ = ["COPYING", "SHAPES", "all_parts"]

SHAPES = ("openllama_3b", "llama3_8b")
COPYING = "copying"  # the name of the shape whose text repeats

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
# Weak scaling to four GPUs, held against `single_` and `pipeline_` at 64 rows in every slot.
_FOUR = dict.fromkeys(SHAPES, ("256x512x128",))
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
# Random weights do not copy what a prompt repeats: nothing is foreseen, which must cost nothing.
# Drafts may be made for all works of a process in which one repeats.
_UNFORESEEN = {"openllama_3b": ("1x512x128", "1x512x128xrepeat")}
_REPEATING = ("1x512x128xrepeat", "1x512x512xrepeat")
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
# All layers and the LM head pass from the disk for each of eight steps: 12.2 GiB a step.
_DISK = (
    "openllama_7b",
    (
        "memory.device_bytes=11.5GiB memory.host_bytes=1GiB memory.num_kv_pages=1104 "
        "pipeline.max_sequences_per_slot=32"
    ),
    "32x128x8",
)
# On a CPU, where there are no pinned buffers: about half of the weights of SmolLM2 in float32.
_QUICK_DISK = "memory.device_bytes=300MiB memory.host_bytes=0"
_PREDICTED = (*SHAPES, "llama32_3b")
_PREDICTED_WORKS = ("256x512x128", "256xmixed")
_QUICK_PREDICTED_WORKS = ("4x16x8", "1xmixed")
# Small enough that the slowest (32 tokens/s) takes 4 s.
_TRANSFORMERS = ("1x512x128", "32x512x128")


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
    limit_s: float = 120.0,
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
    command += ["--json", str(json_path)]
    return Part(name, command, limit_s, json_path, labels, about_s=_about_s(works))


def _about_s(works: tuple[str, ...]) -> float:
    """A start, and for each work its warm-up and some seconds (estimated, for one or two H100)."""
    return 25.0 + 7.0 * len(works)


def _short(variant: str) -> str:
    """Of the first setting, without its section."""
    return variant.partition(" ")[0].partition(".")[2]


def _works(works: tuple[str, ...], options: SuiteOptions) -> tuple[str, ...]:
    if not options.quick:
        return works
    return tuple(dict.fromkeys(quick_work(BenchWork.parse(work)).name for work in works))


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
        folder=options.scratch / f"{name}_{shape}",
        kernels=kernels,
    )
    command = [*mpirun_command(2), *_MPIPIPE, *run.words]
    labels = {"shape": shape, "ranks": 2, "variant": ""}
    part_name = f"{name}_{shape}"
    return Part(part_name, command, 120.0, labels=labels, whole_run=run, about_s=35.0)


def _transformers_part(name: str, device_map: str, options: SuiteOptions) -> Part:
    """`bench transformers` of the first shape."""
    command = _bench("transformers", SHAPES[0], options)
    command += ["--device", options.device, "--device-map", device_map]
    command += [word for work in _works(_TRANSFORMERS, options) for word in ("--work", work)]
    labels = {"shape": SHAPES[0], "ranks": name[-1]}
    return Part(name, command, 75.0, None, labels, about_s=60.0)


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


def _draft_parts(options: SuiteOptions) -> list[Part]:
    """Text that is not foreseen, and text that repeats, each with drafts and without."""
    folder = options.scratch / "copying_model"
    shape = options.root / "configs" / "shapes" / SHAPES[0]
    if paths := [word for word in options.overrides if word.startswith("model.path=")]:
        shape = options.root / paths[-1].partition("=")[2]
    write = partial(write_copying_model, shape.absolute(), folder)
    parts = []
    for kind, variant in (("drafts", ""), ("undrafted", "pipeline.num_speculative_tokens=0")):
        for own, works in _UNFORESEEN.items():
            parts.append(_throughput_part(f"{kind}_{own}", own, works, 2, options, variant=variant))
        settings = f"{variant} model.path={folder} model.weights=checkpoint".strip()
        name = f"{kind}_{COPYING}"
        part = _throughput_part(name, SHAPES[0], _REPEATING, 2, options, variant=settings)
        labels = {**part.labels, "shape": COPYING, "variant": _short(variant)}
        parts.append(replace(part, before=write, labels=labels, about_s=60.0))
    return parts


def _disk_part(options: SuiteOptions) -> Part:
    """Weights from a disk, past the page cache; the script measures the disk by itself first."""
    shape, settings, work = _DISK
    if options.quick:
        settings = _QUICK_DISK
    settings += f" memory.offload_dir={options.disk}"
    part = _throughput_part("disk", shape, (work,), 1, options, variant=settings, limit_s=420.0)
    script = options.root / "launch" / "bench_disk.py"
    size = "64MiB" if options.quick else "4GiB"
    words = [sys.executable, str(script), str(options.disk), "--size", size]
    labels = {**part.labels, "variant": "from disk"}
    return replace(
        part, command=[*words, "--json", str(part.json_path), "--", *part.command], labels=labels,
        about_s=200.0,
    )  # fmt: skip


def _prediction_part(shape: str, options: SuiteOptions) -> Part:
    """Forecasts of a shape beside what is measured, on all GPUs and on fewer."""
    name = f"predictions_{shape}"
    ranks = [number for number in (4, 2, 1) if number <= options.num_gpus]
    folder = options.scratch / name
    works = _QUICK_PREDICTED_WORKS if options.quick else _PREDICTED_WORKS
    model = options.root / "configs" / "shapes" / shape
    words = [sys.executable, str(options.root / "launch" / "bench_predictions.py")]
    words += ["--config", str(options.root / "configs" / "bench_gpu.toml")]
    words += ["--ranks", ",".join(map(str, ranks)), "--models", str(model)]
    words += ["--works", ",".join(works), "--out", str(folder), "--limit-s", "240"]
    words += [] if options.device == "cpu" else ["--measure-once"]
    labels = {"shape": shape, "variant": ""}
    about_s = 45.0 + 30.0 * len(ranks) * len(works)
    words += options.overrides
    return Part(name, words, 255.0, folder / "records.jsonl", labels, about_s=about_s)


def _test_parts(options: SuiteOptions) -> list[Part]:
    """The GPU tests with a cold and a warm kernel cache; those that need ranks start them."""
    kernels = options.scratch / "test_kernels"
    command = ["bash", str(options.root / "launch" / "test_gpu.sh")]
    # By name as they end: what a limit cuts off has told of its failures by then.
    environ = {"TRITON_CACHE_DIR": str(kernels), "PYTEST_ADDOPTS": "-vv"}
    found: list[Part] = []
    befores: dict[str, Callable[[], object]] = {
        "tests_cold": partial(_emptied, kernels),
        "tests_warm": partial(_filled, kernels),
    }
    for name, before in befores.items():
        part = Part(name, command, 300.0, environ=environ, before=before, about_s=260.0)
        found.append(replace(part, has_tests=True))
    return found


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _filled(folder: Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ConfigError(
            f"there are no compiled kernels in {folder}: let tests_cold with the same --scratch go "
            "before"
        )


def all_parts(options: SuiteOptions) -> list[Part]:
    """In the order to run them: the figures of the table first, they matter most.

    Left out: what needs more GPUs than there are.
    """
    throughput = (
        ("pipeline", 2, "", _PIPELINE),
        ("latency", 2, "", _LATENCY),
        ("chunks", 2, "pipeline.prefill=mixed", _MIXED_PREFILL),
        ("single", 1, "", _SINGLE),
        ("four", 4, "", _FOUR),
        ("int8", 1, "model.quantize=int8", _QUANTIZED),
        ("fp8", 1, "model.quantize=fp8", _QUANTIZED),
        ("lanes", 2, "pipeline.tensor_parallel=2", _LANES),
        ("fp8_pipeline", 2, "model.quantize=fp8", _QUANTIZED_PIPELINE),
        ("prefix", 2, "memory.share_prefixes=true", _PREFIX),
        ("prefix_each", 2, "memory.read_prefixes_once=false", _PREFIX),
        ("apart", 2, "memory.share_prefixes=false", _PREFIX),
        ("tail", 2, "", _TAIL),
    )
    parts = [
        _throughput_part(f"{kind}_{shape}", shape, works, ranks, options, variant=variant)
        for kind, ranks, variant, by_shape in throughput
        for shape, works in by_shape.items()
    ]
    parts += _draft_parts(options)
    parts += [
        _throughput_part(name, shape, works, 1, options, variant=settings)
        for name, (shape, settings, works) in _OFFLOAD.items()
    ]
    parts += [_disk_part(options)] if options.disk is not None else []
    parts += [*_whole_run_parts(options), _transformers_part("transformers_1", "none", options)]
    if options.device == "cuda":
        parts.append(_transformers_part("transformers_2", "auto", options))
    parts += [_prediction_part(shape, options) for shape in _PREDICTED]
    parts = [part for part in parts if _num_gpus(part) <= options.num_gpus]
    return [*parts, *_test_parts(options)]


def _num_gpus(part: Part) -> int:
    return int(part.labels.get("ranks", 1))
