"""The names of a full model's tensors, and what transformers calls the ones in older checkpoints.

Some families name their tensors differently in checkpoints than in their modules (`embed_out` of
GPT-NeoX is `lm_head` since transformers 5); the library keeps a table of renamings, used here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

__all__ = ["CheckpointNames"]


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """Of one full model, taken before it is cut into a stage."""

    shells: dict[str, torch.Tensor]  # the full state_dict, on the meta device
    tied: dict[str, str]  # name → the name it shares its tensor with
    renamings: tuple[WeightRenaming, ...]
    base_prefix: str  # "model" in "model.layers.0…"

    @classmethod
    def of(cls, model: PreTrainedModel) -> CheckpointNames:
        """The names of `model`, which must be whole."""
        renamings = tuple(
            transform
            for transform in get_model_conversion_mapping(model)
            if isinstance(transform, WeightRenaming)
        )
        return cls(
            shells=dict(model.state_dict()),
            tied=dict(model.all_tied_weights_keys),
            renamings=renamings,
            base_prefix=model.base_model_prefix,
        )

    def canonical(self, checkpoint_name: str) -> str:
        """The full model's name for a tensor found in a checkpoint; unchanged if it has none.

        Adds or drops the base model's prefix where that makes it a name of the model.
        """
        name: str = rename_source_key(
            checkpoint_name, list(self.renamings), [], self.base_prefix, self.shells
        )[0]
        return name
