"""A stage as its modules compute it, transformers' or ours, with our attention and cache.

The base model's forward runs on all stages but the last, the causal model's forward on the last
one, so that what a family does to its hidden states or logits comes with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.attention_bridge import AttentionCall, ForwardContext
from mpipipe.models.streaming import StreamedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mpipipe.kv_cache.base import KVCache
    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.families import ModelParts
    from mpipipe.models.layer_options import AttentionOptions
    from mpipipe.planning.plan import StagePlan

__all__ = ["PlainStage"]


class PlainStage:
    """The modules of one stage and how a step runs through them."""

    def __init__(
        self, plan: StagePlan, parts: ModelParts, context: ForwardContext, dtype: torch.dtype
    ) -> None:
        self.plan = plan
        self.module: PreTrainedModel = parts.model
        self.dtype = dtype
        self.model_type: str = parts.model.config.model_type
        self.hidden_size: int = parts.model.config.hidden_size
        self.vocab_size: int = parts.model.config.vocab_size
        self.device = torch.device("meta")  # where the weights are, once they are loaded
        self._base = parts.base
        self._output_names = parts.output_names
        self._context = context
        self._options: dict[int, AttentionOptions] = {}  # by layer, as seen by `recording`
        self._streamed = StreamedWeights()

    def run_base(
        self, inputs: torch.Tensor, layout: BatchLayout, rows_S: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The stage without LM head (but with the final norm, if it is here): [T, hidden].

        `rows_S` are those whose output will be read, None: all. The others may be left out, if
        this is the last stage.
        """
        self._context.layout, self._context.sampled_rows_S = layout, rows_S
        output = self._base(**self._arguments(inputs, layout), use_cache=False)
        self._streamed.gates.end()
        hidden_TH: torch.Tensor = output.last_hidden_state[0]
        return hidden_TH

    def run_model(
        self, inputs: torch.Tensor, layout: BatchLayout, rows_S: torch.Tensor | None
    ) -> torch.Tensor:
        """The last stage, head included: logits [S, vocabulary] of `rows_S`; None: of all rows."""
        context = self._context
        context.layout, context.sampled_rows_S = layout, rows_S
        is_cut = context.cut_layer is not None
        output = self.module(
            **self._arguments(inputs, layout),
            logits_to_keep=0 if rows_S is None or is_cut else rows_S,
            use_cache=False,
        )
        self._streamed.gates.end()
        logits_SV: torch.Tensor = output.logits[0]
        return logits_SV

    def run_without_layers(self, hidden_TH: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """What the base model's forward does around its layers and output parts; for checks."""
        kept = {name: getattr(self._base, name) for name in ("layers", *self._output_names)}
        self._base.layers = nn.ModuleList()
        for name in self._output_names:
            setattr(self._base, name, nn.Identity() if kept[name] is not None else None)
        try:
            return self.run_base(hidden_TH, layout)
        finally:
            for name, part in kept.items():
                setattr(self._base, name, part)

    @contextmanager
    def recording(self, cache: KVCache) -> Iterator[list[AttentionCall]]:
        """Run on a throw-away `cache` and list what attention is asked for; for checks.

        With SDPA, which takes every cache: what is checked is the family, not the backend.
        """
        context = self._context
        calls: list[AttentionCall] = []
        kept = context.cache, context.backend
        context.cache, context.backend, context.calls = cache, SdpaAttention(), calls
        try:
            yield calls
            self._options.update({call.layer: call.options for call in calls})
        finally:
            context.cache, context.backend = kept
            context.calls, context.layout = None, None

    def _arguments(self, inputs: torch.Tensor, layout: BatchLayout) -> dict[str, torch.Tensor]:
        name = "input_ids" if self.plan.has_embedding else "inputs_embeds"
        return {name: inputs[None], "position_ids": layout.positions_T[None]}
