"""What `plan --measure` times, and how a step is cut into parts by what was timed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.cost import kv_page_bytes, layer_weight_bytes
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.profile import ProfileKey, RowPoint, StepPart, TokenPoint

__all__ = [
    "MOST_DECODES",
    "Brief",
    "DecodeShape",
    "PromptShape",
    "SliceTimes",
    "Timed",
    "decode_part",
    "first_of_rows",
    "first_of_tokens",
    "prefill_part",
    "slice_layers",
]

MOST_DECODES = 24  # tokens at most that timing a decode step adds to its sequences
# So many bytes of layers lie in no cache of a processor's core, nor in a GPU's.
_UNCACHED_BYTES = 96 << 20
_KV_BYTES = {"cpu": 512 << 20, "cuda": 3 << 30}  # of the large slice
_DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_DECODE_CONTEXTS = (64, 512, 2048)
_PREFILL_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096)
_SHORT_PROMPT = 32  # tokens; many of them make a step with little attention
_CACHED_TOKENS = 1024  # behind which a chunk is timed


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """A decode step: so many sequences with so many tokens each."""

    rows: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class PromptShape:
    """A step of prompt chunks: so many sequences of equal lengths."""

    num_sequences: int
    length: int  # tokens of each that the step computes
    num_cached: int = 0  # tokens of each that were computed before

    @property
    def tokens(self) -> int:
        """Of the step."""
        return self.num_sequences * self.length

    @property
    def context_tokens(self) -> float:
        """Keys that a token sees, on average."""
        return self.num_cached + self.length / 2


@dataclass(frozen=True, slots=True)
class Brief:
    """What all ranks measure, as the head has decided."""

    plan: PipelinePlan  # limits and forms of a run; of few layers
    shape: str  # `ProfileKey.shape_of`
    num_layers: tuple[int, int]  # of the small and of the large slice
    decodes: tuple[DecodeShape, ...]
    prompts: tuple[PromptShape, ...]
    hop_rows: tuple[int, ...]
    num_lanes: int  # of which each rank measures the part of one; `plan` has none

    @property
    def lane_plan(self) -> PipelinePlan:
        """The plan of what is measured: as if each stage had its other lanes."""
        if self.num_lanes == 1:
            return self.plan
        lanes = tuple(range(self.num_lanes))
        stages = tuple(replace(stage, lane_ranks=lanes) for stage in self.plan.stages)
        return replace(self.plan, stages=stages)

    @staticmethod
    def of(spec: ModelSpec, plan: PipelinePlan, num_model_layers: int, num_lanes: int = 1) -> Brief:
        """For `plan`, made for a model of as many layers as fit any rank.

        `num_model_layers`: how many the model has; `num_lanes`: the lanes that share a layer.
        """
        small, large = slice_layers(layer_weight_bytes(spec, plan.dtype), num_model_layers)
        page_size = plan.page_size_tokens
        page_bytes = kv_page_bytes(
            spec,
            plan.dtype,
            num_layers=large,
            page_size_tokens=page_size,
            row_multiple=8 if plan.device == "cuda" else 1,
        )
        most_pages = _KV_BYTES[plan.device] // page_bytes
        longest = spec.max_context_tokens - MOST_DECODES - 1
        decodes = tuple(
            DecodeShape(rows, context)
            for context in _up_to(_DECODE_CONTEXTS, longest)
            for rows in _up_to(_DECODE_ROWS, plan.max_sequences_per_slot)
            if context == _DECODE_CONTEXTS[0]
            or rows * -(-(context + MOST_DECODES) // page_size) <= most_pages
        )
        prompts = _prompt_shapes(plan.max_tokens_per_step, longest, plan.max_sequences_per_slot)
        needed = [
            *(d.rows * -(-(d.context_tokens + MOST_DECODES) // page_size) for d in decodes),
            *(p.num_sequences * -(-(p.num_cached + p.length) // page_size) for p in prompts),
        ]
        longest_sequence = max(
            *(d.context_tokens + MOST_DECODES for d in decodes),
            *(p.num_cached + p.length for p in prompts),
        )
        limits = replace(
            plan,
            num_slots=1,
            num_host_pages=0,
            num_kv_pages=min(max(needed), max(most_pages, -(-longest_sequence // page_size))),
            max_sequence_tokens=longest_sequence,
            restart_tokens=0,
        )
        rows = (*_up_to(_DECODE_ROWS, plan.max_sequences_per_slot), plan.max_tokens_per_step)
        shape = ProfileKey.shape_of(spec)
        sizes = tuple(sorted({*rows}))
        return Brief(limits, shape, (small, large), decodes, prompts, sizes, num_lanes)

    def stage(self, num_layers: int, *, has_embedding: bool, has_head: bool) -> StagePlan:
        """A slice, as a stage of this rank: with its first layers, or with its last."""
        return StagePlan(
            stage=0,
            rank=0,
            host="",
            first_layer=0,
            last_layer=num_layers,
            has_embedding=has_embedding,
            has_head=has_head,
            weight_bytes=0,
            cost_share=1.0,
        )


def _up_to(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """Those below `most`, and `most` itself where it is not beyond all of them."""
    below = tuple(size for size in sizes if size < most)
    return (*below, most) if most <= sizes[-1] else below


def _prompt_shapes(max_tokens: int, longest: int, max_rows: int) -> tuple[PromptShape, ...]:
    """Of each number of tokens short prompts first, then long ones, then behind a cached part."""
    shapes: dict[PromptShape, None] = {}

    def add_short(tokens: int) -> None:
        length = min(tokens, longest, max(_SHORT_PROMPT, -(-tokens // max_rows)))
        shapes[PromptShape(max(1, tokens // length), length)] = None

    for tokens in _up_to(_PREFILL_TOKENS, max_tokens):
        add_short(tokens)
    # As many tokens in short prompts as in one long one: what the keys cost in a large step.
    whole = min(max_tokens, longest)
    whole -= whole % min(whole, _SHORT_PROMPT)
    add_short(whole)
    for tokens in (min(64, whole), whole):
        shapes[PromptShape(1, tokens)] = None
        if tokens + _CACHED_TOKENS <= longest:
            shapes[PromptShape(1, tokens, _CACHED_TOKENS)] = None
    return tuple(shapes)


def slice_layers(layer_bytes: int, num_layers: int) -> tuple[int, int]:
    """Layers of the small and of the large slice: one size only where the model has one layer.

    The small one is large enough not to stay in a cache between two steps, if the model is.
    """
    small = max(1, min(-(-_UNCACHED_BYTES // layer_bytes), num_layers // 3))
    return small, min(num_layers, 3 * small)


def first_of_rows(shapes: Sequence[DecodeShape]) -> tuple[DecodeShape, ...]:
    """The first shape of each number of rows: enough for what does not depend on lengths."""
    return tuple({shape.rows: shape for shape in reversed(shapes)}.values())[::-1]


def first_of_tokens(shapes: Sequence[PromptShape]) -> tuple[PromptShape, ...]:
    """The first shape of each number of tokens."""
    return tuple({shape.tokens: shape for shape in reversed(shapes)}.values())[::-1]


# ---- what was timed ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of the steps of one slice, in the order of the shapes that were timed of it."""

    decodes: dict[DecodeShape, float] = field(default_factory=dict)
    prompts: dict[PromptShape, float] = field(default_factory=dict)

    @staticmethod
    def of_passes(passes: Sequence[Timed]) -> Timed:
        """The median of each shape over passes that all have the same shapes.

        Not the least: a run's steps do not take the least either. On two cores decode steps of a
        whole model took 5 % longer in the median than at best, and as long as a run's.
        """
        return Timed(
            {
                shape: median(timed.decodes[shape] for timed in passes)
                for shape in passes[0].decodes
            },
            {
                shape: median(timed.prompts[shape] for timed in passes)
                for shape in passes[0].prompts
            },
        )


@dataclass(frozen=True, slots=True)
class SliceTimes:
    """Of all slices. Those with embedding and with head are small; only `large` has all shapes."""

    small: Timed
    large: Timed
    first: Timed
    last: Timed
    num_layers: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Times:
    """The seconds of one shape in the slices that have it."""

    small: float
    large: float
    first: float
    last: float

    def layer_s(self, num_layers: tuple[int, int]) -> float:
        few, many = num_layers
        if few == many:
            return self.small / few
        return max(self.large - self.small, 0.0) / (many - few)


def decode_part(times: SliceTimes) -> StepPart:
    """The parts of decode steps."""
    shapes = {shape: (shape.rows, float(shape.context_tokens)) for shape in times.large.decodes}
    rows = {shape.rows: _of(times, "decodes", shape) for shape in times.small.decodes}
    large = {shapes[shape]: seconds for shape, seconds in times.large.decodes.items()}
    return _step_part(rows, large, times.num_layers)


def prefill_part(times: SliceTimes) -> StepPart:
    """The parts of steps of prompt chunks."""
    tokens = {shape.tokens: _of(times, "prompts", shape) for shape in times.small.prompts}
    large = {
        (shape.tokens, shape.context_tokens): seconds
        for shape, seconds in times.large.prompts.items()
    }
    return _step_part(tokens, large, times.num_layers)


def _of(times: SliceTimes, kind: str, shape: object) -> _Times:
    return _Times(
        *(
            getattr(timed, kind)[shape]
            for timed in (times.small, times.large, times.first, times.last)
        )
    )


def _step_part(
    small: dict[int, _Times], large: dict[tuple[int, float], float], num_layers: tuple[int, int]
) -> StepPart:
    """A step of L layers is L layers, and what is left: from two slices follow both."""
    step = {
        tokens: max(times.small - num_layers[0] * times.layer_s(num_layers), 0.0)
        for tokens, times in small.items()
    }
    layer = tuple(
        TokenPoint(tokens, context, max(seconds - step[tokens], 0.0) / num_layers[1])
        for (tokens, context), seconds in sorted(large.items())
    )
    head = tuple(
        RowPoint(tokens, max(times.last - times.small, 0.0)) for tokens, times in small.items()
    )
    embedding = tuple(
        RowPoint(tokens, max(times.first - times.small, 0.0)) for tokens, times in small.items()
    )
    return StepPart(layer, tuple(RowPoint(*entry) for entry in step.items()), head, embedding)
