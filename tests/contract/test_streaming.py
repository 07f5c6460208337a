"""Modules whose weights stand elsewhere, one by one."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from mpipipe.models.streaming import StreamedWeights, attach_streaming


class Embedded(nn.Module):
    """As much of a causal language model as an embedding needs."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        self.embedding = embedding


def test_an_embedding_with_a_padding_row_is_looked_up_as_well() -> None:
    """The row's number, which SmolLM2 has, means nothing among the few rows of a step."""
    model = Embedded(nn.Embedding(12, 3, padding_idx=9))
    rows = torch.arange(36.0).reshape(12, 3)
    streamed = StreamedWeights(embedding_rows=lambda ids: rows[ids])
    attach_streaming(model, SimpleNamespace(layers=[]), streamed)
    ids = torch.tensor([1, 9, 1])
    assert torch.equal(model.embedding(ids), rows[ids])
