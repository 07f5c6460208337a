"""Rotary embeddings whose frequencies depend on how long a sequence is: `longrope` and `dynamic`.

In transformers they follow the longest position of a forward pass. `generate` with one prompt
computes the prompt in one pass, so all its tokens see its length; then one token per pass, which
sees the length up to itself. So a token at position p sees max(R, p + 1) tokens, where R is the
length of the pass that began the sequence (`RequestOpened.rotary_len`). A stage computes
chunks of prompts, and many sequences in one step. `LengthRotary` gives every token the frequencies
of the length that it would see alone.

A decoded token always sees p + 1. So decode steps need nothing but positions, also in CUDA graphs.

`generate` of some families starts over when a sequence outgrows its original context
(`checkpoint.families`); there the scheduler starts the sequence over, with another R.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpipipe.models.families import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mpipipe.models.attention_bridge import ForwardContext

__all__ = ["LengthRotary", "settle_rotary"]

# Their frequencies are fixed when the model is made.
_FIXED = frozenset({"default", "linear", "yarn", "llama3", "proportional"})


@dataclass(frozen=True, slots=True)
class _Frequencies:
    """The inverse frequencies of one rotary embedding, by the length that a token sees."""

    buffer: str  # the module's name for them
    rows_RF: torch.Tensor  # float32; row r serves the length first + r, the last also all longer
    first: int  # row 0 also serves all shorter lengths


class LengthRotary(nn.Module):
    """Stands in for a family's rotary module; its own forward computes cosine and sine."""

    def __init__(
        self,
        original: nn.Module,
        context: ForwardContext,
        frequencies: Mapping[str | None, _Frequencies],
    ) -> None:
        super().__init__()
        self.original = original  # with fixed frequencies now
        self._context = context
        self._frequencies = dict(frequencies)  # by layer type, where the family has several

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of `position_ids` [1, T], in the dtype of `x`: two [1, T, …]."""
        keywords = {} if layer_type is None else {"layer_type": layer_type}
        found = self._frequencies.get(layer_type)
        if found is None:
            fixed: tuple[torch.Tensor, torch.Tensor] = self.original(x, position_ids, **keywords)
            return fixed
        positions_T = position_ids[0]
        layout = self._context.layout
        lens_T = None if layout is None else layout.rotary_lens_T
        rows_T = (positions_T + 1 if lens_T is None else lens_T) - found.first
        rows_T = rows_T.clamp(0, len(found.rows_RF) - 1)

        from torch.func import functional_call, vmap

        def rotate(frequencies_F: torch.Tensor, positions: torch.Tensor) -> Any:
            buffers = {found.buffer: frequencies_F}
            return functional_call(self.original, buffers, (x, positions), keywords)

        # Only where the host knows the step: a decode program has no branch on values.
        on_host = layout is not None and layout.seq_lens and rows_T.device.type == "cpu"
        if on_host and bool((rows_T == rows_T[0]).all()):  # a third of the time
            same: tuple[torch.Tensor, torch.Tensor] = rotate(found.rows_RF[rows_T[0]], position_ids)
            return same
        cos_T11D, sin_T11D = vmap(rotate)(found.rows_RF[rows_T], positions_T[:, None, None])
        return cos_T11D[:, 0, 0][None], sin_T11D[:, 0, 0][None]


def settle_rotary(base: PreTrainedModel, context: ForwardContext, max_positions: int) -> bool:
    """Make every rotary embedding independent of what else is in a step.

    Args:
        base: the stage's base model, its buffers filled.
        context: knows the layout of the current step.
        max_positions: no sequence of the run grows longer.

    Returns:
        Whether frequencies depend on the length, so that layouts need `rotary_lens_T`.

    Raises:
        UnsupportedModelError: the rotary embedding is of a kind that is not known here.
    """
    settled: dict[nn.Module, LengthRotary] = {}
    for module in list(base.modules()):
        frequencies = _settle(module, base.config.model_type, max_positions)
        if frequencies:
            settled[module] = LengthRotary(module, context, frequencies)
    for parent in list(base.modules()):
        if not isinstance(parent, LengthRotary):
            for name, child in list(parent.named_children()):
                if child in settled:
                    setattr(parent, name, settled[child])
    return bool(settled)


def _settle(
    module: nn.Module, model_type: str, max_positions: int
) -> dict[str | None, _Frequencies]:
    """The frequencies that depend on the length, by layer type; `module` keeps fixed ones."""
    attributes = vars(module)
    kinds = attributes.get("rope_type")
    if not isinstance(kinds, str | dict):
        return {}
    by_type: dict[str | None, str] = {None: kinds} if isinstance(kinds, str) else {**kinds}
    frequencies: dict[str | None, _Frequencies] = {}
    for layer_type, kind in by_type.items():
        if kind == "longrope":
            frequencies[layer_type] = _longrope(module, layer_type)
        elif kind == "dynamic":
            frequencies[layer_type] = _dynamic(module, layer_type, max_positions)
        elif kind not in _FIXED:
            raise refuse(model_type, f'has a rotary embedding of the unknown kind "{kind}"')
    # Any other name than its own keeps transformers from changing the frequencies.
    fixed = {name: "default" if name in frequencies else kind for name, kind in by_type.items()}
    attributes["rope_type"] = fixed[None] if isinstance(kinds, str) else fixed
    return frequencies


def _longrope(module: nn.Module, layer_type: str | None) -> _Frequencies:
    """The short factors up to the original context, the long ones beyond."""
    config = vars(module)["config"]
    parameters = config.rope_parameters
    first = int(
        (parameters if layer_type is None else parameters[layer_type])[
            "original_max_position_embeddings"
        ]
    )
    name, short_F = _buffer(module, layer_type)
    long_F = _compute(module, "longrope", first + 1, layer_type)
    return _Frequencies(name, torch.stack((short_F, long_F.to(short_F))), first)


def _dynamic(module: nn.Module, layer_type: str | None, max_positions: int) -> _Frequencies:
    """The original frequencies up to the original context, then others for every length."""
    first = int(vars(module)["original_max_seq_len"])
    name, original_F = _buffer(module, layer_type)
    lens_N1 = torch.arange(first + 1, max(first, max_positions) + 1, device=original_F.device)
    rows_NF = original_F.new_empty(0, len(original_F))
    if len(lens_N1):
        rows_NF = _compute(module, "dynamic", lens_N1[:, None], layer_type)
    return _Frequencies(name, torch.cat((original_F[None], rows_NF.to(original_F))), first)


def _buffer(module: nn.Module, layer_type: str | None) -> tuple[str, torch.Tensor]:
    """Name and values of the module's frequencies before any step: those of short sequences."""
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    return name, module.get_buffer(name).clone()


def _compute(
    module: nn.Module, kind: str, seq_len: int | torch.Tensor, layer_type: str | None
) -> torch.Tensor:
    """By the formula of transformers; `seq_len` [N, 1] gives frequencies [N, F]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = vars(module)["config"]
    device = next(module.buffers()).device
    compute: Any = ROPE_INIT_FUNCTIONS[kind]
    frequencies: torch.Tensor = compute(config, device, seq_len=seq_len, layer_type=layer_type)[0]
    return frequencies
