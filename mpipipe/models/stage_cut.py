"""A full model on the meta device, and the slice of it that one stage keeps. No weights here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mpipipe.errors import UnsupportedModelError
from mpipipe.models.attention_bridge import ATTENTION_NAME, register
from mpipipe.models.families import ModelParts, check_config, detach_inputs, detach_outputs

if TYPE_CHECKING:
    from mpipipe.planning.plan import StagePlan

__all__ = ["cut_stage", "empty_model"]


def empty_model(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The full model on the meta device, with our attention.

    Raises:
        UnsupportedModelError: transformers does not know it, or its configuration rules it out.
    """
    config = _read_config(folder, trust_remote_code)
    check_config(config)
    register()
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers cannot build the model of {folder} ({type(error).__name__}: {error}): "
            "its config.json lacks something or contradicts itself, or it needs another "
            "version of transformers"
        ) from error
    model.eval()
    model.requires_grad_(False)
    return model


def _read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers does not know the model in {folder} ({error}): a newer transformers "
            "may, or the model brings its own code (model.trust_remote_code = true)"
        ) from error
    return config


def cut_stage(parts: ModelParts, stage: StagePlan) -> nn.ModuleList:
    """Take out of the full model what other stages hold; return the layers that stay."""
    first, last = stage.first_layer, stage.last_layer
    num_layers = len(parts.layers)
    assert 0 <= first < last <= num_layers, f"layers [{first}, {last}) of {num_layers}"
    layers = nn.ModuleList(list(parts.layers)[first:last])
    parts.base.layers = layers
    # The base model's forward loops over config.num_hidden_layers and looks per-layer lists up by
    # the loop's index; the layers themselves keep the full configuration and their global number.
    config = copy.deepcopy(parts.base.config)
    config.num_hidden_layers = last - first
    for name, setting in list(vars(config).items()):
        if "layer" in name and isinstance(setting, list) and len(setting) == num_layers:
            setattr(config, name, setting[first:last])
    parts.base.config = config
    if not stage.has_embedding:
        detach_inputs(parts)
    if not stage.has_head:
        detach_outputs(parts)
    return layers
