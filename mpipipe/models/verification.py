"""The safety net: does this family's code, cut into a stage, compute what it should?

Families are adapted by rules, and most of them were never tried. So every stage runs a few tiny
steps after loading, on its real weights and a throw-away cache, and refuses to serve if one of
these does not hold:

1. a later stage's base model without layers and norm returns its input unchanged (no embedding
   scale or position embedding applied twice);
2. every layer calls attention exactly once, with shapes and options the backends implement;
3. a sequence computed in chunks beside another gives the same as in one piece and alone (no state
   outside our cache, nothing that mixes neighbours).

Three forward passes over a handful of tokens: about a tenth of a second for a 135M model on a CPU
core. They run on the plain modules with SDPA, whatever execution mode and backend the
stage takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mpipipe.errors import NumericsError
from mpipipe.kv_cache.base import ContiguousKVCache
from mpipipe.kv_cache.layout import BatchLayout, SequenceLens, build_layout, to_device
from mpipipe.models.families import refuse

if TYPE_CHECKING:
    from mpipipe.models.attention_bridge import AttentionCall
    from mpipipe.models.plain_stage import PlainStage

__all__ = ["verify_stage"]

_LONG = 6  # tokens of the sequence that is computed in two chunks
_SHORT = 3  # tokens of its neighbour
# Relative error allowed between the two ways, by dtype: batch shapes change the order of sums.
# A layer whose state is forgotten is off by tens of percent.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# With activations in float8, a last bit that differs moves one to its neighbour, 6 % away, and all
# layers after it carry on from there: 4 % in 30 layers of SmolLM2 in float32.
_FP8_TOLERANCE = 0.2


def verify_stage(stage: PlainStage) -> tuple[int, int]:
    """Run the three checks; return the KV heads and the head dimension that the cache must hold.

    Raises:
        UnsupportedModelError: one of them fails; the family's name and the reason are in it.
        NumericsError: the trial step's result is not a number.
        torch.OutOfMemoryError: the device has too little left; says nothing about the family.
    """
    try:
        with torch.inference_mode():
            if not stage.plan.has_embedding:
                _check_input_untouched(stage)
            return _check_chunks(stage)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError) as error:
        raise refuse(
            stage.model_type, f"fails on a trial step ({type(error).__name__}: {error})"
        ) from error


def _check_input_untouched(stage: PlainStage) -> None:
    hidden_TH = _trial_input(stage, 2)
    output_TH = stage.run_without_layers(hidden_TH, _layout(stage, [(0, 2, 2)]))
    if not torch.equal(output_TH, hidden_TH):
        raise refuse(stage.model_type, "changes its embeddings in a way that is not known")


def _check_chunks(stage: PlainStage) -> tuple[int, int]:
    long, short = _trial_input(stage, _LONG), _trial_input(stage, _SHORT)
    half = _LONG // 2
    with stage.recording(ContiguousKVCache()) as calls:
        whole_TH = stage.run_base(long, _layout(stage, [(0, _LONG, _LONG)]))
        kv_shape = _check_calls(stage, list(calls))
        behind_TH = stage.run_base(
            torch.cat((long[:half], short)), _layout(stage, [(1, half, half), (2, _SHORT, _SHORT)])
        )
        before_TH = stage.run_base(
            torch.cat((short, long[half:])),
            _layout(stage, [(3, _SHORT, _SHORT), (1, _LONG - half, _LONG)]),
        )
    _check_close(stage, before_TH[_SHORT:], whole_TH[half:])
    _check_close(stage, before_TH[:_SHORT], behind_TH[half:])
    return kv_shape


def _check_close(stage: PlainStage, actual_TH: torch.Tensor, expected_TH: torch.Tensor) -> None:
    """The median over tokens, because a near-tie between two experts may move a single one."""
    difference_T = torch.linalg.vector_norm((actual_TH - expected_TH).float(), dim=-1)
    size_T = torch.linalg.vector_norm(expected_TH.float(), dim=-1)
    error = float((difference_T / size_T).median())
    if not torch.isfinite(expected_TH).all():
        raise NumericsError(
            f"a trial step of stage {stage.plan.stage} gives NaN or infinity in "
            f"{str(actual_TH.dtype).removeprefix('torch.')}: the weights are damaged or need "
            'another model.dtype ("bfloat16" or "float32")'
        )
    if not error <= _tolerance(stage, actual_TH.dtype):
        raise refuse(
            stage.model_type,
            f"keeps something between steps beside keys and values (a prompt in two chunks "
            f"differs from one piece by {error:.1%})",
        )


def _tolerance(stage: PlainStage, dtype: torch.dtype) -> float:
    weights = stage.module.parameters()
    if any(weight.dtype == torch.float8_e4m3fn for weight in weights):
        return max(_FP8_TOLERANCE, _TOLERANCE[dtype])
    return _TOLERANCE[dtype]


def _check_calls(stage: PlainStage, calls: list[AttentionCall]) -> tuple[int, int]:
    """Every layer asked for attention once, and for nothing that the backends do not do."""
    layers = [call.layer for call in calls]
    if layers != list(range(stage.plan.num_layers)):
        raise refuse(
            stage.model_type,
            f"does not call attention once in each of its {stage.plan.num_layers} layers "
            f"but in layers {layers} of the stage",
        )
    for call in calls:
        if call.unknown:
            raise refuse(stage.model_type, f"needs attention with {', '.join(call.unknown)}")
        if (call.num_kv_heads, call.key_dim, call.key_dim) != (
            calls[0].num_kv_heads,
            calls[0].key_dim,
            call.value_dim,
        ):
            raise refuse(stage.model_type, "has keys and values of several sizes")
        window = call.options.window
        if _has_window(stage, call.layer) and window is None:
            raise refuse(stage.model_type, "hides its sliding window in a mask")
        if window is not None and window < 1:
            raise refuse(stage.model_type, f"has a sliding window of {window} tokens")
    return calls[0].num_kv_heads, calls[0].key_dim


def _has_window(stage: PlainStage, layer: int) -> bool:
    """Whether the configuration gives layer `layer` of this stage a sliding window."""
    config = stage.module.config
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return bool(layer_types[stage.plan.first_layer + layer] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None


def _trial_input(stage: PlainStage, num_tokens: int) -> torch.Tensor:
    """Token ids for the first stage, else hidden states about as large as embeddings are."""
    generator = torch.Generator().manual_seed(num_tokens)
    if stage.plan.has_embedding:
        ids_T = torch.randint(0, stage.vocab_size, (num_tokens,), generator=generator)
        return ids_T.to(stage.device)
    hidden_TH = 0.02 * torch.randn(num_tokens, stage.hidden_size, generator=generator)
    return hidden_TH.to(stage.device, stage.dtype)


def _layout(stage: PlainStage, sequences: list[tuple[int, int, int]]) -> BatchLayout:
    """A step of (sequence id, query_len, kv_len), for a cache that needs no pages."""
    entries: list[tuple[SequenceLens, list[int]]] = []
    row = 0
    for sequence_id, query_len, kv_len in sequences:
        entries.append((SequenceLens(sequence_id, row, query_len, kv_len), [0]))
        row += query_len
    layout = build_layout(entries, page_size=_LONG)
    if stage.device.type == "cpu":
        return layout
    return to_device(layout, lambda tensor: tensor.to(stage.device))
