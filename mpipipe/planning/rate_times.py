"""Step times from rates of devices and links: what is known of a machine before it was measured.

Times are sums over the parts of a step. A matrix product takes the longer of reading its weights
and its arithmetic; attention that of reading K and V and its own; every layer and step adds the
time of its small kernels. The shares below were fitted to measured jobs (`test_forecast.py` holds
the forecasts against them): OpenLLaMA-3B and Llama-3-8B on one to four H100 and H200, SmolLM2 on
two cores. Other cards are assumed to reach the same shares of what the table says of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.cost import (
    Ceilings,
    dtype_bytes,
    head_weight_bytes,
    kv_page_bytes,
    layer_weight_bytes,
)
from mpipipe.planning.gpu_table import GpuTable, known_gpus
from mpipipe.planning.link_table import BETWEEN_HOSTS, LINKS, Link
from mpipipe.planning.links import compute_ceilings
from mpipipe.planning.plan import PipelinePlan, StageOffload, StagePlan
from mpipipe.planning.resources import RankResources
from mpipipe.planning.tensor_parallel import lane_spec

__all__ = ["RateTimes", "Shares", "rate_times", "with_offload"]


@dataclass(frozen=True, slots=True)
class Shares:
    """What kernels reach of a device's ceilings, and what a step takes beside them."""

    weights: float  # of the bandwidth, reading weights in decode steps
    cache: float  # of the bandwidth, reading K and V
    decode_products: float  # of the arithmetic, products of a decode step's rows
    prompt_products: float  # of the arithmetic, products of prompts
    prompt_attention: float  # of the arithmetic, attention of prompts
    layer_s: float  # of a layer's small kernels
    step_s: float  # of a step: embedding, norms, launching
    row_s: float  # of the last stage for a row of 1,000 vocabulary entries: choosing a token
    prompt_step_s: float  # of a step of prompts, beside all of the above
    host_layer_s: float = 0.0  # the host's time to launch a layer, where no graph replays it
    prompt_host_layer_s: float = 0.0  # the same of prompts, which no graph ever replays


GPU_SHARES = Shares(
    weights=0.9,
    cache=0.77,
    decode_products=0.68,
    prompt_products=0.83,
    prompt_attention=0.47,
    layer_s=16.5e-6,
    step_s=65e-6,
    row_s=6e-9,
    prompt_step_s=0.55e-3,
    # 13 layers of OpenLLaMA-3B on two H200: 5.5 to 9.7 ms for a prompt of 512 tokens that takes the
    # GPU 3.1 ms, 10.8 to 11.1 ms for 1,024 tokens beside 256 decodes (5.9 ms of the GPU).
    prompt_host_layer_s=0.6e-3,
)
# Without graphs a decode step is as long as its launching, at least. Backends that gather K and V
# write a copy and read it again. Both are assumed: only graphs and paged kernels were measured.
_EAGER_LAYER_S = 0.25e-3
_GATHERING = frozenset({"sdpa", "reference"})
# Of `planning.cost.CPU_CORE` per thread. Python and torch take as long as small products here.
CPU_SHARES = Shares(
    weights=0.9,
    cache=0.5,
    decode_products=0.57,
    prompt_products=1.0,
    prompt_attention=0.65,
    layer_s=0.5e-3,
    step_s=0.5e-3,
    row_s=9e-6,
    prompt_step_s=1e-3,
)

# Lanes on CPUs share all of their parts and add them up themselves: two changes of threads, an
# Iallgather, a sum. The least of 60 sums of 2 lanes on two cores that others used too: 0.17 ms for
# 2 KB, 0.8 ms for 1.2 MB, 7.5 ms for 8.4 MB.
_CPU_SUMS = Link("sums on CPUs", 1.5e9, 0.17e-3, "measured: 2 lanes on two cores")

# Weights in 8 bits on a GPU, measured on one H100 with Llama-3-8B (BENCHMARKS.md). int8: read at
# 0.85 of what 16 bits reach, products beside the reading and not under it, with many rows written
# out in 16 bits first. fp8: activations are quantised first.
_INT8_ROWS = 96
_INT8_WRITTEN_OUT = 0.7
_INT8_READING = 0.85
_INT8_PRODUCTS = 0.79
_FP8_READING = 0.83
_FP8_SPEED_UP = 1.75
_FP8_S = 20e-6


@dataclass(frozen=True, slots=True)
class RateTimes:
    """`StepTimes` of a model on devices with known ceilings."""

    spec: ModelSpec  # quantised as it runs
    dtype: str
    weight_dtype: str  # of weights in memory: on a CPU those that float16 holds exactly are in it
    row_multiple: int  # rows of a head in the cache are padded to so many elements
    ceilings: Mapping[int, Ceilings]  # by rank
    shares: Shares
    near: Link  # between ranks of a host
    far: Link  # between hosts
    source: str
    num_lanes: int = 1  # ranks of a stage; `spec` is what each of them computes with
    gathers_sums: bool = False  # each lane gets all parts of a sum; else they go round a ring

    def decode_s(self, stage: StagePlan, rows: float, context_tokens: float) -> float:
        """See `StepTimes`."""
        spec, shares, ceilings = self.spec, self.shares, self.ceilings[stage.rank]
        products_s = self._layer_products_s(ceilings, rows, shares.decode_products)
        cached = rows * context_tokens
        read_s = cached * self._cache_row_bytes() / (ceilings.bytes_per_s * shares.cache)
        scores_s = 4 * cached * spec.num_heads * spec.head_dim / ceilings.flops_per_s
        attention_s = max(read_s, scores_s) * stage.num_kv_device_layers / stage.num_layers
        layer_s = max(products_s + attention_s + shares.layer_s, shares.host_layer_s)
        compute_s = stage.num_layers * layer_s + self._head_s(stage, rows) + shares.step_s
        compute_s += self.lanes_s(stage, rows, rows)
        return with_offload(stage.offload, compute_s, rows) + self.kv_in_host_s(stage, cached)

    def prefill_s(self, stage: StagePlan, tokens: int, context_tokens: float) -> float:
        """See `StepTimes`."""
        spec, shares, ceilings = self.spec, self.shares, self.ceilings[stage.rank]
        products_s = self._layer_products_s(ceilings, tokens, shares.prompt_products)
        attention_s = 4 * tokens * context_tokens * spec.num_heads * spec.head_dim
        attention_s /= ceilings.flops_per_s * shares.prompt_attention
        layer_s = products_s + attention_s + shares.layer_s
        prompts = min(tokens, tokens / (2 * context_tokens)) if context_tokens > 0 else tokens
        head_rows = max(1.0, prompts)
        head_s = self._head_s(stage, head_rows) + self.lanes_s(stage, tokens, head_rows)
        layer_s = max(layer_s, shares.prompt_host_layer_s)
        compute_s = stage.num_layers * layer_s + head_s + shares.step_s + shares.prompt_step_s
        # K and V are written, and read at least once.
        return with_offload(stage.offload, compute_s, tokens) + self.kv_in_host_s(stage, 2 * tokens)

    def hop_s(self, rows_or_tokens: int, crosses_hosts: bool) -> float:
        """See `StepTimes`."""
        link = self.far if crosses_hosts else self.near
        moved = rows_or_tokens * self.spec.hidden_size * dtype_bytes(self.dtype)
        return link.latency_s + moved / link.bytes_per_s

    def kv_in_host_s(self, stage: StagePlan, num_tokens: float) -> float:
        """K and V of so many tokens over the link, of the layers whose cache is in host memory."""
        known = stage.kv_in_host
        if known is None or not known.step_s:
            return 0.0
        moved = num_tokens * self._cache_row_bytes() * len(known.layers)
        return moved * known.step_s / known.step_bytes

    def lanes_s(self, stage: StagePlan, rows: float, head_rows: float) -> float:
        """What the lanes of a stage take for each other: two sums a layer, and the logits."""
        logits_s = self._gather_s(head_rows) if stage.has_head else 0.0
        return 2 * stage.num_layers * self._sum_s(rows) + logits_s

    def _sum_s(self, rows: float) -> float:
        """What the lanes of a stage take to add up their hidden states."""
        if self.num_lanes == 1:
            return 0.0
        others = self.num_lanes - 1
        # Round the ring each lane sends every element but its own part twice.
        share = others if self.gathers_sums else 2 * others / self.num_lanes
        moved = share * rows * self.spec.hidden_size * dtype_bytes(self.dtype)
        link = self._sum_link
        return link.latency_s + moved / link.bytes_per_s

    def _gather_s(self, rows: float) -> float:
        """What they take to share the logits that each has of a part of the vocabulary."""
        if not self.spec.head_rows:
            return 0.0
        moved = rows * (self.spec.vocab_size - self.spec.head_rows) * dtype_bytes(self.dtype)
        link = self._sum_link
        return link.latency_s + moved / link.bytes_per_s

    @property
    def _sum_link(self) -> Link:
        return _CPU_SUMS if self.gathers_sums else self.near

    def _layer_products_s(self, ceilings: Ceilings, rows: float, share: float) -> float:
        """The matrix products of a layer for so many rows."""
        spec = self.spec
        narrow = layer_weight_bytes(spec, self.weight_dtype)
        return self._products_s(ceilings, spec.layer_parameters, narrow, rows, share)

    def _head_s(self, stage: StagePlan, rows: float) -> float:
        """The LM head of `rows` rows, and choosing their tokens."""
        if not stage.has_head:
            return 0.0
        spec, share = self.spec, self.shares.decode_products
        narrow = head_weight_bytes(spec, self.weight_dtype)
        products_s = self._products_s(
            self.ceilings[stage.rank], spec.head_parameters, narrow, rows, share
        )
        choosing_s = rows * spec.vocab_size / 1000 * self.shares.row_s
        return products_s + choosing_s

    def _products_s(
        self, ceilings: Ceilings, parameters: int, held_bytes: int, rows: float, share: float
    ) -> float:
        """Products of so many weights, which are held in `held_bytes`."""
        bandwidth = ceilings.bytes_per_s * self.shares.weights
        wide_bytes = parameters * dtype_bytes(self.weight_dtype)
        products_s = 2 * rows * parameters / ceilings.flops_per_s
        wide_s = max(wide_bytes / bandwidth, products_s / share)
        if held_bytes >= wide_bytes:  # not quantised
            return wide_s
        if self.spec.quantized == "int8":
            if rows > _INT8_ROWS:
                return wide_s + _INT8_WRITTEN_OUT * wide_bytes / bandwidth
            return held_bytes / (bandwidth * _INT8_READING) + products_s / _INT8_PRODUCTS
        narrow_s = held_bytes / (bandwidth * _FP8_READING)
        return max(narrow_s, products_s / (share * _FP8_SPEED_UP)) + _FP8_S

    def _cache_row_bytes(self) -> int:
        """K and V of one token in one layer."""
        return kv_page_bytes(
            self.spec,
            self.dtype,
            num_layers=1,
            page_size_tokens=1,
            row_multiple=self.row_multiple,
        )


def with_offload(offload: StageOffload | None, compute_s: float, rows: float) -> float:
    """A step's time with what it brings to the device meanwhile."""
    if offload is None:
        return compute_s
    known = offload.forecast
    lookup_s = known.lookup_s * rows / max(1, known.rows)
    return replace(known, compute_s=compute_s, lookup_s=lookup_s, kv_s=0.0).step_s


def rate_times(
    spec: ModelSpec,
    plan: PipelinePlan,
    ranks: Sequence[RankResources],
    *,
    table: GpuTable | None = None,
    near: Link | None = None,
    far: Link = BETWEEN_HOSTS,
) -> RateTimes:
    """The times of `plan` on the ranks that it was made for.

    Args:
        spec: of the model.
        plan: for these ranks.
        ranks: what each has.
        table: of GPUs; None: the known ones.
        near: the link between ranks of a host; None: as their devices have it.
        far: the link between hosts.
    """
    table = table or known_gpus()
    on_gpus = plan.device == "cuda"
    ceilings = {
        rank.rank: compute_ceilings(rank.gpu, 0, table) if on_gpus else _of_cores(rank, ranks, plan)
        for rank in ranks
    }
    sources = dict.fromkeys(found.source for found in ceilings.values())
    if spec.num_experts > 1:
        sources["every expert counts as read and computed: the least that is to be expected"] = None
    # Random weights are drawn in the run's type, which float16 does not hold exactly.
    halved = not on_gpus and spec.dtype in {"bfloat16", "float16"} and plan.weights != "random"
    return RateTimes(
        # On a CPU int8 saves memory, not time (`planning.cost.head_cost_in_layers`).
        spec=lane_spec(
            replace(spec, quantized=plan.quantize if on_gpus else "none"), plan.tensor_parallel
        ),
        dtype=plan.dtype,
        weight_dtype="float16" if halved else plan.dtype,
        row_multiple=8 if on_gpus else 1,
        ceilings=ceilings,
        shares=_gpu_shares(plan) if on_gpus else CPU_SHARES,
        near=near or (_near(ranks, table) if on_gpus else LINKS["memory"]),
        far=far,
        source="; ".join(sources),
        num_lanes=plan.tensor_parallel,
        gathers_sums=not on_gpus,
    )


def _gpu_shares(plan: PipelinePlan) -> Shares:
    shares = GPU_SHARES
    if plan.attention in _GATHERING:
        shares = replace(shares, cache=shares.cache / 3)
    if not plan.cuda_graphs:
        shares = replace(shares, host_layer_s=_EAGER_LAYER_S)
    return shares


def _of_cores(rank: RankResources, ranks: Sequence[RankResources], plan: PipelinePlan) -> Ceilings:
    """Of a rank on a CPU: less where the ranks of its host have more threads than it has cores."""
    num_threads = plan.threads_per_rank * sum(other.host == rank.host for other in ranks)
    share = min(1.0, rank.num_cores / num_threads)
    found = compute_ceilings(None, plan.threads_per_rank)
    return Ceilings(found.bytes_per_s * share, found.flops_per_s * share, found.source)


def _near(ranks: Sequence[RankResources], table: GpuTable) -> Link:
    """NVLink where every card has it, else PCI Express of the oldest generation."""
    cards = [table.find(rank.gpu.name) for rank in ranks]
    if all(card is not None and card.nvlink_gb_per_s > 0 for card in cards):
        return LINKS["nvlink"]
    generations = [card.pcie[0] for card in cards if card is not None]
    return LINKS[f"pcie{min(max(min(generations, default=3), 3), 5)}"]
