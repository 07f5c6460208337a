"""Buffers that no checkpoint holds: rotary frequencies, embedding scales.

A model built on the meta device has them as empty shells. They are filled the way `from_pretrained`
fills them: real memory first, then the family's own `_init_weights` on the modules that own them,
with every loaded parameter marked as initialised so that it is left alone.

Two rotary variants change their frequencies with the longest position of the *batch*, so that a
sequence's result would depend on what else is in the step. They are frozen here, by the longest
context of the run.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, initialization

from mpipipe.errors import ConfigError
from mpipipe.models.families import refuse

__all__ = ["freeze_rotary", "loaded_device", "materialise_buffers"]


def materialise_buffers(
    model: PreTrainedModel, base: PreTrainedModel, device: torch.device
) -> None:
    """Give every non-persistent buffer memory on `device` and its value.

    Raises:
        UnsupportedModelError: the family's code leaves one without a value.
    """
    owners = {
        module: [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for module in model.modules()
    }
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module, names in owners.items():
        for name in names:
            shell = module.get_buffer(name)
            # NaN shows below what the family's code did not fill.
            fill = float("nan") if shell.is_floating_point() else 0
            buffer = torch.full(shell.shape, fill, dtype=shell.dtype, device=device)
            module.register_buffer(name, buffer, persistent=False)
        if names:
            with torch.no_grad(), initialization.guard_torch_init_functions():
                base._init_weights(module)
    for module, names in owners.items():
        for name in names:
            if bool(torch.isnan(module.get_buffer(name)).any()):
                raise refuse(model.config.model_type, f'leaves its buffer "{name}" without values')


def loaded_device(module: nn.Module) -> torch.device:
    """Where the weights of a loaded stage are; holds none of them when it returns."""
    state = module.state_dict(keep_vars=True)
    missing = [name for name, tensor in state.items() if tensor.is_meta]
    assert not missing, f"not loaded: {', '.join(missing[:5])}"
    first: torch.Tensor = next(iter(state.values()))
    return first.device


def freeze_rotary(base: PreTrainedModel, max_context_tokens: int) -> None:
    """Settle rotary embeddings that look at the longest position of the batch.

    `longrope` takes its long factors for the whole run if the run's context is longer than the
    original one, else its short ones (transformers switches when a sequence gets there). `dynamic`
    equals plain rotary up to the original context; beyond it no batched answer is right.

    Raises:
        ConfigError: a `dynamic` model is to run beyond its original context.
    """
    for module in base.modules():
        attributes = vars(module)
        kind = attributes.get("rope_type")
        if isinstance(kind, str):
            attributes["rope_type"] = _frozen(module, kind, None, max_context_tokens)
        elif isinstance(kind, dict):
            attributes["rope_type"] = {
                layer_type: _frozen(module, name, layer_type, max_context_tokens)
                for layer_type, name in kind.items()
            }


def _frozen(module: nn.Module, kind: str, layer_type: str | None, max_context_tokens: int) -> str:
    """The rotary type that keeps the module's frequencies as they are after this call."""
    if "dynamic" in kind:
        original = int(vars(module)["original_max_seq_len"])
        if max_context_tokens > original:
            raise ConfigError(
                f"memory.max_context_tokens = {max_context_tokens}, but this model's rotary "
                f'embedding ("{kind}") changes with the longest sequence of a batch beyond '
                f"{original} tokens: set memory.max_context_tokens to at most {original}"
            )
        return "default"
    if kind == "longrope":
        parameters = vars(module)["config"].rope_parameters
        chosen = parameters if layer_type is None else parameters[layer_type]
        original = int(chosen["original_max_position_embeddings"])
        if max_context_tokens > original:
            # One call at a position beyond the original context sets the long frequencies.
            arguments = () if layer_type is None else (layer_type,)
            module(torch.zeros(1), torch.tensor([[original]]), *arguments)
        return "default"
    return kind
