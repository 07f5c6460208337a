"""How transformers' layers reach our attention and cache.

transformers lets a model name its attention function; ours is registered under `ATTENTION_NAME`
and finds the stage's cache through the `ForwardContext` that `attach_context` puts on each
attention module. There is no mask function of that name, which makes transformers skip its masks:
causality, windows and sequence borders are the backend's work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpipipe.models.layer_options import AttentionOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mpipipe.kv_cache.base import KVCache
    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.attention.base import AttentionBackend

__all__ = [
    "ATTENTION_NAME",
    "AttentionCall",
    "ForwardContext",
    "attach_context",
    "attend_in_context",
    "register",
]

ATTENTION_NAME = "mpipipe_varlen"
_CONTEXT = "mpipipe_context"

# What transformers passes along to every attention function and what means nothing to ours.
_IGNORED_ARGUMENTS = frozenset(
    {"position_ids", "position_embeddings", "use_cache", "is_causal", "output_router_logits"}
)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer asked of attention; recorded while a stage is verified."""

    layer: int
    options: AttentionOptions
    num_kv_heads: int
    key_dim: int
    value_dim: int
    unknown: tuple[str, ...]  # arguments given that our backends do not implement


@dataclass(slots=True)
class ForwardContext:
    """What the layers of one stage share. `layout` is the step being run."""

    backend: AttentionBackend
    first_layer: int
    cache: KVCache | None = None
    layout: BatchLayout | None = None
    # The layer, within the stage, behind whose attention only `sampled_rows_S` are computed: the
    # model's last one, if it can.
    cut_layer: int | None = None
    sampled_rows_S: torch.Tensor | None = None  # int64, of the step being run; None: all
    calls: list[AttentionCall] | None = None  # a list: record every call
    options: dict[tuple[float | None, int | None, float | None], AttentionOptions] = field(
        default_factory=dict
    )


def register() -> None:
    """Make `ATTENTION_NAME` known to transformers. Idempotent."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)


def attach_context(layers: nn.ModuleList, context: ForwardContext) -> None:
    """Give every module of `layers` that knows its layer number the context."""
    for module in layers.modules():
        if isinstance(vars(module).get("layer_idx"), int):
            setattr(module, _CONTEXT, context)


def attend_in_context(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention for modules of our own: [1, heads, T, D] in, [1, T, heads, D] out."""
    window = sliding_window
    return _attention(module, query, key, value, None, scaling=scaling, sliding_window=window)[0]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The attention interface of transformers: [1, heads, T, D] in, [1, T, heads, D] out."""
    context: ForwardContext = getattr(module, _CONTEXT)
    layer = int(vars(module)["layer_idx"]) - context.first_layer
    options_key = (scaling, sliding_window, softcap)
    options = context.options.get(options_key)
    if options is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        options = AttentionOptions(scale=scale, window=sliding_window, softcap=softcap)
        context.options[options_key] = options
    if context.calls is not None:
        unknown = _unknown(module, attention_mask, dropout, kwargs)
        call = AttentionCall(layer, options, key.shape[1], key.shape[-1], value.shape[-1], unknown)
        context.calls.append(call)
    assert context.cache is not None, "the stage is bound to a cache before it runs"
    assert context.layout is not None, "forward sets the layout"
    output_THD = context.backend.attend(
        layer=layer,
        query_THD=query[0].transpose(0, 1),
        key_TKD=key[0].transpose(0, 1),
        value_TKD=value[0].transpose(0, 1),
        cache=context.cache,
        layout=context.layout,
        options=options,
    )
    return output_THD[None], None


def _unknown(
    module: nn.Module,
    attention_mask: torch.Tensor | None,
    dropout: float,
    kwargs: dict[str, object],
) -> tuple[str, ...]:
    """Names of the things asked for that no backend of ours does."""
    names = [
        name
        for name, argument in kwargs.items()
        if argument is not None and argument is not False and name not in _IGNORED_ARGUMENTS
    ]
    if attention_mask is not None:
        names.append("attention_mask")
    if dropout:
        names.append("dropout")
    if vars(module).get("is_causal") is False or kwargs.get("is_causal") is False:
        names.append("is_causal=False")
    return tuple(sorted(names))
