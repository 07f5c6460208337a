"""What a step leaves on the stream: the outcome of `StageEngine`, for the worker to pass on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["LaunchedStep", "LogprobTensors"]


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of a step, on their way to the host."""

    ids_S: torch.Tensor
    chosen_S: torch.Tensor
    top_ids_SK: torch.Tensor
    top_values_SK: torch.Tensor
    num_top: tuple[int, ...]  # per row; -1: it did not ask


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step on the stream."""

    result: torch.Tensor  # hidden [T, hidden]; on the last stage ids int64 [S], or one 0 if S is 0
    request_rows_S: torch.Tensor  # int64: whose tokens the ids are
    logprobs: LogprobTensors | None = None
