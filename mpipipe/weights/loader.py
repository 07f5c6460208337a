"""A stage's weights: from the checkpoint into a module that was built on the meta device.

Purpose: account for every name, then read this stage's tensors in file order, convert them to the
run's type, or to 8 bits and a scale, and make them, one by one and in that order, the module's
parameters. The models package builds the module, chooses the layers and computes non-persistent
buffers (rotary tables).

Invariants: not a byte of a tensor is read before all names, shapes and types were found right;
foreign tensors are never read; afterwards nothing in the module's `state_dict` is on the meta
device; two names that resolve to one stored tensor share one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from mpipipe.checkpoint.index import CheckpointIndex
from mpipipe.checkpoint.quantization import read_quantization
from mpipipe.errors import CheckpointError
from mpipipe.types import Shard
from mpipipe.weights.destination import Destination, OnDevice
from mpipipe.weights.filling import PIECE_BYTES, Filling, TensorFiller
from mpipipe.weights.names import Part, Resolution, resolve_names
from mpipipe.weights.prequantized import QuantizedSource, Unpacking
from mpipipe.weights.quantize import Place, quantize_to, scale_name
from mpipipe.weights.readers import num_readers
from mpipipe.weights.sources import StoredTensor, TensorSource, open_source

__all__ = ["LoadReport", "load_stage", "open_tensors", "place"]

_FLOATS = frozenset({"float64", "float32", "bfloat16", "float16"})
_NAMES_SHOWN = 3
_NO_SHARDS: Mapping[str, Shard] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was read to load a stage, and what it holds."""

    bytes_read: int  # from disk, in the stored type
    parameter_bytes: int  # in memory, in the run's type; shared tensors once
    # The load's seconds that went into converting and moving to a GPU, not into reading. Both go on
    # at once: divided as the seconds of the threads are. 0 of what only torch can read.
    convert_s: float = 0.0
    warnings: tuple[str, ...] = ()  # what made it slower than it could be


def load_stage(
    module: torch.nn.Module,
    wanted: Mapping[str, str],
    index: CheckpointIndex,
    *,
    all_names: Collection[str],
    tied: Mapping[str, str] | None = None,
    to_canonical: Callable[[str], str] | None = None,
    dtype: torch.dtype,
    device: torch.device | Destination,
    shards: Mapping[str, Shard] = _NO_SHARDS,
) -> LoadReport:
    """Fill `module` with its tensors of the checkpoint.

    Args:
        module: built in `dtype` on the meta device; its parameters and persistent buffers are
            replaced. One that it keeps in another type (say a float32 scale) stays in that type.
        wanted: name in `module.state_dict()` -> canonical name (that of the full model).
        index: from `checkpoint.read_index`.
        all_names: canonical names of the full model's parameters and persistent buffers.
        tied: canonical name -> the canonical name it shares a tensor with, for tied embeddings.
        to_canonical: checkpoint name -> canonical name, for what no rule in `names` places.
        dtype: the run's; stored tensors are converted to the type of their place in `module`.
        device: where the tensors go; or what says it of each.
        shards: name in the module -> the part of the stored tensor that its tensor is; of all
            others it is the whole. No byte beyond the part is read, but of weights in 8 bits, whose
            layouts are unpacked first.

    Raises:
        CheckpointError: names, shapes or types do not fit (all of them are counted, the first few
            listed), or a file cannot be read.
    """
    tied = tied or {}
    destination = OnDevice(device) if isinstance(device, torch.device) else device
    assert set(wanted.values()) <= {*all_names, *tied}, "a stage wants unknown names"
    types = {tensor.dtype for tensor in module.state_dict(keep_vars=True).values()}
    assert dtype in types, f"the module was built for {types}, not for {dtype}"
    source = open_tensors(index)
    # torch computes with as many threads as the rank has cores.
    filler = TensorFiller(
        source,
        num_threads=num_readers(torch.get_num_threads()),
        device=destination.device,
    )
    try:
        resolution = resolve_names(all_names, source.names(), tied, to_canonical)
        _check_names(index, resolution)
        slots = _slots(module, wanted, resolution.parts, tied, shards)
        _fill(module, slots, index, filler, destination)
    finally:
        filler.close()
        source.close()
    _share_equal(module, wanted, tied)
    return LoadReport(
        bytes_read=filler.bytes_read,
        parameter_bytes=_prove_materialised(module),
        convert_s=filler.convert_s,
        warnings=tuple(filler.buffers.warnings),
    )


def _check_names(index: CheckpointIndex, resolution: Resolution) -> None:
    missing = _listed(resolution.missing, "missing")
    unexpected = _listed(resolution.unexpected, "not part of the model")
    _raise_if_any(index, [missing, unexpected])


def open_tensors(index: CheckpointIndex) -> TensorSource:
    """What the loader reads from: of a checkpoint in 8 bits a `QuantizedSource`."""
    quantization, source = read_quantization(index.folder), open_source(index)
    return source if quantization is None else QuantizedSource(source, quantization)


@dataclass(frozen=True, slots=True)
class _Slot:
    """One tensor to make, and all names of the module that shall be it."""

    names: tuple[str, ...]
    parts: tuple[Part, ...]
    meta: torch.Tensor
    scale: Place | None = None  # of a weight that is quantised when it is read
    # The weight in 8 bits, and its scale, that are made of it beside it.
    narrow_copy: tuple[Place, Place] | None = None
    unpacking: Unpacking | None = None  # of a weight that the file has quantised, or of its scale
    shard: Shard | None = None  # the part of the stored tensor; None: all of it
    copy_shard: Shard | None = None  # the same of `narrow_copy`

    @property
    def stored_shape(self) -> torch.Size:
        """Of the tensor that this one is a part of."""
        shape = self.meta.shape
        return shape if self.shard is None else torch.Size(self.shard.whole(shape))


def _slots(
    module: torch.nn.Module,
    wanted: Mapping[str, str],
    parts: Mapping[str, tuple[Part, ...]],
    tied: Mapping[str, str],
    shards: Mapping[str, Shard],
) -> list[_Slot]:
    state = module.state_dict(keep_vars=True)
    stray = sorted(wanted.keys() - state.keys())
    assert not stray, f"the stage's module has no {stray[:_NAMES_SHOWN]}"
    scales = {name: scale for name in state if (scale := scale_name(name, state))}
    made = set(scales.values())  # from the weights, not read
    names: dict[tuple[Part, ...], list[str]] = {}
    for name, canonical in wanted.items():
        names.setdefault(parts[canonical], []).append(name)
    # A name that was not asked for is tied to one that was, by the module or by the configuration.
    for name, tensor in state.items():
        if name not in wanted and name not in made:
            source = tied.get(name)
            twin = next((n for n, c in wanted.items() if state[n] is tensor or c == source), None)
            assert twin is not None, f"the stage holds {name}, which was not asked for"
            names[parts[wanted[twin]]].append(name)
    slots = []
    for key, found in names.items():
        narrow = [
            (Place((name,), state[name]), Place((scales[name],), state[scales[name]]))
            for name in found
            if name in scales
        ]
        plain = tuple(name for name in found if name not in scales)
        if not narrow:
            slots.append(_Slot(plain, key, state[plain[0]], shard=shards.get(plain[0])))
        elif not plain:
            ((own, its_scale),) = narrow
            shard = shards.get(own.names[0])
            slots.append(_Slot(own.names, key, own.like, its_scale, shard=shard))
        else:  # embedding and LM head
            shard = shards.get(narrow[0][0].names[0])
            slots.append(_Slot(plain, key, state[plain[0]], None, narrow[0], copy_shard=shard))
    return slots


def _as_stored(slot: _Slot, source: QuantizedSource) -> Iterator[_Slot]:
    """`slot`, or, where the file has its weight quantised, that weight and its scale."""
    scale = source.scale_of(slot.parts[0].source)
    if slot.scale is None or scale is None:
        yield slot
        return
    packed = Unpacking(source.quantization.packing)
    yield replace(slot, scale=None, unpacking=packed)
    # A scale belongs to a row: where the rows are whole, so are the scales.
    shard = slot.shard if slot.shard is not None and slot.shard.dim == 0 else None
    own = _Slot(slot.scale.names, (Part(scale),), slot.scale.like, unpacking=Unpacking(None))
    yield replace(own, shard=shard)


def _misfits(slots: Iterable[_Slot], stored: Mapping[str, StoredTensor]) -> list[str]:
    shapes, types = [], []
    for slot in slots:
        shapes += _wrong_shapes(slot, stored)
        for part in slot.parts:
            found = stored[part.source].dtype
            wanted = slot.unpacking.dtype(slot.meta.dtype) if slot.unpacking else slot.meta.dtype
            ours = str(wanted).removeprefix("torch.")
            convertible = found in _FLOATS and (ours in _FLOATS or slot.scale is not None)
            if not convertible and (found != ours or slot.scale is not None):
                types.append(f"{part.source} is {found}")
    return [
        _listed(shapes, "of another shape"),
        _listed(types, "of a type that cannot be run (quantised weights?)"),
    ]


def _wrong_shapes(slot: _Slot, stored: Mapping[str, StoredTensor]) -> list[str]:
    expected = tuple(slot.meta.shape)
    experts = {part.expert for part in slot.parts} - {None}
    if experts and len(experts) != expected[0]:
        return [f"{slot.names[0]} has {len(experts)} experts, expected {expected[0]}"]
    wrong = []
    for part in slot.parts:
        shape = stored[part.source].shape
        region = tuple(_region(slot.meta, part).shape)
        if slot.shard is not None:
            region = slot.shard.whole(region)
        if slot.unpacking is not None:
            region = slot.unpacking.shape(region, shape)
        if shape != region:
            wrong.append(f"{part.source} is {list(shape)}, expected {list(region)}")
    return wrong


def _fill(
    module: torch.nn.Module,
    slots: list[_Slot],
    index: CheckpointIndex,
    filler: TensorFiller,
    destination: Destination,
) -> None:
    """Read every slot, in the order of the files."""
    source = filler.source
    if isinstance(source, QuantizedSource):
        slots = [own for slot in slots for own in _as_stored(slot, source)]
    stored = {part.source: source.stored(part.source) for slot in slots for part in slot.parts}
    _raise_if_any(index, _misfits(slots, stored))
    ordered = sorted(slots, key=lambda slot: stored[slot.parts[0].source].order)
    fillings = (_filling(slot, stored, destination) for slot in ordered)
    for slot, filled in zip(ordered, filler.fill(fillings), strict=True):
        _check_range(slot, stored, filled.tensor)
        if slot.scale is not None:
            copied = Place(slot.names, slot.meta), slot.scale
            _place_narrow(module, filled.tensor, copied, destination)
            continue
        if slot.narrow_copy is not None:
            exact_OI = _part_of(filled.tensor, slot.copy_shard)
            _place_narrow(module, exact_OI, slot.narrow_copy, destination)
            tensor = filled.tensor
            if tensor.dtype != slot.meta.dtype:
                tensor = destination.empty(slot.names, slot.meta).copy_(tensor)
                _check_range(slot, stored, tensor)
            tensor = destination.keep(slot.names, tensor)
        elif slot.unpacking is not None:
            tensor = destination.empty(slot.names, slot.meta)
            whole = slot.unpacking.unpack(filled.tensor, slot.stored_shape)
            tensor.copy_(_part_of(whole, slot.shard))
            tensor = destination.keep(slot.names, tensor)
        else:
            tensor = destination.keep(slot.names, filled.tensor)
        place(module, slot.names, tensor, slot.meta)


def _part_of(tensor: torch.Tensor, shard: Shard | None) -> torch.Tensor:
    """`shard` of a whole stored tensor."""
    if shard is None:
        return tensor
    return tensor.narrow(shard.dim, *shard.bounds(tensor.shape[shard.dim]))


def _place_narrow(
    module: torch.nn.Module,
    exact_OI: torch.Tensor,
    places: tuple[Place, Place],
    destination: Destination,
) -> None:
    """A weight in 8 bits and its scale, made of `exact_OI`."""
    made = quantize_to(destination, exact_OI, *places)
    for tensor, found in zip(made, places, strict=True):
        place(module, found.names, tensor, found.like)


def _filling(slot: _Slot, stored: Mapping[str, StoredTensor], destination: Destination) -> Filling:
    """What becomes another tensor is read as it is in the file first, to the device."""
    first, shard = stored[slot.parts[0].source], slot.shard
    dtype = getattr(torch, first.dtype)
    # Of what the file holds, whether a stage has the embedding or the head made of it, or both.
    is_copied = slot.narrow_copy is not None and dtype != slot.meta.dtype
    if slot.scale is not None or is_copied:
        tensor = torch.empty(slot.meta.shape, dtype=dtype, device=destination.device)
    elif slot.unpacking is not None:
        dtype, shard = slot.unpacking.dtype(slot.meta.dtype), None
        tensor = torch.empty(first.shape, dtype=dtype, device=destination.device)
    else:
        tensor = destination.empty(slot.names, slot.meta)
    return Filling(tensor, [(part.source, _region(tensor, part)) for part in slot.parts], shard)


def _region(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """The view of `tensor` that `part` fills."""
    if part.expert is None:
        return tensor
    rows = tensor[part.expert]
    if part.half is None:
        return rows
    half = rows.shape[0] // 2
    return rows[part.half * half : (part.half + 1) * half]


def _check_range(slot: _Slot, stored: Mapping[str, StoredTensor], tensor: torch.Tensor) -> None:
    """float16 ends at 65,504: a larger weight became infinite on the way."""
    narrowed = {stored[part.source].dtype for part in slot.parts} - {"float16"}
    if tensor.dtype == torch.float16 and narrowed and _holds_infinity(tensor):
        raise CheckpointError(
            f"{slot.parts[0].source} holds values beyond float16 (65,504): choose "
            'model.dtype = "bfloat16" or "float32"'
        )


def _holds_infinity(tensor: torch.Tensor) -> bool:
    """Piece by piece: the answer for each element takes a byte."""
    flat, step = tensor.view(-1), PIECE_BYTES
    found = [torch.isinf(flat[i : i + step]).any() for i in range(0, flat.numel(), step)]
    return bool(found) and bool(torch.stack(found).any())


def place(
    module: torch.nn.Module, names: Iterable[str], tensor: torch.Tensor, like: torch.Tensor
) -> None:
    """Make `tensor` the parameter or buffer of all these names; `like`: what is there now."""
    if isinstance(like, torch.nn.Parameter):
        tensor = torch.nn.Parameter(tensor, requires_grad=False)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, tensor)


def _share_equal(
    module: torch.nn.Module, wanted: Mapping[str, str], tied: Mapping[str, str]
) -> None:
    """Tied weights that a `.bin` stores twice become one again, if they are equal.

    If they differ the checkpoint wins over `config.json` and both stay, as in transformers 5.
    """
    name_of = {canonical: name for name, canonical in wanted.items()}
    state = module.state_dict(keep_vars=True)
    for canonical, twin in tied.items():
        if canonical in name_of and twin in name_of:
            ours, theirs = state[name_of[canonical]], state[name_of[twin]]
            if ours is not theirs and ours.dtype == theirs.dtype and torch.equal(ours, theirs):
                owner, _, leaf = name_of[canonical].rpartition(".")
                setattr(module.get_submodule(owner), leaf, theirs)


def _prove_materialised(module: torch.nn.Module) -> int:
    """Bytes of the module's parameters and persistent buffers, each once."""
    state = module.state_dict(keep_vars=True)
    on_meta = [name for name, tensor in state.items() if tensor.device.type == "meta"]
    assert not on_meta, f"not loaded: {on_meta[:_NAMES_SHOWN]}"
    unique = {id(tensor): tensor for tensor in state.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def _listed(names: Collection[str], what: str) -> str:
    if not names:
        return ""
    shown = ", ".join(list(names)[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    return f"{len(names)} {what} ({shown})"


def _raise_if_any(index: CheckpointIndex, problems: Iterable[str]) -> None:
    found = "; ".join(problem for problem in problems if problem)
    if found:
        raise CheckpointError(
            f"the weights in {index.folder} do not fit its config.json: {found}; the files are of "
            "different models or versions, or a part of them was not copied"
        )
