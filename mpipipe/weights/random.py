"""Random weights of a stage, for benchmarks of shapes whose checkpoint is not at hand.

Every parameter is drawn by a generator of its own, seeded with its name in the full model: a model
has the same weights however it is split over stages (on one kind of device; a GPU draws other
numbers than a CPU). The text of such a model means nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from mpipipe.types import Shard
from mpipipe.weights.destination import Destination, OnDevice
from mpipipe.weights.loader import LoadReport, place
from mpipipe.weights.quantize import Place, quantize_to, scale_name

__all__ = ["fill_random"]

_DEVIATION = 0.02  # what most families are initialised with


def fill_random(
    module: torch.nn.Module,
    wanted: Mapping[str, str],
    *,
    tied: Mapping[str, str] | None = None,
    dtype: torch.dtype,
    device: torch.device,
    destination: Destination | None = None,
    seed: int = 0,
    shards: Mapping[str, Shard] | None = None,
) -> LoadReport:
    """Fill `module`: matrices from N(0, 0.02), norm weights 1, biases 0.

    Args:
        module: built in `dtype` on the meta device; its parameters and persistent buffers are
            replaced. One that it keeps in another type stays in that type; a weight in 8 bits and
            its scale are made of what is drawn in `dtype`.
        wanted: name in `module.state_dict()` → canonical name (that of the full model).
        tied: canonical name → the canonical name it shares a tensor with.
        dtype: the run's.
        device: where the tensors are drawn and stay.
        destination: where they stay instead, tensor by tensor.
        seed: other seeds give other weights.
        shards: name in the module → the part that its tensor is of the one that is drawn.
    """
    tied, shards = tied or {}, shards or {}
    state = module.state_dict(keep_vars=True)
    assert dtype in {tensor.dtype for tensor in state.values()}, f"not built for {dtype}"
    names: dict[str, list[str]] = {}
    for name, canonical in wanted.items():
        names.setdefault(tied.get(canonical, canonical), []).append(name)
    num_bytes = 0
    for canonical, sharing in names.items():
        scales = {name: scale for name in sharing if (scale := scale_name(name, state))}
        shell, shard = state[sharing[0]], shards.get(sharing[0])
        shape = shell.shape if shard is None else torch.Size(shard.whole(shell.shape))
        drawn = _drawn(canonical, shape, dtype if scales else shell.dtype, device, seed)
        for name, scale in scales.items():
            places = Place((name,), state[name]), Place((scale,), state[scale])
            exact = _part_of(drawn, shards.get(name))
            made = quantize_to(destination or OnDevice(device), exact, *places)
            for found, tensor in zip(places, made, strict=True):
                place(module, found.names, tensor, found.like)
                num_bytes += found.like.nbytes
        plain = [name for name in sharing if name not in scales]
        if plain:
            shell, drawn = state[plain[0]], _part_of(drawn, shards.get(plain[0]))
            if destination is not None:
                drawn = destination.keep(plain, destination.empty(plain, shell).copy_(drawn))
            place(module, plain, drawn, shell)
            num_bytes += shell.nbytes
    return LoadReport(bytes_read=0, parameter_bytes=num_bytes)


def _part_of(drawn: torch.Tensor, shard: Shard | None) -> torch.Tensor:
    if shard is None:
        return drawn
    first, length = shard.bounds(drawn.shape[shard.dim])
    return drawn.narrow(shard.dim, first, length).contiguous()


def _drawn(
    name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device, seed: int
) -> torch.Tensor:
    """The tensor called `name` in the full model."""
    tensor = torch.zeros(shape, dtype=dtype, device=device)
    leaf = name.rpartition(".")[2]
    if tensor.is_floating_point() and "bias" not in leaf:
        if tensor.dim() <= 1:
            tensor.fill_(1.0)
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7]))
            tensor.normal_(0.0, _DEVIATION, generator=generator)
    return tensor
