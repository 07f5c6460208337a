"""Buffers that no checkpoint holds: rotary frequencies, embedding scales.

A model built on the meta device has them as empty shells. They are filled the way `from_pretrained`
fills them: real memory first, then the family's own `_init_weights` on the modules that own them,
with every loaded parameter marked as initialised so that it is left alone.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, initialization

from mpipipe.models.families import refuse

__all__ = ["loaded_device", "materialise_buffers"]


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
