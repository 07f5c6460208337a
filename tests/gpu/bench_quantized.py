"""Times products with weights of 8 bits beside bf16, and the ways to cut the streaming kernel.

    python3 -m tests.gpu.bench_quantized [--only table] [--quick] [--out FILE]

Prints, for the products of a layer of Llama-3-8B and OpenLLaMA-7B, the best cuts of the int8
kernel per number of rows, and one line for each shape and number of rows: microseconds of bf16
(torch; ours where it takes so few rows), int8 (streamed, dequantised) and fp8 (`_scaled_mm` with
the quantisation of the rows, streamed), the speed over the faster bf16, the bandwidth or TFLOP/s
of the fastest, and relative errors. A kernel that fails is one line and loses nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from mpipipe.models.kernels.linear import LinearTuning, launch_linear, small_linear
from mpipipe.models.kernels.quantized_linear import (
    dequantized_linear,
    linear_fp8,
    linear_int8,
    quantize_rows_fp8,
    quantized_tuning,
    scaled_mm_linear,
)
from tests.gpu.bench_timing import (
    DTYPE,
    Call,
    Report,
    attempt,
    copy_bandwidth,
    relative_error,
    time_us,
)

# q|k|v, output, gate|up, down: of Llama-3-8B, then what OpenLLaMA-7B has beside them
SHAPES = [
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
    (12288, 4096), (22016, 4096), (4096, 11008),
]  # fmt: skip
ROWS = (1, 4, 16, 32, 64, 256, 1024, 2048)
FP8 = torch.float8_e4m3fn
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# block_out, block_in, warps, stages, the most rows. Fewer than 4 warps, or than 64 outputs: mma
# instead of wgmma, whose operand layout makes the conversion cost twice the instructions.
FEW_ROWS_CUTS = [
    (64, 128, 2, 4, 64), (64, 128, 2, 6, 64), (64, 256, 2, 3, 64), (64, 64, 2, 5, 64),
    (32, 128, 2, 5, 64), (64, 64, 4, 4, 64), (64, 128, 4, 4, 64), (128, 64, 4, 4, 64),
]  # fmt: skip
MANY_ROWS_CUTS = [
    (64, 64, 4, 4, 128), (128, 64, 8, 4, 256), (128, 64, 8, 4, 128), (128, 64, 4, 4, 128),
    (128, 128, 8, 3, 128), (64, 64, 4, 3, 256),
]  # fmt: skip
SWEEPS = [
    (4, FEW_ROWS_CUTS), (32, FEW_ROWS_CUTS), (64, FEW_ROWS_CUTS), (128, MANY_ROWS_CUTS),
    (512, MANY_ROWS_CUTS),
]  # fmt: skip
ALLOWED_PIECES = (1, 2, 3, 4, 6, 8)  # every count is a kernel of its own to compile


@dataclass(frozen=True)
class Candidate:
    """A cut of a product, to be compiled and timed."""

    num_rows: int
    num_out: int
    num_in: int
    tuning: LinearTuning
    weight_dtype: torch.dtype = torch.int8

    @property
    def kernel(self) -> tuple[object, ...]:
        """What makes a kernel of its own."""
        rows = min(self.tuning.block_rows, max(self.tuning.least_rows, self.num_rows))
        tiled = self.num_rows > self.tuning.block_rows
        return (replace(self.tuning, block_rows=rows), tiled, self.weight_dtype)

    def run(self) -> None:
        """Compile and launch it, on weights of no meaning."""
        weight = torch.zeros(self.num_out, self.num_in, dtype=torch.int8, device="cuda")
        rows = torch.zeros(self.num_rows, self.num_in, dtype=DTYPE, device="cuda")
        scale = torch.zeros(self.num_out, device="cuda")
        launch_linear(rows, weight.view(self.weight_dtype), scale, None, self.tuning)


def cuts_of(
    num_rows: int, num_out: int, num_in: int, cuts: Sequence[tuple[int, int, int, int, int]]
) -> list[Candidate]:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    found = []
    for out, inner, warps, stages, rows in cuts:
        tiles = -(-num_out // out) * -(-num_rows // rows)
        wanted = {max(1.0, rounds * processors / tiles) for rounds in (1, 2, 4, 6)}
        near = {min(ALLOWED_PIECES, key=lambda count: abs(count - p)) for p in wanted} | {1}
        for pieces in sorted(near) if num_rows <= 128 else (1, 2):
            if num_in // pieces >= 2 * inner:
                tuning = LinearTuning(out, inner, pieces, warps, stages, 8, rows)
                found.append(Candidate(num_rows, num_out, num_in, tuning))
    return found


def compile_all(report: Report, candidates: Sequence[Candidate]) -> None:
    """Fill Triton's cache, in several processes; failures show when the kernels are timed."""
    unique = list({candidate.kernel: candidate for candidate in candidates}.values())
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    num_workers = max(1, min(12, multiprocessing.cpu_count() - 2))
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        failed = sum(not done for done in pool.map(compiles, unique))
    seconds = time.perf_counter() - started
    report.add("compiled", kernels=len(unique), failed=failed, seconds=seconds)


def compiles(candidate: Candidate) -> bool:
    try:
        candidate.run()
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


@dataclass
class Weights:
    """A weight in bf16, int8 and fp8; copies of each, together more than the L2 holds."""

    plain: list[torch.Tensor]
    int8: list[torch.Tensor]
    fp8: list[torch.Tensor]
    int8_scale: torch.Tensor
    fp8_scale: torch.Tensor

    @classmethod
    def drawn(cls, num_out: int, num_in: int) -> Weights:
        count = max(2, min(12, -(-(200 << 20) // (num_out * num_in))))
        weight = torch.randn(num_out, num_in, dtype=DTYPE, device="cuda") * num_in**-0.5
        largest = weight.float().abs().amax(dim=1)
        int8_scale, fp8_scale = largest / 127, largest / torch.finfo(FP8).max
        int8 = (weight.float() / int8_scale[:, None]).round().to(torch.int8)
        fp8 = (weight.float() / fp8_scale[:, None]).to(FP8)
        copies = [[each.clone() for _ in range(count)] for each in (weight, int8, fp8)]
        return cls(copies[0], copies[1], copies[2], int8_scale, fp8_scale)

    def measure(
        self,
        rows: torch.Tensor,
        kind: str,
        product: Product,
    ) -> dict[str, object]:
        """`product(rows, weight)` for all copies of the weight of `kind`."""
        weights: list[torch.Tensor] = getattr(self, kind)
        scale = {"plain": None, "int8": self.int8_scale, "fp8": self.fp8_scale}[kind]
        exact = weights[0].float() if scale is None else weights[0].float() * scale[:, None]
        torch.full((1 << 22,), float("nan"), device="cuda")  # what an unwritten output would show
        error = relative_error(product(rows, weights[0]), rows.float() @ exact.T)
        del exact
        calls: list[Call] = [partial(product, rows, weight) for weight in weights]
        us = time_us(calls, replays=5, least_calls=12)
        return {"us": us, "error": error}


def bench_sweep(report: Report, quick: bool) -> None:
    """The cuts of the int8 kernel, and of the float8 one for few rows."""
    shapes = [(6144, 4096), (28672, 4096), (4096, 14336), (4096, 4096)][: 1 if quick else None]
    plans = {
        (num_rows, num_out, num_in): cuts_of(num_rows, num_out, num_in, cuts)
        for num_out, num_in in shapes
        for num_rows, cuts in SWEEPS[: 1 if quick else None]
    }
    for (num_rows, num_out, num_in), found in list(plans.items()):
        if num_rows == 4:
            plans[-4, num_out, num_in] = [replace(c, weight_dtype=FP8) for c in found]
    compile_all(report, [candidate for found in plans.values() for candidate in found])
    for num_out, num_in in shapes:
        weights = Weights.drawn(num_out, num_in)
        for (num_rows, *sides), candidates in plans.items():
            if sides == [num_out, num_in]:
                sweep_one(report, weights, abs(num_rows), candidates)
        del weights


def sweep_one(
    report: Report, weights: Weights, num_rows: int, candidates: Sequence[Candidate]
) -> None:
    kind = "int8" if candidates[0].weight_dtype == torch.int8 else "fp8"
    num_out, num_in = weights.int8[0].shape
    rows = torch.randn(num_rows, num_in, dtype=DTYPE, device="cuda")
    scale = getattr(weights, f"{kind}_scale")
    timed: list[tuple[float, str]] = []
    for candidate in candidates:

        def product(
            x: torch.Tensor, w: torch.Tensor, tuning: LinearTuning = candidate.tuning
        ) -> torch.Tensor:
            return launch_linear(x, w, scale, None, tuning)

        try:
            row = weights.measure(rows, kind, product)
            us, error = float(str(row["us"])), float(str(row["error"]))
            text = cut_text(candidate.tuning) + ("" if error < 1e-2 else " WRONG")
        except Exception as problem:
            torch.cuda.synchronize()
            us, text = float("inf"), f"{cut_text(candidate.tuning)} {str(problem)[:60]!r}"
        timed.append((us, text))
    timed.sort()
    shown = [entry for entry in timed if entry[0] < float("inf")][:6]
    failed = [entry for entry in timed if entry[0] == float("inf") or "WRONG" in entry[1]][:3]
    best = " | ".join(f"{us:.1f} {text}" for us, text in [*shown, *failed])
    report.add("sweep", what=f"{kind} {num_out}x{num_in} T={num_rows}", best=best)
    report.rows.setdefault("all cuts", []).append({"of": f"{kind} {num_out} {num_in} {num_rows}",
                                                   "timed": timed})  # fmt: skip


def cut_text(tuning: LinearTuning) -> str:
    return (
        f"{tuning.block_out}x{tuning.block_in}r{tuning.block_rows}/{tuning.pieces} "
        f"{tuning.num_warps}w{tuning.num_stages}s"
    )


def bench_table(report: Report, quick: bool) -> None:
    """What the selection takes, beside everything that it could take."""
    for num_out, num_in in SHAPES[: 2 if quick else None]:
        weights = Weights.drawn(num_out, num_in)
        for num_rows in ROWS[:3] if quick else ROWS:
            table_line(report, weights, num_rows)
        del weights


def table_line(report: Report, weights: Weights, num_rows: int) -> None:
    num_out, num_in = weights.int8[0].shape
    rows = torch.randn(num_rows, num_in, dtype=DTYPE, device="cuda")
    scales = {"int8": weights.int8_scale, "fp8": weights.fp8_scale}
    tuning = quantized_tuning(num_rows, num_out, num_in, rows.device)

    def with_scale(kind: str, function: Callable[..., torch.Tensor]) -> Product:
        return lambda x, w: function(x, w, scales[kind], None)

    ways: list[tuple[str, str, Product]] = [("torch", "plain", linear)]
    if num_rows <= 32:
        ways.append(("ours", "plain", small_linear))
    ways.append(("chosen", "int8", with_scale("int8", linear_int8)))
    if num_rows <= 1024:
        streamed = partial(launch_linear, tuning=tuning)
        ways.append(("stream", "int8", with_scale("int8", streamed)))
        ways.append(("stream", "fp8", with_scale("fp8", streamed)))
    if num_rows >= 64:
        ways.append(("dequantised", "int8", with_scale("int8", dequantized_linear)))
        for mib in (32, 512):
            sliced = partial(dequantized_linear, max_bytes=mib << 20)
            ways.append((f"dequantised {mib}M", "int8", with_scale("int8", sliced)))
    ways.append(("chosen", "fp8", with_scale("fp8", linear_fp8)))
    ways.append(("mm", "fp8", with_scale("fp8", scaled_mm_linear)))
    found: dict[str, float] = {}
    cells = []
    for name, kind, product in ways:
        label = f"{ {'plain': 'bf16'}.get(kind, kind) } {name}"
        try:
            row = weights.measure(rows, kind, product)
        except Exception as problem:
            torch.cuda.synchronize()
            cells.append(f"{label} FAILED {str(problem).strip()[:80]!r}")
            continue
        found[label], error = float(str(row["us"])), float(str(row["error"]))
        wrong = "" if error < (6e-2 if kind == "fp8" else 1e-2) else " WRONG"
        cells.append(f"{label} {found[label]:.1f} ({error:.0e}{wrong})")
    base = min(found.get("bf16 torch", float("inf")), found.get("bf16 ours", float("inf")))
    speed = ", ".join(
        f"{kind} x{base / found[f'{kind} chosen']:.2f}"
        for kind in ("int8", "fp8")
        if f"{kind} chosen" in found
    )
    us = found.get("int8 chosen", float("inf"))
    rate = f"{num_out * num_in / us / 1e3:.0f} GB/s"
    if num_rows >= 256:
        rate = f"{2 * num_rows * num_out * num_in / us / 1e6:.0f} TFLOP/s"
    report.add("table", what=f"{num_out}x{num_in} T={num_rows}", speed=speed, int8=rate,
               us="; ".join(cells))  # fmt: skip
    report.rows.setdefault("numbers", []).append(
        {"out": num_out, "in": num_in, "rows": num_rows, **found}
    )


def bench_rows(report: Report, quick: bool) -> None:
    """The quantisation of activations alone."""
    for size in (4096, 14336):
        for num_rows in (4, 64, 2048)[: 1 if quick else None]:
            rows = torch.randn(num_rows, size, dtype=DTYPE, device="cuda")

            def measure(rows: torch.Tensor = rows) -> dict[str, object]:
                us = time_us([partial(quantize_rows_fp8, rows)])
                return {"us": us, "GB/s": 3 * rows.numel() / us / 1e3}

            attempt(report, "quantize_rows_fp8", f"T={num_rows} I={size}", measure)


BENCHES = {"table": bench_table, "rows": bench_rows, "sweep": bench_sweep}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=BENCHES)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report()
    print(torch.cuda.get_device_name(), torch.__version__)
    for name, bench in BENCHES.items():
        if arguments.only not in (None, name):
            continue
        try:
            bench(report, arguments.quick)
        except Exception as error:
            report.add("failed", what=name, error=f"{type(error).__name__}: {str(error)[:300]}")
        if arguments.out:
            text = json.dumps(report.rows, indent=1, default=str)
            arguments.out.write_text(text, encoding="utf-8")
    report.add("copy", GBps=copy_bandwidth() / 1e9)


if __name__ == "__main__":
    main()
