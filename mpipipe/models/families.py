"""What is known about model families: where the parts of a model are, and what must be refused.

The parts come from the family's own `base_model_pp_plan`; a family without one is listed in
`_PARTS_BY_HAND`. A family that does something to its inputs or outputs outside those parts has a
function in `_LATER_STAGE_CHANGES`. `stage_cut` cuts a stage out, `verification` runs the model to
check it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from mpipipe.checkpoint.families import refuse, refuse_split
from mpipipe.models.llama_modules import LlamaLayer, LlamaModel
from mpipipe.models.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightConverter

__all__ = [
    "LinearTensors",
    "ModelParts",
    "can_merge",
    "check_config",
    "detach_inputs",
    "detach_outputs",
    "has_silu",
    "is_known",
    "join_rows",
    "locate_parts",
    "merge_linears",
    "merged_linears",
    "refuse",
    "refuse_split",
]

# Families without base_model_pp_plan: the base model's parts before and behind its layers.
_PARTS_BY_HAND: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "opt": (
        ("embed_tokens", "embed_positions", "project_in"),
        ("final_layer_norm", "project_out"),
    ),
}

_ATTENTION_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

# Settings that make a layer depend on more than its input and its own keys and values.
_REFUSED_SETTINGS = {
    "hidden_size_per_layer_input": "feeds the token ids into every layer",
    "num_kv_shared_layers": "shares keys and values between layers",
    "use_bidirectional_attention": "lets tokens see later ones",
    "attention_chunk_size": "attends in chunks",
}


@dataclass(frozen=True, slots=True)
class ModelParts:
    """Where the parts of one full model are."""

    model: PreTrainedModel  # XForCausalLM
    base: PreTrainedModel  # holds the layers
    base_name: str  # its path in `model`, e.g. "model.decoder"
    input_names: tuple[str, ...]  # children of `base` before the layers
    output_names: tuple[str, ...]  # children of `base` behind the layers
    head_names: tuple[str, ...]  # children of `model` beside the base model
    layers: nn.ModuleList


def is_known(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether `module` is one of ours for Llama-like models, or one of transformers' `names`.

    A class of that name in a model's own code may compute something else.
    """
    kind = type(module)
    if kind in {LlamaLayer, LlamaModel}:
        return True
    return kind.__name__ in names and kind.__module__.startswith("transformers.models.")


def has_silu(layer: Any) -> bool:
    """Whether the gated MLP of a Llama-like layer has SiLU as its activation."""
    return type(layer.mlp.act_fn).__name__ in {"SiLU", "SiLUActivation"}


class LinearTensors(NamedTuple):
    """What one linear layer, or several merged ones, compute with."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None
    scale_O: torch.Tensor | None  # float32; of a weight in 8 bits


def merged_linears(layer: Any) -> Iterator[tuple[Any, ...]]:
    """Of a Llama-like layer: the linears that fused layers make one product of."""
    attention, mlp = layer.self_attn, layer.mlp
    yield attention.q_proj, attention.k_proj, attention.v_proj
    yield (attention.o_proj,)
    yield mlp.gate_proj, mlp.up_proj
    yield (mlp.down_proj,)


def can_merge(*linears: nn.Module) -> bool:
    """Whether they are plain linears, or quantised in one way, all of them."""
    kinds = {type(linear) for linear in linears}
    return (
        kinds in ({nn.Linear}, {QuantizedLinear})
        and len({linear.weight.dtype for linear in linears}) == 1
    )


def merge_linears(*linears: nn.Linear | QuantizedLinear) -> LinearTensors:
    """Those of one linear whose outputs are those of `linears`, one after the other.

    Views, where the linears' own lie side by side in one storage; else copies.
    """
    biases = [linear.bias for linear in linears if linear.bias is not None]
    scales = [linear.scale for linear in linears if isinstance(linear, QuantizedLinear)]
    return LinearTensors(
        join_rows([linear.weight for linear in linears]),
        join_rows(biases) if biases else None,
        join_rows(scales) if scales else None,
    )


def join_rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`tensors` one after the other: a view, where they lie so in one storage; else a copy."""
    first, ends = tensors[0].detach(), [t.data_ptr() + t.nbytes for t in tensors]
    side_by_side = all(
        tensor.is_contiguous()
        and tensor.dtype == first.dtype
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for tensor in tensors
    ) and ends[:-1] == [tensor.data_ptr() for tensor in tensors[1:]]
    if not side_by_side:
        return torch.cat([tensor.detach() for tensor in tensors])
    shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
    return first.as_strided(shape, first.stride())


def check_config(config: PretrainedConfig) -> None:
    """Refuse what the configuration alone rules out, before anything is built.

    Raises:
        UnsupportedModelError: naming the family and the reason.
    """
    model_type = config.model_type
    if config.is_encoder_decoder:
        raise refuse(model_type, "has an encoder beside the decoder")
    if config.get_text_config() is not config:
        raise refuse(model_type, "is multi-modal")
    if not getattr(config, "is_causal", True):
        raise refuse(model_type, f"lets tokens see later ones (is_causal = {config.is_causal!r})")
    if model_type not in _PARTS_BY_HAND and not config.base_model_pp_plan:
        raise refuse(
            model_type, "declares no base_model_pp_plan, so nothing says how it can be split"
        )
    for name, why in _REFUSED_SETTINGS.items():
        if getattr(config, name, None):
            raise refuse(model_type, f"{why} ({name} = {getattr(config, name)!r})")
    other_types = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYER_TYPES
    if other_types:
        raise refuse(model_type, f"has layers of type {', '.join(sorted(other_types))}")
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = get_checkpoint_conversion_mapping(model_type)
    for conversion in conversions or ():
        if isinstance(conversion, WeightConverter) and not _is_expert_fusion(conversion):
            raise refuse(
                model_type,
                "stores its weights in another layout than its modules use "
                f"({', '.join(conversion.target_patterns)})",
            )


def _is_expert_fusion(conversion: WeightConverter) -> bool:
    """Whether a layout change is one of those that the loader does: experts into one tensor."""
    return all(
        re.search(r"\.experts\.\*\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$", source)
        for source in conversion.source_patterns
    )


def locate_parts(model: PreTrainedModel | LlamaModel) -> ModelParts:
    """Find embedding, layers, norm and head in a full model.

    Raises:
        UnsupportedModelError: a part with weights is in none of the known places.
    """
    model_type = model.config.model_type
    base_name, base = _base_model(model)
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != base.config.num_hidden_layers:
        raise refuse(model_type, "keeps its layers in a place that is not known")
    input_names, output_names = _PARTS_BY_HAND.get(model_type) or _planned_parts(base.config)
    known = {"layers", *input_names, *output_names}
    for name, child in base.named_children():
        if name not in known and any(True for _ in child.parameters()):
            raise refuse(model_type, f'has weights in "{name}", outside its declared parts')
    if any(True for _ in base.parameters(recurse=False)):
        raise refuse(model_type, "has weights outside its declared parts")
    top_name = base_name.partition(".")[0]
    head_names = tuple(name for name, _ in model.named_children() if name != top_name)
    return ModelParts(model, base, base_name, input_names, output_names, head_names, layers)


def detach_inputs(parts: ModelParts) -> None:
    """Make the base model take the hidden states of the stage before as its `inputs_embeds`."""
    for name in parts.input_names:
        part = getattr(parts.base, name)
        if part is not None and any(True for _ in part.parameters()):  # a dropout may stay
            setattr(parts.base, name, None)
    change = _LATER_STAGE_CHANGES.get(parts.model.config.model_type)
    if change is not None:
        change(parts.base)


def detach_outputs(parts: ModelParts) -> None:
    """Make the base model return the last layer's hidden states, and drop the head."""
    for name in parts.output_names:
        if getattr(parts.base, name) is not None:  # OPT: None means that there is no such part
            setattr(parts.base, name, nn.Identity())
    for name in parts.head_names:
        setattr(parts.model, name, None)


def _base_model(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """The innermost transformers model that owns the layers, and its path."""
    for name, module in model.named_modules():
        if name and hasattr(module, "base_model_prefix") and hasattr(module, "layers"):
            return name, module
    raise refuse(model.config.model_type, "has no inner model with layers")


def _planned_parts(config: PretrainedConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names before and behind "layers" in the family's own pipeline plan."""
    names = list(config.base_model_pp_plan or ())
    if "layers" not in names:
        raise refuse(config.model_type, "declares a base_model_pp_plan without layers")
    at = names.index("layers")
    return tuple(names[:at]), tuple(names[at + 1 :])


class _NoPositions(nn.Module):
    """Stands in for OPT's position embedding, which the first stage has added already."""

    def forward(self, mask_1T: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:  # noqa: ARG002
        """A zero of the narrowest floating type: adding it changes neither values nor dtype.

        Made on the device: a copy to it would wait, and no CUDA graph could hold it.
        """
        return torch.zeros((), device=mask_1T.device)


def _change_opt(base: PreTrainedModel) -> None:
    base.embed_positions = _NoPositions()


def _change_embedding_multiplier(base: PreTrainedModel) -> None:
    vars(base)["embedding_multiplier"] = 1.0


def _change_mup(base: PreTrainedModel) -> None:
    base.config.mup_enabled = False


# What a later stage must not do again to its inputs. `base.config` is the stage's own copy.
_LATER_STAGE_CHANGES: dict[str, Callable[[PreTrainedModel], None]] = {
    "opt": _change_opt,
    "granite": _change_embedding_multiplier,
    "granite_swa": _change_embedding_multiplier,
    "hyperclovax": _change_embedding_multiplier,
    "afmoe": _change_mup,
}
