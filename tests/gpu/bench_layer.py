"""Times a chain of whole layers in one CUDA graph, as the engine runs them, in several variants.

Each variant's output is compared with the one made with torch's linears; those that launch early
are also replayed with changed inputs over poisoned buffers and must equal, bit for bit, the same
kernels launched one after the other. The floor is what has to be read, at 4.2 TB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.nn.functional import linear

from mpipipe.models.kernels.decode_attention import paged_decode_attention
from mpipipe.models.kernels.linear import (
    MAX_ROWS,
    default_tuning,
    prefers_small_linear,
    small_linear,
)
from mpipipe.models.kernels.prefill_attention import Chunks, paged_prefill_attention
from mpipipe.models.kernels.rotary import rotate_and_store
from mpipipe.models.kernels.rowwise import add_rms_norm, gated_silu, rms_norm
from mpipipe.models.layer_options import AttentionOptions
from tests.gpu.bench_timing import (
    DTYPE,
    PAGE_SIZE,
    Report,
    attempt,
    elapsed_us,
    relative_error,
)
from tests.gpu.early_launch import early_launch

__all__ = ["bench_layer"]

EPS = 1e-6
KV_LEN = 512
MAX_BATCH = 256
READ_BANDWIDTH = 4.2e12  # of an H200, bytes per second


@dataclass(frozen=True)
class Shape:
    """A model's layers."""

    name: str
    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_weights(self) -> int:
        queries = self.num_heads * self.head_dim
        return self.hidden * (self.qkv + queries + 3 * self.inner)


SHAPES = [
    Shape("3B", 3200, 8640, 32, 32, 100, 13),
    Shape("8B", 4096, 14336, 32, 8, 128, 16),
]


@dataclass(frozen=True)
class Variant:
    """How the layer is put together."""

    name: str
    early: bool = False
    linears: str = "rule"  # torch, rule (`prefers_small_linear`), small (all of them)
    gate_stages: int | None = None

    def uses_small(self, rows: torch.Tensor, weight: torch.Tensor) -> bool:
        if self.linears == "torch" or len(rows) > MAX_ROWS:
            return False
        preferred = prefers_small_linear(len(rows), *weight.shape, device=rows.device)
        return preferred or self.linears == "small"


TORCH = Variant("torch linears", linears="torch")
PLAIN = Variant("rule")
EARLY = Variant("rule, early", early=True)
SMALL = Variant("all small, early", early=True, linears="small")
ALL_VARIANTS = [
    TORCH,
    PLAIN,
    replace(TORCH, name="torch linears, early", early=True),
    EARLY,
    Variant("all small", linears="small"),
    Variant("all small, gate_up 3 stages", linears="small", gate_stages=3),
    SMALL,
]
FEW_VARIANTS = [TORCH, PLAIN, EARLY, SMALL]
LARGE_VARIANTS = [TORCH, replace(TORCH, name="torch linears, early", early=True)]


@dataclass
class Layer:
    """The tensors of one layer."""

    norms: tuple[torch.Tensor, torch.Tensor]
    qkv: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@dataclass
class Step:
    """What the layers of a step share."""

    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    table: torch.Tensor
    kv_lens: torch.Tensor
    options: AttentionOptions
    starts: torch.Tensor | None = None  # of prompts; None: a decode step
    made: list[torch.Tensor] = field(default_factory=list)  # outputs of the last layer's kernels


def layers_of(shape: Shape) -> list[Layer]:
    pages = MAX_BATCH * KV_LEN // PAGE_SIZE

    def weight(num_out: int, num_in: int) -> torch.Tensor:
        scale = num_in**-0.5
        return torch.randn(num_out, num_in, dtype=DTYPE, device="cuda").mul_(scale)

    def norm() -> torch.Tensor:
        return 1 + 0.1 * torch.randn(shape.hidden, dtype=DTYPE, device="cuda")

    def cache() -> torch.Tensor:
        row = -(-shape.head_dim // 8) * 8
        sizes = (pages, shape.num_kv_heads, PAGE_SIZE, row)
        cells = torch.empty(sizes, dtype=DTYPE, device="cuda").normal_()
        cells[..., shape.head_dim :] = 0
        return cells[..., : shape.head_dim].transpose(1, 2)

    return [
        Layer(
            (norm(), norm()),
            weight(shape.qkv, shape.hidden),
            weight(shape.hidden, shape.num_heads * shape.head_dim),
            weight(2 * shape.inner, shape.hidden),
            weight(shape.hidden, shape.inner),
            cache(),
            cache(),
        )
        for _ in range(shape.num_layers)
    ]


def step_of(shape: Shape, num_rows: int, *, prompts: bool) -> Step:
    """A decode step of sequences of 512 tokens, or a step of whole prompts of 512."""
    order = torch.randperm(MAX_BATCH * KV_LEN // PAGE_SIZE, device="cuda").int()
    sequences = num_rows // KV_LEN if prompts else num_rows
    table = order.view(MAX_BATCH, -1)[:sequences].contiguous()
    places = (
        table.long()[:, :, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device="cuda")
    ).flatten(1)
    angles = torch.rand(num_rows, shape.head_dim // 2, device="cuda").repeat(1, 2) * 6
    starts = torch.arange(0, num_rows + 1, KV_LEN, dtype=torch.int32, device="cuda")
    return Step(
        angles.cos().to(DTYPE),
        angles.sin().to(DTYPE),
        places.flatten() if prompts else places[:, -1].contiguous(),
        table,
        torch.full((sequences,), KV_LEN, dtype=torch.int32, device="cuda"),
        AttentionOptions(shape.head_dim**-0.5),
        starts if prompts else None,
    )


def project(
    variant: Variant,
    rows: torch.Tensor,
    weight: torch.Tensor,
    *,
    stages: int | None = None,
) -> torch.Tensor:
    if not variant.uses_small(rows, weight):
        return linear(rows, weight)
    tuning = default_tuning(*weight.shape, device=rows.device)
    if stages:
        tuning = replace(tuning, num_stages=stages)
    return small_linear(rows, weight, tuning=tuning)


def attend(variant: Variant, layer: Layer, step: Step, qkv: torch.Tensor) -> torch.Tensor:
    query, key, _ = rotate_and_store(
        qkv, step.cos, step.sin, layer.keys, layer.values, slot_mapping_T=step.slots
    )
    common = (query, layer.keys, layer.values, step.table, step.kv_lens)
    if step.starts is not None:
        chunks = Chunks(step.starts, KV_LEN)
        mixed = paged_prefill_attention(*common, chunks=chunks, options=step.options)
    else:
        mixed = paged_decode_attention(*common, max_kv_len=KV_LEN, options=step.options)
    step.made += [qkv, query, key, mixed]
    return mixed.flatten(1)


def run(
    variant: Variant, layers: Sequence[Layer], step: Step, stream: torch.Tensor
) -> torch.Tensor:
    """All layers, and the last one's sum with its residual."""
    branch: torch.Tensor | None = None  # what is still to be added to the stream
    for layer in layers:
        step.made.clear()
        normed, stream = normalised(branch, stream, layer.norms[0])
        mixed = attend(variant, layer, step, project(variant, normed, layer.qkv))
        branch = project(variant, mixed, layer.output)
        normed, stream = normalised(branch, stream, layer.norms[1])
        gate_up = project(variant, normed, layer.gate_up, stages=variant.gate_stages)
        active = gated_silu(gate_up)
        branch = project(variant, active, layer.down)
        step.made += [normed, active, stream, branch]
    assert branch is not None, "a shape has layers"
    return stream + branch


def normalised(
    branch: torch.Tensor | None, stream: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if branch is None:
        return rms_norm(stream, weight, EPS), stream
    return add_rms_norm(branch, stream, weight, EPS)


@dataclass
class Chain:
    """Layers of one shape, and steps of one size over them."""

    shape: Shape
    layers: list[Layer]
    step: Step
    inputs: list[torch.Tensor]
    reference: list[torch.Tensor] = field(default_factory=list)  # per input

    def capture(
        self, variant: Variant
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """The graph, its input and output, and outputs of kernels within."""
        static = self.inputs[0].clone()
        graph = torch.cuda.CUDAGraph()
        with early_launch(variant.early):
            run(variant, self.layers, self.step, static)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                out = run(variant, self.layers, self.step, static)
        return graph, static, out, [made for made in self.step.made if made is not static]

    def eager(self, variant: Variant) -> list[torch.Tensor]:
        with early_launch(False):
            return [run(variant, self.layers, self.step, rows) for rows in self.inputs]

    def verdict(self, variant: Variant, num_rows: int) -> tuple[str, torch.cuda.CUDAGraph]:
        """How far the replays are off; the graph."""
        graph, static, out, made = self.capture(variant)
        expected = self.eager(variant) if variant.early else self.reference
        stale, error = 0, 0.0
        for index, rows in enumerate(self.inputs):
            static.copy_(rows)
            for buffer in made:
                buffer.fill_(float("nan"))
            graph.replay()
            stale += variant.early and not torch.equal(out, expected[index])
            error = max(error, relative_error(out, self.reference[index]))
        wrong = " WRONG" if not error < 5e-2 else ""
        return f"{error:.1e}{wrong}{f' STALE {stale}' if stale else ''}", graph

    def measure(self, variant: Variant, num_rows: int) -> dict[str, object]:
        verdict, graph = self.verdict(variant, num_rows)
        us = elapsed_us(graph.replay, 15) / len(self.layers)
        shape = self.shape
        if self.step.starts is None:
            cached = num_rows * KV_LEN * shape.num_kv_heads * shape.head_dim * 2
            floor = (shape.num_weights + cached) * 2 / READ_BANDWIDTH * 1e6
            return {"us": us, "of_floor": us / floor, "floor": floor, "error": verdict}
        attention = 2.0 * num_rows * KV_LEN * shape.num_heads * shape.head_dim
        flops = 2.0 * num_rows * shape.num_weights + attention
        return {"us": us, "TFLOP/s": flops / us / 1e6, "error": verdict}

    def split(self, variant: Variant) -> dict[str, object]:
        """Microseconds per layer and kernel, by torch's profiler."""
        graph, _, _, _ = self.capture(variant)
        graph.replay()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graph.replay()
            torch.cuda.synchronize()
        found = {
            event.key[:44]: round(event.self_device_time_total / len(self.layers), 2)
            for event in profile.key_averages()
            if event.self_device_time_total
        }
        return {
            "us": float(sum(found.values())),
            **dict(sorted(found.items(), key=lambda x: -x[1])),
        }


def chain_of(shape: Shape, layers: list[Layer], num_rows: int, *, prompts: bool) -> Chain:
    inputs = [torch.randn(num_rows, shape.hidden, dtype=DTYPE, device="cuda") for _ in range(3)]
    chain = Chain(shape, layers, step_of(shape, num_rows, prompts=prompts), inputs)
    chain.reference = chain.eager(TORCH)
    return chain


def bench_layer(report: Report, quick: bool) -> None:
    for shape in SHAPES[: 1 if quick else None]:
        layers = layers_of(shape)
        for num_rows in (1, 16) if quick else (1, 16, 4, 32, 128, 256):
            chain = chain_of(shape, layers, num_rows, prompts=False)
            variants = ALL_VARIANTS if num_rows in {1, 16} else FEW_VARIANTS
            if num_rows > MAX_ROWS:
                variants = LARGE_VARIANTS
            for variant in variants:
                label = f"{shape.name} T={num_rows} {variant.name}"
                attempt(report, "layer", label, partial(chain.measure, variant, num_rows))
            if num_rows in {1, 16, 128}:
                label = f"{shape.name} T={num_rows} {PLAIN.name}"
                attempt(report, "layer by kernel", label, partial(chain.split, PLAIN))
        for num_rows in () if quick else (4096, 8192):
            chain = chain_of(shape, layers, num_rows, prompts=True)
            for variant in LARGE_VARIANTS:
                label = f"{shape.name} T={num_rows} {variant.name}"
                attempt(
                    report, "layer of prompts", label, partial(chain.measure, variant, num_rows)
                )
            label = f"{shape.name} T={num_rows}"
            attempt(report, "layer by kernel", label, partial(chain.split, TORCH))
        del layers, chain
