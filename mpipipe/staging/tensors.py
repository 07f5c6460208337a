"""Where the tensors of a conversion come from: weight files of a folder, or a GGUF file.

torch is imported here and late: a copy of safetensors files needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from mpipipe.errors import CheckpointError
from mpipipe.staging.layout import TensorPlan, stored_dtype

if TYPE_CHECKING:
    import torch

    from mpipipe.checkpoint.index import CheckpointIndex
    from mpipipe.gguf_model import GgufModel
    from mpipipe.weights.filling import TensorFiller

__all__ = ["GgufReader", "IndexReader", "TensorReader"]

_NUM_READERS = 2  # one reads while the other copies
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")


class TensorReader(Protocol):
    """Tensors by name, each as the bytes of its place in a safetensors file."""

    def plans(self, dtype: str | None) -> Sequence[TensorPlan]:
        """What is stored, in the order in which it is read best; `dtype`: of all floats."""

    def content(self, tensor: TensorPlan) -> memoryview:
        """The bytes of one of `plans`."""

    def close(self) -> None:
        """Let go of the files."""


class IndexReader:
    """The safetensors or `.bin` files of a model folder.

    Args:
        index: names the files.
        is_tied: the LM head shares the embedding's tensor: a second copy of it is left out.
    """

    def __init__(self, index: CheckpointIndex, *, is_tied: bool) -> None:
        self._index = index
        self._is_tied = is_tied
        self._filler: TensorFiller | None = None

    def plans(self, dtype: str | None) -> Sequence[TensorPlan]:
        """In the order of the files.

        Raises:
            CheckpointError: a file is damaged, or holds code.
            UnsupportedModelError: a type has no place in safetensors files.
        """
        source = self._open().source
        stored = {name: source.stored(name) for name in source.names()}
        plans = [
            TensorPlan(name, stored_dtype(name, stored[name].dtype, dtype), stored[name].shape)
            for name in sorted(stored, key=lambda name: stored[name].order)
        ]
        twins = self._twins(plans)
        return [plan for plan in plans if plan.name not in twins]

    def content(self, tensor: TensorPlan) -> memoryview:
        """Read, and converted where the types differ.

        Raises:
            CheckpointError: a value does not fit the type.
        """
        read = self._tensor(tensor)
        stored = replace(tensor, dtype=self._open().source.stored(tensor.name).dtype)
        if stored.dtype != tensor.dtype:
            _require_held(tensor, read, lambda: self._tensor(stored))
        return _bytes_of(read)

    def close(self) -> None:
        """Let go of the files."""
        if self._filler is not None:
            self._filler.close()
            self._filler.source.close()
            self._filler = None

    def _open(self) -> TensorFiller:
        import torch

        from mpipipe.weights.filling import TensorFiller
        from mpipipe.weights.sources import open_source

        if self._filler is None:
            source = open_source(self._index)
            self._filler = TensorFiller(
                source, num_threads=_NUM_READERS, device=torch.device("cpu")
            )
        return self._filler

    def _tensor(self, plan: TensorPlan) -> torch.Tensor:
        import torch

        from mpipipe.weights.filling import Filling

        out = torch.empty(plan.shape, dtype=getattr(torch, plan.dtype))
        for _ in self._open().fill([Filling(out, [(plan.name, out)])]):
            pass
        return out

    def _twins(self, plans: Sequence[TensorPlan]) -> set[str]:
        """LM heads that hold what the embedding holds, as `.bin` files list shared tensors."""
        import torch

        embeddings = [plan for plan in plans if plan.name.endswith(_EMBEDDINGS)]
        heads = [plan for plan in plans if plan.name.endswith(_HEADS)]
        if not self._is_tied or len(embeddings) != 1:
            return set()
        return {
            head.name
            for head in heads
            if (head.dtype, head.shape) == (embeddings[0].dtype, embeddings[0].shape)
            and torch.equal(self._tensor(head), self._tensor(embeddings[0]))
        }


class GgufReader:
    """The tensors of a GGUF file, decoded."""

    def __init__(self, model: GgufModel) -> None:
        self._model = model

    def plans(self, dtype: str | None) -> Sequence[TensorPlan]:
        """In the order of the file."""
        kind = dtype or self._model.dtype
        return [TensorPlan(name, kind, shape) for name, shape in self._model.shapes.items()]

    def content(self, tensor: TensorPlan) -> memoryview:
        """Decoded to float32, then rounded.

        Raises:
            CheckpointError: a value does not fit the type.
        """
        import torch

        decoded = self._model.tensor(tensor.name)
        rounded = decoded.to(getattr(torch, tensor.dtype))
        _require_held(tensor, rounded, lambda: decoded)
        return _bytes_of(rounded)

    def close(self) -> None:
        """The file is mapped for as long as the model is there."""


def _require_held(
    plan: TensorPlan, rounded: torch.Tensor, exact: Callable[[], torch.Tensor]
) -> None:
    """Raises CheckpointError where rounding has made an infinity of a number."""
    if rounded.isfinite().all():
        return
    values = exact().float()
    if values.isfinite().all():
        raise CheckpointError(
            f"{plan.name} has values up to {values.abs().max():.3g}, which {plan.dtype} does not "
            "hold: choose --dtype bfloat16 or float32"
        )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
