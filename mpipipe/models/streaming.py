"""What a stage's layers know of weights that do not stay on the device.

The weights of a *part*, a layer or a block of the LM head's rows, stand elsewhere and are brought
into a staging buffer ahead of their use. The tensors of a part's module are views of that buffer,
always the same ones: before the module computes, its gate sees to it that they hold its weights;
after it, the buffer is free for the next part. `weights.prefetch` does the bringing.

An embedding that does not fit is looked up where it stands: a step needs few of its rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel

__all__ = [
    "NO_GATES",
    "StreamedHead",
    "StreamedWeights",
    "WeightGates",
    "attach_streaming",
    "put_gates",
]


class WeightGates(Protocol):
    """Told what a step is about to use, and has used.

    Parts are numbered in the order of their use: the layers as in the stage, behind them the
    blocks of the head. What is said of a part that stays on the device means nothing.
    """

    def before(self, part: int) -> None:
        """What the calling thread computes next finds the weights of `part` in place.

        Raises:
            EnvironmentSetupError: they cannot be read.
        """
        ...

    def after(self, part: int) -> None:
        """What was computed so far has used the weights of `part`: they may be overwritten."""
        ...

    def end(self) -> None:
        """The step has used all parts that it uses: the others pass by without use."""
        ...


class _NoGates:
    """All weights stay on the device."""

    def before(self, part: int) -> None: ...

    def after(self, part: int) -> None: ...

    def end(self) -> None: ...


NO_GATES: WeightGates = _NoGates()


@dataclass(frozen=True, slots=True)
class StreamedWeights:
    """The weights of one stage that do not stay on its device."""

    gates: WeightGates = NO_GATES
    layers: frozenset[int] = frozenset()  # numbers in the stage; their tensors are buffers' views
    # By block of rows, the tensors of the head's module for these rows; empty: it stays.
    head_blocks: tuple[Mapping[str, torch.Tensor], ...] = ()
    # ids int64 [U], on the host → their rows [U, hidden], on the host; None: the embedding stays.
    embedding_rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    waits_on_host: bool = False  # a gate waits in the calling thread, so no CUDA graph can hold it


class StreamedHead(nn.Module):
    """An LM head that computes one block of its outputs after the other.

    Args:
        blocks: [..., hidden] → [..., rows of the block], in the order of the rows.
        gates: of the stage.
        first_part: the number of the first block among the stage's parts.
    """

    def __init__(
        self,
        blocks: Sequence[Callable[[torch.Tensor], torch.Tensor]],
        gates: WeightGates,
        first_part: int,
    ) -> None:
        super().__init__()
        self.blocks: tuple[Any, ...] = tuple(
            blocks
        )  # no children: they hold views, nothing to load or to pack
        self.gates = gates
        self.first_part = first_part

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., hidden] → [..., vocabulary]."""
        outputs = []
        for number, block in enumerate(self.blocks, self.first_part):
            self.gates.before(number)
            outputs.append(block(rows))
            self.gates.after(number)
        return torch.cat(outputs, dim=-1)


class _LookedUpEmbedding(nn.Module):
    """An embedding whose rows come from elsewhere, step by step."""

    def __init__(
        self, embedding: nn.Module, lookup: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        if isinstance(embedding, nn.Embedding):
            embedding.padding_idx = None  # gradients only; rows have other numbers here
        self._embedding = embedding
        self._lookup = lookup

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """As the embedding does, whatever its family does beside looking up."""
        found, places = torch.unique(ids, return_inverse=True)
        rows = self._lookup(found.cpu()).to(ids.device)
        self._embedding.weight = nn.Parameter(rows, requires_grad=False)
        embedded: torch.Tensor = self._embedding(places)
        return embedded


def attach_streaming(model: PreTrainedModel, base: Any, streamed: StreamedWeights) -> None:
    """Put the gates round the modules of a loaded stage.

    Args:
        model: the causal language model that the stage was cut from.
        base: its base model, whose `layers` are the stage's.
        streamed: what does not stay on the device.
    """
    for number in sorted(streamed.layers):
        put_gates(base.layers[number], streamed.gates, number)
    if streamed.embedding_rows is not None:
        embedding = model.get_input_embeddings()
        model.set_input_embeddings(_LookedUpEmbedding(embedding, streamed.embedding_rows))
    if streamed.head_blocks:
        head = model.get_output_embeddings()
        blocks = [_block_of(head, tensors) for tensors in streamed.head_blocks]
        model.set_output_embeddings(StreamedHead(blocks, streamed.gates, len(base.layers)))


def put_gates(layer: nn.Module, gates: WeightGates, number: int) -> None:
    """`layer` computes between the gates of part `number`."""

    def before(*_: object) -> None:
        gates.before(number)

    def after(*_: object) -> None:
        gates.after(number)

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def _block_of(head: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module like `head`, for some of its rows."""
    block = copy.copy(head)
    block._parameters, block._buffers = dict(head._parameters), dict(head._buffers)
    for name, tensor in tensors.items():
        if name in block._parameters:
            block._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            block._buffers[name] = tensor
    return block
