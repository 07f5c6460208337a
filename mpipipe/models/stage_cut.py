"""A full model on the meta device, its tensors' names, and the slice of it that one stage keeps.

Some families name their tensors differently in checkpoints than in their modules (`embed_out` of
GPT-NeoX is `lm_head` since transformers 5); the library keeps a table of renamings, used here.

Buffers that no checkpoint holds (rotary frequencies, embedding scales) are empty shells on the meta
device. They are filled the way `from_pretrained` fills them: real memory first, then the family's
own `_init_weights` on the modules that own them, with every loaded parameter marked as initialised
so that it is left alone.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpipipe.checkpoint.jsonfile import read_json_object
from mpipipe.errors import UnsupportedModelError
from mpipipe.models.attention_bridge import ATTENTION_NAME, register
from mpipipe.models.families import ModelParts, check_config, detach_inputs, detach_outputs, refuse
from mpipipe.models.llama_config import llama_config
from mpipipe.models.llama_modules import LlamaModel, empty_llama

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PretrainedConfig, PreTrainedModel

    from mpipipe.planning.plan import StagePlan

__all__ = ["CheckpointNames", "cut_stage", "empty_model", "loaded_device", "materialise_buffers"]


def empty_model(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel | LlamaModel:
    """The full model on the meta device, with our attention.

    Its modules are ours, where there are some for its family (`llama_modules`), else transformers',
    which is imported then.

    Args:
        folder: its `config.json` is read.
        dtype: of the parameters.
        trust_remote_code: run Python code found in the folder.

    Raises:
        UnsupportedModelError: transformers does not know it, or its configuration rules it out.
    """
    known = llama_config(read_json_object(folder / "config.json"))
    if known is not None:
        return empty_llama(known, dtype)
    return _empty_of_transformers(folder, dtype, trust_remote_code)


def _empty_of_transformers(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

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
    from transformers import AutoConfig

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


def materialise_buffers(
    model: PreTrainedModel | LlamaModel, base: Any, device: torch.device
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
        vars(parameter)["_is_hf_initialized"] = True
    guarded = _guard_of(model)
    for module, names in owners.items():
        for name in names:
            shell = module.get_buffer(name)
            # NaN shows below what the family's code did not fill.
            fill = float("nan") if shell.is_floating_point() else 0
            buffer = torch.full(shell.shape, fill, dtype=shell.dtype, device=device)
            module.register_buffer(name, buffer, persistent=False)
        if names:
            with torch.no_grad(), guarded():
                base._init_weights(module)
    for module, names in owners.items():
        for name in names:
            if bool(torch.isnan(module.get_buffer(name)).any()):
                raise refuse(model.config.model_type, f'leaves its buffer "{name}" without values')


def _guard_of(model: PreTrainedModel | LlamaModel) -> Callable[[], AbstractContextManager[object]]:
    """What keeps the family's own code from filling parameters again."""
    if isinstance(model, LlamaModel):
        return nullcontext
    from transformers import initialization

    guard: Callable[[], AbstractContextManager[object]] = initialization.guard_torch_init_functions
    return guard


def loaded_device(module: nn.Module) -> torch.device:
    """Where the weights of a loaded stage are; holds none of them when it returns."""
    state = module.state_dict(keep_vars=True)
    missing = [name for name, tensor in state.items() if tensor.is_meta]
    assert not missing, f"not loaded: {', '.join(missing[:5])}"
    first: torch.Tensor = next(iter(state.values()))
    return first.device


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """Of one full model, taken before it is cut into a stage."""

    shells: dict[str, torch.Tensor]  # the full state_dict, on the meta device
    tied: dict[str, str]  # name → the name it shares its tensor with
    rename: Callable[[str], str]  # see `canonical`

    @classmethod
    def of(cls, model: PreTrainedModel | LlamaModel) -> CheckpointNames:
        """The names of `model`, which must be whole."""
        shells = dict(model.state_dict())
        ours = isinstance(model, LlamaModel)
        rename = partial(_prefixed, shells) if ours else _renaming_of(model, shells)
        return cls(shells, dict(model.all_tied_weights_keys), rename)

    def canonical(self, checkpoint_name: str) -> str:
        """The full model's name for a tensor found in a checkpoint; unchanged if it has none.

        Adds or drops the base model's prefix where that makes it a name of the model.
        """
        return self.rename(checkpoint_name)


def _prefixed(shells: Mapping[str, object], checkpoint_name: str) -> str:
    """As `CheckpointNames.canonical`, for our own modules."""
    prefix = f"{LlamaModel.base_model_prefix}."
    for name in (checkpoint_name.removeprefix(prefix), prefix + checkpoint_name):
        if checkpoint_name not in shells and name in shells:
            return name
    return checkpoint_name


def _renaming_of(
    model: PreTrainedModel, shells: Mapping[str, torch.Tensor]
) -> Callable[[str], str]:
    """What transformers does with the names of a checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [
        transform
        for transform in get_model_conversion_mapping(model)
        if isinstance(transform, WeightRenaming)
    ]

    def rename(checkpoint_name: str) -> str:
        name: str = rename_source_key(
            checkpoint_name, renamings, [], model.base_model_prefix, shells
        )[0]
        return name

    return rename
