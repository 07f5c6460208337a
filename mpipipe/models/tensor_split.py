"""Tensor parallelism: which part of a stage's tensors one lane holds, and where lanes add up.

Of a layer the linears that come first (query, key, value; gate, up) are split by rows, so that
each lane has some of the heads and of the inner channels; those that follow (output, down) by
columns, so that each lane has a summand of their result. The family's own `base_model_tp_plan`
says which is which, or `_PLANS_BY_HAND`. The LM head is split by vocabulary where that divides.
Everything else, the embedding too, is whole on every lane.

A bias behind a sum stays on lane 0 alone. An LM head that is one tensor with the embedding of the
same stage is cut when it is loaded, as a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from mpipipe.models.families import refuse_split
from mpipipe.models.quantized_linear import QuantizedLinear
from mpipipe.types import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mpipipe.data_plane.lanes import Lanes
    from mpipipe.models.families import ModelParts

__all__ = ["WHOLE", "Join", "TensorSplit", "joined_by", "split_stage"]

Linear = nn.Linear | QuantizedLinear
Join = Callable[[torch.Tensor], torch.Tensor]

_ROWS, _COLUMNS = "colwise", "rowwise"  # as transformers calls them, which thinks of x · Wᵀ
# Styles that leave a tensor whole; the second is about gradients.
_WHOLE_STYLES = frozenset({"replicated", "replicated_with_grad_allreduce"})
_PLANS_BY_HAND: dict[str, dict[str, str]] = {
    "opt": {
        "layers.*.self_attn.q_proj": _ROWS,
        "layers.*.self_attn.k_proj": _ROWS,
        "layers.*.self_attn.v_proj": _ROWS,
        "layers.*.self_attn.out_proj": _COLUMNS,
        "layers.*.fc1": _ROWS,
        "layers.*.fc2": _COLUMNS,
    },
}
# Attributes of attention modules that their forward takes the number of heads from.
_HEAD_COUNTS = ("num_heads",)
_JOINED_BY = "mpipipe_joined_by"


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """One lane's part of a stage. Names are those of the module's `state_dict`."""

    shards: Mapping[str, Shard] = field(default_factory=dict)
    summed: tuple[str, ...] = ()  # paths of linears whose results the lanes add up
    head: Shard | None = None  # rows of the LM head; None: it is whole, or on another stage
    cuts_tied_head: bool = False  # the head is the embedding until `cut_head`

    def cut_head(self, model: PreTrainedModel) -> None:
        """Make a loaded head that is the embedding too a view of this lane's rows."""
        if self.head is None or not self.cuts_tied_head:
            return
        head: Any = model.get_output_embeddings()
        first, length = self.head.bounds(head.weight.shape[0])
        head.weight = nn.Parameter(head.weight.narrow(0, first, length), requires_grad=False)
        head.out_features = length

    def attach(self, model: PreTrainedModel, lanes: Lanes) -> None:
        """Let modules of `model` add up and gather what lanes compute. Again after replacing some.

        Paths that are gone belong to a form of the layer that does so itself (`joined_by`).
        """
        for path in self.summed:
            module = _find(model, path)
            if module is not None:
                _hook(module, lanes.add_up)
        if self.head is not None:
            head: Any = model.get_output_embeddings()
            _hook(head, lanes.gather)


WHOLE = TensorSplit()


def split_stage(
    parts: ModelParts, lanes: Lanes, tied: Mapping[str, str], *, has_head: bool
) -> TensorSplit:
    """Cut the modules of a stage, on the meta device, down to what this lane holds.

    Linears may be quantised already.

    Args:
        parts: the model, cut to the stage.
        lanes: of the stage.
        tied: full model: name → the name it shares its tensor with.
        has_head: the stage holds the LM head.

    Raises:
        UnsupportedModelError: the family cannot be split, or not into so many lanes.
    """
    if lanes.num_lanes == 1:
        return WHOLE
    shards: dict[str, Shard] = {}
    summed: list[str] = []
    for path, linear, style in _planned_linears(parts):
        dim = 0 if style == _ROWS else 1
        shard = Shard(dim, lanes.lane, lanes.num_lanes)
        _check_divides(parts, path, linear, shard)
        _cut(linear, shard)
        shards |= {f"{path}.{leaf}": shard for leaf in _cut_leaves(linear, shard)}
        if dim == 1:
            summed.append(path)
            if lanes.lane and linear.bias is not None:
                linear.register_parameter("bias", None)
    _cut_head_counts(parts, lanes)
    head, is_tied = None, False
    if has_head:
        head, is_tied = _split_head(parts, lanes, tied)
    if head is not None and not is_tied:
        module = parts.model.get_output_embeddings()
        (path,) = _paths_of(parts.model, module)
        shards |= {f"{path}.{leaf}": head for leaf in _cut_leaves(module, head)}
    return TensorSplit(shards, tuple(summed), head, cuts_tied_head=is_tied)


def _planned_linears(parts: ModelParts) -> Iterator[tuple[str, Linear, str]]:
    """The linears of the layers that the family's plan splits: path in the model, module, style."""
    config = parts.model.config
    plan = _PLANS_BY_HAND.get(config.model_type) or config.base_model_tp_plan
    if not plan:
        raise refuse_split(config.model_type, "declares no base_model_tp_plan")
    styles = {
        name.removeprefix("layers.*."): style
        for name, style in plan.items()
        if name.startswith("layers.*.") and style not in _WHOLE_STYLES
    }
    layers: Any = parts.base.layers
    for number, layer in enumerate(layers):
        inside = dict(layer.named_modules())
        for name, style in styles.items():
            module = inside.get(name)
            if module is None and name.rpartition(".")[0] not in inside:
                continue  # of another kind of layer
            if style not in {_ROWS, _COLUMNS} or not _is_linear(module):
                raise refuse_split(
                    config.model_type, f'its plan splits "{name}" as "{style}", which is not done'
                )
            yield f"{parts.base_name}.layers.{number}.{name}", module, style


def _is_linear(module: nn.Module | None) -> TypeGuard[Linear]:
    """Not a subclass, which may compute something else."""
    return type(module) is nn.Linear or isinstance(module, QuantizedLinear)


def _check_divides(parts: ModelParts, path: str, linear: Linear, shard: Shard) -> None:
    size = linear.weight.shape[shard.dim]
    if size % shard.count:
        name = path.rpartition(".layers.")[2].partition(".")[2]
        raise refuse_split(
            parts.model.config.model_type,
            f'"{name}" has {size} {"rows" if shard.dim == 0 else "columns"}, which '
            f"{shard.count} lanes do not divide",
        )


def _cut(linear: Linear, shard: Shard) -> None:
    """To the shape of one part, on the meta device."""
    for leaf in _cut_leaves(linear, shard):
        setattr(linear, leaf, _part_of(getattr(linear, leaf), shard))
    linear.out_features, linear.in_features = linear.weight.shape


def _cut_leaves(linear: nn.Module, shard: Shard) -> list[str]:
    """Its tensors of which a lane has a part: a scale and a bias belong to rows."""
    return [
        name
        for name, tensor in linear.named_parameters(recurse=False)
        if tensor.dim() == 2 or shard.dim == 0
    ]


def _part_of(tensor: torch.Tensor, shard: Shard) -> nn.Parameter:
    shape = [*tensor.shape]
    shape[shard.dim] = shard.bounds(shape[shard.dim])[1]
    part = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(part, requires_grad=False)


def _cut_head_counts(parts: ModelParts, lanes: Lanes) -> None:
    """Families whose attention is told how many heads there are."""
    if parts.model.config.model_type not in _PLANS_BY_HAND:
        return
    layers: Any = parts.base.layers
    for module in layers.modules():
        for name in _HEAD_COUNTS:
            if isinstance(vars(module).get(name), int):
                setattr(module, name, vars(module)[name] // lanes.num_lanes)


def _split_head(
    parts: ModelParts, lanes: Lanes, tied: Mapping[str, str]
) -> tuple[Shard | None, bool]:
    """The rows of the LM head that are this lane's, and whether they are cut when it is loaded."""
    model = parts.model
    head = model.get_output_embeddings()
    if not _is_linear(head) or head.weight.shape[0] % lanes.num_lanes:
        return None, False
    shard = Shard(0, lanes.lane, lanes.num_lanes)
    embedding = model.get_input_embeddings()
    (path,) = _paths_of(model, head)
    if embedding is not None and f"{path}.weight" in tied and type(head) is nn.Linear:
        return shard, True
    _cut(head, shard)
    return shard, False


def _paths_of(model: nn.Module, part: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module is part]


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _hook(module: nn.Module, join: Join) -> None:
    """Let `module` return what `join` makes of its result; once."""
    if joined_by(module) is not None:
        return
    setattr(module, _JOINED_BY, join)
    module.register_forward_hook(lambda _, __, result: join(result.contiguous()))


def joined_by(module: nn.Module) -> Join | None:
    """What lanes make of the results of `module`; None: each has the whole result."""
    join: Join | None = vars(module).get(_JOINED_BY)
    return join
