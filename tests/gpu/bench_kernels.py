"""Times the kernels of `mpipipe.models.kernels` on a GPU against torch, and checks them on the way.

    python -m tests.gpu.bench_kernels [--quick] [--only NAME] [--out FILE.json]

Prints one line per measurement as it comes and the tables last. A variant that fails is one line.
Times are per call inside a CUDA graph of many calls, the median over replays; inputs rotate among
copies larger than the L2. Fractions are of the bandwidth of a large device-to-device copy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import (
    linear,
    scaled_dot_product_attention,
    silu,
)
from torch.nn.functional import (
    rms_norm as torch_rms_norm,
)

from mpipipe.models.kernels import probe
from mpipipe.models.kernels.decode_attention import DecodeTuning, paged_decode_attention
from mpipipe.models.kernels.linear import LinearTuning, default_tuning, small_linear
from mpipipe.models.kernels.prefill_attention import (
    Chunks,
    PrefillTuning,
    paged_prefill_attention,
)
from mpipipe.models.kernels.rotary import rotate_and_store
from mpipipe.models.kernels.rowwise import add_rms_norm, gated_silu, rms_norm
from mpipipe.models.layer_options import AttentionOptions
from tests.gpu.bench_layer import bench_layer
from tests.gpu.bench_timing import (
    DTYPE,
    PAGE_SIZE,
    Call,
    Report,
    attempt,
    copy_bandwidth,
    poison,
    relative_error,
    time_us,
)

# ---- decode attention ----------------------------------------------------------------------------


@dataclass
class Cached:
    """Caches of random content; several page tables of random pages that share nothing."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tables: list[torch.Tensor]
    kv_lens: torch.Tensor
    options: AttentionOptions
    max_kv_len: int

    def num_bytes(self) -> int:
        _, _, num_kv_heads, head_dim = self.keys.shape
        return int(self.kv_lens.sum()) * num_kv_heads * head_dim * 2 * self.keys.element_size()

    def calls(self, tuning: DecodeTuning | None) -> list[Call]:
        return [partial(self.run, table, tuning) for table in self.tables]

    def run(self, table: torch.Tensor, tuning: DecodeTuning | None) -> torch.Tensor:
        return paged_decode_attention(
            self.query, self.keys, self.values, table, self.kv_lens,
            max_kv_len=self.max_kv_len, options=self.options, tuning=tuning,
        )  # fmt: skip

    def reference(self, row: int) -> torch.Tensor:
        """Row `row` over the first page table, written out in float32: [H, D]."""
        kv_len = int(self.kv_lens[row])
        pages = self.tables[0][row, : -(-kv_len // PAGE_SIZE)].long()
        key, value = (
            cache[pages].flatten(0, 1)[:kv_len].float() for cache in (self.keys, self.values)
        )
        repeat = self.query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeat, dim=1) for part in (key, value))
        scores = torch.einsum("hd,lhd->hl", self.query[row].float(), key) * self.options.scale
        return torch.einsum("hl,lhd->hd", scores.softmax(dim=-1), value)

    def error(self, tuning: DecodeTuning | None) -> float:
        poison()
        actual = self.run(self.tables[0], tuning)
        rows = sorted({0, len(actual) // 2, len(actual) - 1})
        return relative_error(actual[rows], torch.stack([self.reference(row) for row in rows]))


def cached(
    num_rows: int, heads: tuple[int, int, int], lens: tuple[int, int], layout: str = "head-major"
) -> Cached:
    """`heads`: H, K, D; `lens`: shortest and longest; layout: `head-major:104` pads rows to 104."""
    num_heads, num_kv_heads, head_dim = heads
    max_pages = -(-lens[1] // PAGE_SIZE)
    row_bytes = max_pages * PAGE_SIZE * num_kv_heads * head_dim * 4
    num_tables = max(1, min(16, -(-(300 << 20) // (num_rows * row_bytes))))
    num_pages = num_tables * num_rows * max_pages
    major, _, padded = layout.partition(":")
    row = int(padded or head_dim)

    def one() -> torch.Tensor:
        if major == "token-major":
            cells = torch.empty(num_pages, PAGE_SIZE, num_kv_heads, row, dtype=DTYPE, device="cuda")
        else:
            cells = torch.empty(num_pages, num_kv_heads, PAGE_SIZE, row, dtype=DTYPE, device="cuda")
        cells.normal_()
        cells[..., head_dim:] = 0
        cache = cells[..., :head_dim]
        return cache if major == "token-major" else cache.transpose(1, 2)

    query = torch.randn(num_rows, num_heads, head_dim, dtype=DTYPE, device="cuda")
    pages = torch.randperm(num_pages, device="cuda").int().view(num_tables, num_rows, max_pages)
    kv_lens = torch.randint(lens[0], lens[1] + 1, (num_rows,), device="cuda").int()
    options = AttentionOptions(head_dim**-0.5)
    return Cached(query, one(), one(), list(pages.unbind()), kv_lens, options, lens[1])


def measured_decode(
    report: Report, table: str, label: str, held: Cached, tuning: DecodeTuning | None
) -> float:
    def measure() -> dict[str, object]:
        error = held.error(tuning)
        us = time_us(held.calls(tuning), least_calls=4 if held.num_bytes() > 1e9 else 20)
        bandwidth = held.num_bytes() / us * 1e6
        return {
            "us": us,
            "GB/s": bandwidth / 1e9,
            "of_copy": bandwidth / report.copy_bandwidth,
            "error": f"{error:.1e}" + ("" if error < 2e-2 else " WRONG"),
        }

    return attempt(report, table, label, measure)


# Tokens of a block, warps, stages. Triton keeps a stage for the page numbers: 3 stages hold one
# block of K and V in flight, 5 hold two.
DECODE_TUNINGS = [(64, 2, 3), (32, 2, 3), (64, 4, 3), (32, 2, 5), (64, 2, 2)]
DECODE_SHAPES: list[tuple[str, int, tuple[int, int, int], tuple[int, int]]] = [
    ("3B 1x512", 1, (32, 32, 100), (512, 640)),
    ("3B 16x512", 16, (32, 32, 100), (512, 640)),
    ("3B 64x512", 64, (32, 32, 100), (512, 640)),
    ("3B 128x1024", 128, (32, 32, 100), (1024, 1280)),
    ("8B 1x512", 1, (32, 8, 128), (512, 640)),
    ("8B 16x512", 16, (32, 8, 128), (512, 640)),
    ("8B 128x1024", 128, (32, 8, 128), (1024, 1280)),
    ("8B 256x512", 256, (32, 8, 128), (512, 640)),
    ("D64 256x512", 256, (9, 3, 64), (512, 640)),
    ("D80 128x512", 128, (32, 32, 80), (512, 640)),
    ("D96 128x512", 128, (32, 32, 96), (512, 640)),
]


def bench_decode(report: Report, quick: bool) -> None:
    heads, lens = (32, 32, 100), (512, 640)
    tunings = [DecodeTuning(*numbers) for numbers in DECODE_TUNINGS][: 2 if quick else None]
    for layout in ("head-major:104", "head-major", "head-major:128", "token-major"):
        held = cached(256, heads, lens, layout)
        for tuning in tunings:
            label = f"{layout:15s} {tuning_text(tuning)}"
            measured_decode(report, "decode 3B 256x512", label, held, tuning)
        del held
    for label, num_rows, shape, span in DECODE_SHAPES[: 5 if quick else None]:
        held = cached(num_rows, shape, span, f"head-major:{-(-shape[2] // 8) * 8}")
        measured_decode(report, "decode shapes", label, held, None)
        for pieces in (1, 2, 4, 8, 12) if num_rows <= 64 else ():
            fixed = DecodeTuning(pieces=pieces)
            measured_decode(report, "decode pieces", f"{label} pieces {pieces}", held, fixed)
        del held


def tuning_text(tuning: DecodeTuning) -> str:
    return f"{tuning.block_tokens}/{tuning.num_warps}w/{tuning.num_stages}s"


# ---- prefill -------------------------------------------------------------------------------------


@dataclass
class Prompts:
    """A batch of fresh prompts of one length, their K and V also as plain rows."""

    held: Cached
    query_THD: torch.Tensor
    starts_B1: torch.Tensor
    length: int

    def plain(self, cache: torch.Tensor) -> torch.Tensor:
        """[T, H, D]: the cached rows of all prompts, one for every query head."""
        rows = cache[self.held.tables[0].long()].flatten(0, 2)
        return rows.repeat_interleave(self.query_THD.shape[1] // rows.shape[1], dim=1)

    def batched(self, rows_THD: torch.Tensor) -> torch.Tensor:
        """[B, H, L, D]."""
        return rows_THD.view(-1, self.length, *rows_THD.shape[1:]).transpose(1, 2)

    def ours(self, tuning: PrefillTuning | None) -> torch.Tensor:
        held = self.held
        return paged_prefill_attention(
            self.query_THD, held.keys, held.values, held.tables[0], held.kv_lens,
            chunks=Chunks(self.starts_B1, self.length), options=held.options, tuning=tuning,
        )  # fmt: skip

    def sdpa(self, key_THD: torch.Tensor, value_THD: torch.Tensor) -> torch.Tensor:
        query, key, value = (self.batched(rows) for rows in (self.query_THD, key_THD, value_THD))
        scale = self.held.options.scale
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return out.transpose(1, 2).flatten(0, 1)

    def varlen(self, key_THD: torch.Tensor, value_THD: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            self.query_THD, key_THD, value_THD, self.starts_B1, self.starts_B1,
            self.length, self.length, window_size=(-1, 0),
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out


PREFILL_TUNINGS = [None, PrefillTuning(128, 64, 8, 2), PrefillTuning(128, 128, 8, 2)]
PREFILL_SHAPES = [
    ("8B 4x2048", 4, (32, 8, 128), 2048),
    ("3B 16x512", 16, (32, 32, 100), 512),
    ("8B 16x512", 16, (32, 8, 128), 512),
    ("D64 16x512", 16, (9, 3, 64), 512),
]


def bench_prefill(report: Report, quick: bool) -> None:
    for label, batch, heads, length in PREFILL_SHAPES[: 2 if quick else None]:
        num_heads, _, head_dim = heads
        held = cached(batch, heads, (length, length), f"head-major:{-(-head_dim // 8) * 8}")
        query = torch.randn(batch * length, num_heads, head_dim, dtype=DTYPE, device="cuda")
        starts = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device="cuda")
        prompts = Prompts(held, query, starts, length)
        key, value = prompts.plain(held.keys), prompts.plain(held.values)
        expected = prompts.sdpa(key, value)[:length]
        flops = 2.0 * batch * num_heads * length * length * head_dim  # causal: half of 4

        def measure(
            call: Callable[[], torch.Tensor],
            expected: torch.Tensor = expected,
            flops: float = flops,
        ) -> dict[str, object]:
            poison()
            error = relative_error(call()[: len(expected)], expected)
            us = time_us([call], least_calls=5)
            wrong = "" if error < 2e-2 else " WRONG"
            return {"us": us, "TFLOP/s": flops / us / 1e6, "error": f"{error:.1e}{wrong}"}

        calls: dict[str, Callable[[], torch.Tensor]] = {
            f"ours {tuple(tuning) if tuning else 'default'}": partial(prompts.ours, tuning)
            for tuning in PREFILL_TUNINGS
        }
        calls["torch sdpa"] = partial(prompts.sdpa, key, value)
        calls["torch varlen"] = partial(prompts.varlen, key, value)
        for name, call in calls.items():
            attempt(report, "prefill", f"{label} {name}", partial(measure, call))


# ---- linear --------------------------------------------------------------------------------------

LINEAR_SHAPES = [
    (3200, 8640), (9600, 3200), (3200, 3200), (17280, 3200), (4096, 14336), (6144, 4096),
    (4096, 4096), (28672, 4096), (32000, 3200), (128256, 4096),
]  # fmt: skip
# block_out, block_in, warps, stages; pieces are swept
LINEAR_CUTS = [
    (64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 4, 3), (64, 64, 4, 8),
]  # fmt: skip


def pieces_for(num_out: int, num_in: int, block_out: int) -> Iterable[int]:
    tiles = -(-num_out // block_out)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    wanted = {max(1, round(rounds * processors / tiles)) for rounds in (1, 2, 3, 4)}
    allowed = (1, 2, 3, 4, 6, 8, 12)  # every count is a kernel of its own to compile
    near = {min(allowed, key=lambda count: abs(count - pieces)) for pieces in wanted | {1}}
    return sorted(pieces for pieces in near if num_in // pieces >= 256)


@dataclass
class Weights:
    """Copies of a weight, more than the L2 holds."""

    copies: list[torch.Tensor]
    copy_bandwidth: float

    def measure(
        self, num_rows: int, tuning: LinearTuning | None, *, plain: bool = False
    ) -> dict[str, object]:
        hidden = torch.randn(num_rows, self.copies[0].shape[1], dtype=DTYPE, device="cuda")
        error = 0.0
        if not plain:
            poison()
            actual = small_linear(hidden, self.copies[0], tuning=tuning)
            error = relative_error(actual, hidden.float() @ self.copies[0].float().T)
        ours = partial(small_linear, hidden, tuning=tuning)
        calls: list[Call] = [partial(linear, hidden, weight) for weight in self.copies]
        if not plain:
            calls = [partial(ours, weight) for weight in self.copies]
        us = time_us(calls, replays=5, least_calls=12)
        bandwidth = self.copies[0].numel() * self.copies[0].element_size() / us * 1e6
        return {
            "us": us, "GB/s": bandwidth / 1e9, "of_copy": bandwidth / self.copy_bandwidth,
            "error": f"{error:.1e}" + ("" if error < 1e-2 else " WRONG"),
        }  # fmt: skip


def bench_linear(report: Report, quick: bool) -> None:
    for num_out, num_in in LINEAR_SHAPES[: 3 if quick else None]:
        size = num_out * num_in * 2
        copies = [
            torch.randn(num_out, num_in, dtype=DTYPE, device="cuda") * 0.02
            for _ in range(max(2, min(8, -(-(200 << 20) // size))))
        ]
        weights = Weights(copies, report.copy_bandwidth)
        label = f"{num_out}x{num_in}"
        found: dict[LinearTuning, float] = {}
        for block_out, block_in, warps, stages in LINEAR_CUTS[: 2 if quick else None]:
            for pieces in pieces_for(num_out, num_in, block_out):
                tuning = LinearTuning(block_out, block_in, pieces, warps, stages)
                text = f"{label} T=4 {block_out}x{block_in} /{pieces} {warps}w {stages}s"
                measure = partial(weights.measure, 4, tuning)
                found[tuning] = attempt(report, "linear sweep", text, measure)
        best = min(found, key=lambda tuning: found[tuning])
        for num_rows in (1, 8) if quick else (1, 4, 16, 32):
            text = f"{label} T={num_rows}"
            plain = partial(weights.measure, num_rows, None, plain=True)
            attempt(report, "linear", f"{text} torch  ", plain)
            attempt(report, "linear", f"{text} default", partial(weights.measure, num_rows, None))
            attempt(report, "linear", f"{text} best   ", partial(weights.measure, num_rows, best))
        default = default_tuning(num_out, num_in, copies[0].device)
        report.add("linear winners", what=label, first=best, default=default)


# ---- rows ----------------------------------------------------------------------------------------


def bench_rows(report: Report, quick: bool) -> None:
    size, inner, heads, dim = 3200, 8640, 32, 100
    weight = torch.randn(size, dtype=DTYPE, device="cuda")
    for num_rows in (16, 4096) if quick else (1, 16, 256, 4096, 8192):
        copies = range(max(1, min(8, 16384 // num_rows)))
        hidden = [torch.randn(num_rows, size, dtype=DTYPE, device="cuda") for _ in copies]
        gate_up = [torch.randn(num_rows, 2 * inner, dtype=DTYPE, device="cuda") for _ in copies]
        qkv = [torch.randn(num_rows, 3 * size, dtype=DTYPE, device="cuda") for _ in copies]
        cos, sin = (torch.randn(num_rows, dim, dtype=DTYPE, device="cuda") for _ in range(2))
        pages = -(-num_rows // PAGE_SIZE)
        caches = [
            torch.zeros(pages, heads, PAGE_SIZE, dim, dtype=DTYPE, device="cuda").transpose(1, 2)
            for _ in range(2)
        ]
        slots = torch.randperm(pages * PAGE_SIZE, device="cuda")[:num_rows]

        def add(name: str, num_bytes: int, calls: list[Call], num_rows: int = num_rows) -> None:
            def measure() -> dict[str, object]:
                us = time_us(calls)
                return {"us": us, "of_copy": num_bytes / us * 1e6 / report.copy_bandwidth}

            attempt(report, "rows", f"T={num_rows} {name}", measure)

        one = num_rows * size * 2
        first = hidden[0]
        stored = partial(
            rotate_and_store, cos_TD=cos, sin_TD=sin, key_cache=caches[0], value_cache=caches[1],
            slot_mapping_T=slots,
        )  # fmt: skip
        add("rms_norm", 2 * one, [partial(rms_norm, h, weight, 1e-6) for h in hidden])
        add("torch rms_norm", 2 * one,
            [partial(torch_rms_norm, h, (size,), weight, 1e-6) for h in hidden])  # fmt: skip
        add("add_rms_norm", 4 * one,
            [partial(add_rms_norm, h, first, weight, 1e-6) for h in hidden])  # fmt: skip
        gated = 3 * num_rows * inner * 2
        add("gated_silu", gated, [partial(gated_silu, g) for g in gate_up])
        add("torch silu*up", gated, [partial(torch_gated_silu, g) for g in gate_up])
        add("rotate_and_store", 7 * one, [partial(stored, x) for x in qkv])


def torch_gated_silu(gate_up_TX: torch.Tensor) -> torch.Tensor:
    gate_TI, up_TI = gate_up_TX.chunk(2, dim=1)
    return silu(gate_TI) * up_TI


BENCHES = {
    "rows": bench_rows,
    "prefill": bench_prefill,
    "decode": bench_decode,
    "linear": bench_linear,
    "layer": bench_layer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=BENCHES)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report()
    print(torch.cuda.get_device_name(), torch.__version__, "kernels available:", probe.available())
    report.copy_bandwidth = copy_bandwidth()
    report.add("copy", what="4 GiB", GBps=report.copy_bandwidth / 1e9)
    for name, bench in BENCHES.items():
        if arguments.only not in (None, name):
            continue
        try:
            bench(report, arguments.quick)
        except Exception as error:
            report.add("failed", what=name, error=f"{type(error).__name__}: {str(error)[:300]}")
    report.print_tables()
    if arguments.out:
        arguments.out.write_text(json.dumps(report.rows, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
