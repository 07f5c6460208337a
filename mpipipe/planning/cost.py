"""What the parts of a model weigh and what a step costs in them: a two-line roofline.

`partition` decides which stage gets which part, `memory` whether it fits. Sizes come from the
`ModelSpec` alone; norms and biases, below 0.1 %, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpipipe.checkpoint.spec import ModelSpec

__all__ = [
    "CPU_CORE",
    "Ceilings",
    "StepCost",
    "WorkMix",
    "dtype_bytes",
    "gpu_head_cost_in_layers",
    "head_cost_in_layers",
    "head_decode_cost",
    "head_weight_bytes",
    "kv_page_bytes",
    "layer_decode_cost",
    "layer_weight_bytes",
    "stage_weight_bytes",
]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What one rank's device does at best."""

    bytes_per_s: float
    flops_per_s: float
    source: str = ""


# Measured with SmolLM2-135M in float32: the LM head (28.3 M weights) takes 11 ms for 8 rows, so a
# core streams weights at 10 GB/s; 512 rows through 576 × 6144 reach 61 GFLOP/s. Only their ratio
# matters for the split.
CPU_CORE = Ceilings(10e9, 60e9)
# One H200 as kernels reach it (copies: 4.25 TB/s, matrix products: 790 TFLOP/s). Again only the
# ratio matters for the split. Data sheets give 200 (T4, A100) to 400 (L4) operations per byte, here
# it is 180, so one pair serves all.
_GPU = Ceilings(3.3e12, 6e14)

# The micro-batch the split is made for. With it a SmolLM2 layer costs a sixth of the head
# (1.9 ms to 11 ms); measured: 1.7–1.9 ms to 11 ms.
_NUM_SEQUENCES = 8
_CONTEXT_TOKENS = 384

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


_SCALE_BYTES = 4


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of `dtype`, a name as in `ModelSpec.dtype`."""
    return _DTYPE_BYTES[dtype]


def layer_weight_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of one layer's matrices: a byte a weight with a scale per output where quantised."""
    if spec.quantized == "none":
        return spec.layer_parameters * dtype_bytes(dtype)
    num_narrow = spec.quantizable_parameters - spec.plain_parameters
    num_scales = spec.quantizable_outputs - spec.plain_outputs
    num_plain = spec.layer_parameters - num_narrow
    return num_narrow + _SCALE_BYTES * num_scales + num_plain * dtype_bytes(dtype)


def head_weight_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of the LM head."""
    if not spec.has_quantized_head:
        return spec.head_parameters * dtype_bytes(dtype)
    return spec.head_parameters + _SCALE_BYTES * (spec.head_rows or spec.vocab_size)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Memory traffic and arithmetic of a step, or of a part of it."""

    bytes_moved: float
    flops: float

    def seconds(self, ceilings: Ceilings) -> float:
        """Predicted time: the slower of moving and computing."""
        return max(self.bytes_moved / ceilings.bytes_per_s, self.flops / ceilings.flops_per_s)


@dataclass(frozen=True, slots=True)
class WorkMix:
    """What the split is balanced for on a GPU. Totals over all requests; 0: not known."""

    rows: int  # of a decode step
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def context_tokens(self) -> float:
        """Mean tokens in the cache of a decoding sequence: its prompt and half of its output."""
        if not self.num_requests:
            return _CONTEXT_TOKENS
        return (self.num_prompt_tokens + self.num_output_tokens / 2) / self.num_requests

    @property
    def num_decode_steps(self) -> float:
        """Steps of `rows` tokens; one, for comparison, when the tokens are not known."""
        return self.num_output_tokens / self.rows if self.num_output_tokens else 1.0


def layer_decode_cost(
    spec: ModelSpec,
    dtype: str,
    *,
    num_sequences: float = _NUM_SEQUENCES,
    context_tokens: float = _CONTEXT_TOKENS,
) -> StepCost:
    """One layer, one token for each of `num_sequences` with `context_tokens` tokens cached.

    Moves all weights and all cached K and V once; a weight costs a multiply and an add per
    sequence, a cached token two of them per query head element (scores and values).
    """
    cached_tokens = num_sequences * context_tokens
    cached_bytes = cached_tokens * spec.kv_elements_per_token_layer * dtype_bytes(dtype)
    matrices = 2 * num_sequences * spec.layer_parameters
    attention = 4 * cached_tokens * spec.num_heads * spec.head_dim
    return StepCost(layer_weight_bytes(spec, dtype) + cached_bytes, float(matrices + attention))


def head_decode_cost(
    spec: ModelSpec, dtype: str, *, num_sequences: float = _NUM_SEQUENCES
) -> StepCost:
    """The LM head for one token of each of `num_sequences`."""
    flops = 2 * num_sequences * spec.head_parameters
    return StepCost(float(head_weight_bytes(spec, dtype)), float(flops))


def head_cost_in_layers(spec: ModelSpec, dtype: str) -> float:
    """How many layers take as long as the LM head. The embedding only gathers rows.

    On a CPU int8 saves memory, not time: a layer takes as long as in `dtype`
    (`models/quantized_linear.py` has the figures).
    """
    spec = replace(spec, quantized="none")
    head, layer = head_decode_cost(spec, dtype), layer_decode_cost(spec, dtype)
    return head.seconds(CPU_CORE) / layer.seconds(CPU_CORE)


def gpu_head_cost_in_layers(spec: ModelSpec, dtype: str, mix: WorkMix) -> float:
    """How many layers take as long as the LM head over the whole run on a GPU.

    Prompts pass the layers only: of a chunk at most its last row reaches the head, and chunks of
    thousands of rows cost arithmetic, not traffic. So the head weighs the less, the longer the
    prompts are. A single split cannot suit both phases; this one is best for their sum.
    """
    context = mix.context_tokens
    layer = layer_decode_cost(spec, dtype, num_sequences=mix.rows, context_tokens=context)
    head = head_decode_cost(spec, dtype, num_sequences=mix.rows)
    # A token of a prompt sees half of the prompt, on average.
    mean_prompt = mix.num_prompt_tokens / max(1, mix.num_requests)
    attention = 4 * mean_prompt / 2 * spec.num_heads * spec.head_dim
    prompt_flops = mix.num_prompt_tokens * (2 * spec.layer_parameters + attention)
    layer_s = mix.num_decode_steps * layer.seconds(_GPU) + prompt_flops / _GPU.flops_per_s
    return mix.num_decode_steps * head.seconds(_GPU) / layer_s


def stage_weight_bytes(
    spec: ModelSpec, dtype: str, *, num_layers: int, has_embedding: bool, has_head: bool
) -> int:
    """Bytes of the parameters of a stage. What is embedding and head counts once."""
    has_both = has_embedding and has_head and spec.is_head_the_embedding
    return (
        num_layers * layer_weight_bytes(spec, dtype)
        + has_embedding
        * (spec.embedding_parameters + spec.position_parameters)
        * dtype_bytes(dtype)
        + (has_head and not has_both) * head_weight_bytes(spec, dtype)
    )


def kv_page_bytes(
    spec: ModelSpec, dtype: str, *, num_layers: int, page_size_tokens: int, row_multiple: int = 1
) -> int:
    """Bytes that one page takes on a stage of `num_layers` layers.

    `row_multiple`: rows of a head are padded to so many elements (8 on a GPU, kv_cache/paged.py).
    """
    row = -(-spec.head_dim // row_multiple) * row_multiple
    elements = page_size_tokens * 2 * spec.num_kv_heads * row * num_layers
    return elements * dtype_bytes(dtype)
