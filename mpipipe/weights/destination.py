"""Where the tensors of a stage go while they are read or drawn: onto its device, or elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

__all__ = ["Destination", "OnDevice"]


class Destination(Protocol):
    """Gives memory for the tensors of a module, one by one, and takes them when they are filled."""

    @property
    def device(self) -> torch.device:
        """Of what does not go elsewhere."""
        ...

    def empty(self, names: Sequence[str], like: torch.Tensor) -> torch.Tensor:
        """Memory to fill, of the shape and type of `like`, for the tensor with these names.

        Args:
            names: in the module's `state_dict`; several where they share the tensor.
            like: the module's tensor so far, on the meta device.
        """
        ...

    def keep(self, names: Sequence[str], tensor: torch.Tensor) -> torch.Tensor:
        """Takes what `empty` gave for these names, filled; returns the module's own tensor.

        Raises:
            EnvironmentSetupError: the place where it shall stay is full, or cannot be written.
        """
        ...


class OnDevice:
    """All tensors stay on one device, where they are filled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, names: Sequence[str], like: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """See `Destination.empty`."""
        return torch.empty(like.shape, dtype=like.dtype, device=self.device)

    def keep(self, names: Sequence[str], tensor: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """See `Destination.keep`."""
        return tensor
