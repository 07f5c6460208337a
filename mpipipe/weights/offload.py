"""The weights of one stage that do not stay on its device: stored while they are loaded, then
streamed.

Life: `open_offload` → as the loader's `Destination` → `start` → steps → `close`. The module's
tensors of streamed layers are views of the staging buffers from the beginning. Embedding and head
get stand-ins of no size, which are not to be used: rows are looked up, and the head computes block
by block (`models.streaming`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch

from mpipipe.metrics.offload import OffloadUse
from mpipipe.planning.memory import gib
from mpipipe.weights.cuda_carrier import CudaCarrier
from mpipipe.weights.layer_layout import GROUP_ALIGNMENT, Layout, Span, aligned_bytes
from mpipipe.weights.layer_store import HostRegion, OffloadFile, Region
from mpipipe.weights.pinned_memory import PinnedMemory, device_view
from mpipipe.weights.prefetch import Carrier, HostCarrier, Piece, Prefetcher, StreamedPart
from mpipipe.weights.readers import num_readers

if TYPE_CHECKING:
    from mpipipe.planning.plan import StageOffload
    from mpipipe.types import Tier

__all__ = ["OffloadedWeights", "StageTensors", "Streams", "open_offload"]

_ROWS = 64


@dataclass(frozen=True, slots=True)
class StageTensors:
    """The tensors of a stage's module, on the meta device, by their names in its `state_dict`."""

    layers: tuple[Mapping[str, torch.Tensor], ...]
    embedding: Mapping[str, torch.Tensor]  # empty: it is on another stage
    head: Mapping[str, torch.Tensor]
    first_layer: int  # the number of the first one in the model


@dataclass(frozen=True, slots=True)
class Streams:
    """What a stage computes with; the fields of `models.streaming.StreamedWeights`."""

    gates: Prefetcher | None  # None: nothing is streamed
    layers: frozenset[int]
    head_blocks: tuple[Mapping[str, torch.Tensor], ...]
    embedding_rows: Callable[[torch.Tensor], torch.Tensor] | None
    waits_on_host: bool


@dataclass(slots=True)
class _Stored:
    """A layer, the embedding or the head."""

    tier: Tier
    layout: Layout
    region: Region | None = None  # until its first tensor comes
    buffer: torch.Tensor | None = None  # where a layer is used


def open_offload(
    offload: StageOffload,
    tensors: StageTensors,
    device: torch.device,
    *,
    folder: str,
    name: str,
    use_graphs: bool,
) -> OffloadedWeights:
    """Buffers on `device`, and a file where weights go to the disk.

    Args:
        offload: what stands where.
        tensors: the stage's.
        device: of the stage.
        folder: for the file.
        name: what the file's name begins with.
        use_graphs: steps may be captured.

    Raises:
        EnvironmentSetupError: no file can be made in `folder`.
        torch.OutOfMemoryError: the device does not hold the buffers.
    """
    tiers: dict[int, Tier] = dict.fromkeys(offload.host_layers, "host")
    tiers.update(dict.fromkeys(offload.disk_layers, "disk"))
    num_bytes = max(Layout.of(layer).num_bytes for layer in tensors.layers)
    streams = bool(tiers) or offload.head != "device"
    buffers = [
        aligned_bytes(num_bytes, device) for _ in range(offload.num_buffers if streams else 0)
    ]
    layers: dict[int, _Stored] = {}
    for number, layer in enumerate(tensors.layers):
        tier = tiers.get(tensors.first_layer + number)
        if tier is not None:
            buffer = buffers[len(layers) % len(buffers)]
            layers[number] = _Stored(tier, Layout.of(layer), buffer=buffer)
    embedding = _stored(offload.embedding, tensors.embedding)
    head = _stored(offload.head, tensors.head)
    uses_disk = "disk" in {*tiers.values(), offload.embedding, offload.head}
    return OffloadedWeights(
        layers,
        embedding,
        head,
        buffers=buffers,
        file=_open_file(folder, name, device) if uses_disk else None,
        device=device,
        num_layers=len(tensors.layers),
        use_graphs=use_graphs,
    )


def _open_file(folder: str, name: str, device: torch.device) -> OffloadFile:
    # torch computes with as many threads as the rank has cores; on a CPU they are in use.
    num_cores = torch.get_num_threads()
    num_threads = max(1, num_cores // 4) if device.type == "cpu" else num_readers(num_cores)
    return OffloadFile.open(Path(folder), name, num_threads=num_threads)


def _stored(tier: Tier, tensors: Mapping[str, torch.Tensor]) -> _Stored | None:
    return None if tier == "device" or not tensors else _Stored(tier, Layout.of(tensors))


class OffloadedWeights:
    """See the module. A `Destination` while the stage is loaded."""

    def __init__(
        self,
        layers: Mapping[int, _Stored],
        embedding: _Stored | None,
        head: _Stored | None,
        *,
        buffers: Sequence[torch.Tensor],
        file: OffloadFile | None,
        device: torch.device,
        num_layers: int,
        use_graphs: bool,
    ) -> None:
        self._layers = layers
        self._embedding = embedding
        self._head = head
        self._buffers = buffers
        self._file = file
        self.device = device
        self._num_layers = num_layers
        self._use_graphs = use_graphs
        self._pinned = PinnedMemory(device)
        stored = [*layers.values(), embedding, head]
        self._place_of = {
            name: place for place in stored if place is not None for name in place.layout.spans
        }
        self._stands: dict[str, tuple[Region, int]] = {}  # by name, once it is loaded
        self._prefetcher: Prefetcher | None = None
        self._carrier: Carrier | None = None

    # ---- loading ---------------------------------------------------------------------------------

    def empty(self, names: Sequence[str], like: torch.Tensor) -> torch.Tensor:
        """See `Destination.empty`: in its place in host memory; else a tensor to write away."""
        found = self._find(names)
        if found is None:
            return torch.empty(like.shape, dtype=like.dtype, device=self.device)
        place, span = found
        region = self._region_of(place)
        if isinstance(region, HostRegion):
            return span.view(region.memory)
        return torch.empty(like.shape, dtype=like.dtype)

    def keep(self, names: Sequence[str], tensor: torch.Tensor) -> torch.Tensor:
        """See `Destination.keep`."""
        found = self._find(names)
        if found is None:
            return tensor
        place, span = found
        region = self._region_of(place)
        region.write(span.offset, tensor)
        self._stands.update(dict.fromkeys(names, (region, span.offset)))
        if place.buffer is not None:
            return span.view(place.buffer)
        if place is self._embedding and self._reaches(region):
            return span.view(device_view(region.memory, self.device))
        return tensor.new_zeros((), device=self.device).expand(tensor.shape)

    def _find(self, names: Sequence[str]) -> tuple[_Stored, Span] | None:
        """Where the tensor of these names stands; None: on the device.

        A head that is tied to the embedding stands where that does; on the device, if either does.
        """
        places = [(self._place_of.get(name), name) for name in names]
        if any(place is None for place, _ in places):
            return None
        place, name = next((p for p in places if p[0] is self._embedding), places[0])
        assert place is not None
        return place, place.layout.spans[name]

    def _region_of(self, place: _Stored) -> Region:
        if place.region is None:
            num_bytes = place.layout.num_bytes
            if place.tier == "disk":
                assert self._file is not None, "there is a file where something is on disk"
                place.region = self._file.reserve(num_bytes)
            else:
                place.region = HostRegion(self._pinned.take(num_bytes))
        return place.region

    def _reaches(self, region: Region) -> TypeGuard[HostRegion]:
        """Whether the GPU can read `region` over its link."""
        on_gpu = self.device.type == "cuda"
        return on_gpu and isinstance(region, HostRegion) and region.memory.is_pinned()

    # ---- streaming -------------------------------------------------------------------------------

    def start(self, head: Mapping[str, torch.Tensor]) -> Streams:
        """Begin to bring the first parts; the stage is loaded.

        `head`: of `StageTensors`.
        """
        parts = [
            StreamedPart(number, place % len(self._buffers), (_whole(stored),))
            for place, (number, stored) in enumerate(self._layers.items())
        ]
        blocks = self._add_head_blocks(parts, head)
        if parts:
            self._carrier = self._open_carrier(parts)
            self._prefetcher = Prefetcher(parts, self._carrier)
            self._prefetcher.start()
        return Streams(
            gates=self._prefetcher,
            layers=frozenset(self._layers),
            head_blocks=tuple(blocks),
            embedding_rows=self._embedding_rows(),
            waits_on_host=self._waits_on_host,
        )

    @property
    def _waits_on_host(self) -> bool:
        return self._file is not None or self._pinned.refused_bytes > 0

    def _open_carrier(self, parts: Sequence[StreamedPart]) -> Carrier:
        if self.device.type != "cuda":
            return HostCarrier(self._buffers)
        return CudaCarrier(
            self._buffers,
            self._pinned,
            from_disk=any(part.from_disk for part in parts),
            end_with_steps=self._use_graphs and not self._waits_on_host,
        )

    def _add_head_blocks(
        self, parts: list[StreamedPart], head: Mapping[str, torch.Tensor]
    ) -> list[Mapping[str, torch.Tensor]]:
        """Add the head's parts to `parts`; its tensors by block, by leaf of their names."""
        if not head or not all(name in self._stands for name in head):
            return []
        num_rows = next(iter(head.values())).shape[0]
        row_bytes = sum(tensor.nbytes // num_rows for tensor in head.values())
        size = _rows_per_block(self._buffers[0].numel(), row_bytes, len(head))
        blocks: list[Mapping[str, torch.Tensor]] = []
        for first in range(0, num_rows, size):
            layout = Layout.of({name: rows[first : first + size] for name, rows in head.items()})
            pieces = []
            for name, span in layout.spans.items():
                region, offset = self._stands[name]
                start = offset + first * head[name].nbytes // num_rows
                pieces.append(Piece(region, start, span.num_bytes, span.offset))
            buffer = len(parts) % len(self._buffers)
            parts.append(StreamedPart(self._num_layers + len(blocks), buffer, tuple(pieces)))
            views = layout.views(self._buffers[buffer])
            blocks.append({name.rpartition(".")[2]: view for name, view in views.items()})
        return blocks

    def _embedding_rows(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Looks rows up where the embedding stands; None: the device reaches it itself."""
        names = [] if self._embedding is None else list(self._embedding.layout.spans)
        if not names or names[0] not in self._stands:
            return None
        assert len(names) == 1, f"an embedding of {names} has no rows"
        region, offset = self._stands[names[0]]
        if self._reaches(region):
            return None
        span = self._place_of[names[0]].layout.spans[names[0]]
        return partial(_read_rows, region, offset, span)

    def use(self) -> OffloadUse:
        """What was streamed so far."""
        use = OffloadUse() if self._carrier is None else self._carrier.use()
        file = self._file
        return replace(
            use,
            bytes_per_step=0 if self._prefetcher is None else self._prefetcher.bytes_per_step,
            disk_bytes=file.read_bytes if file else 0,
            disk_bytes_per_s=file.read_bytes / file.read_s if file and file.read_s else None,
        )

    @property
    def spared_bytes(self) -> int:
        """Of the stage's weights that the device does not hold, less the staging buffers."""
        stored = {id(p.region): p.region for p in self._place_of.values() if p.region is not None}
        away = sum(region.num_bytes for region in stored.values())
        return away - sum(buffer.numel() for buffer in self._buffers)

    @property
    def warning(self) -> str:
        """What makes streaming slower than planned, as a sentence; empty: nothing."""
        if not self._pinned.refused_bytes:
            return ""
        return (
            f"{gib(self._pinned.refused_bytes)} of host memory for offloaded weights could not be "
            f"pinned ({self._pinned.reason}): copies to the GPU run at about a third of the link's "
            "rate, each holds up the rank, and there are no CUDA graphs; raise the limit of locked "
            "memory (ulimit -l) or lower memory.host_bytes"
        )

    def close(self) -> None:
        """Let go of threads, file and pinned memory. Idempotent.

        What a GPU may still read stays pinned: the process ends, with whatever never ended.
        """
        with ExitStack() as closing:  # all of it, whatever one of them raises
            pinned = closing.enter_context(ExitStack())
            pinned.callback(self._pinned.close)
            if self._file is not None:
                closing.callback(self._file.close)
            if self._carrier is not None and not self._carrier.close():
                pinned.pop_all()


def _whole(stored: _Stored) -> Piece:
    assert stored.region is not None, "all layers are loaded"
    return Piece(stored.region, 0, stored.layout.num_bytes, 0)


def _rows_per_block(buffer_bytes: int, row_bytes: int, num_tensors: int) -> int:
    """Rows of a head that a buffer of whole pages holds; a multiple of what kernels like."""
    num_rows = (buffer_bytes - GROUP_ALIGNMENT * num_tensors) // row_bytes
    assert num_rows > 0, f"a buffer of {buffer_bytes} bytes holds no row of the head"
    return num_rows // _ROWS * _ROWS or num_rows


def _read_rows(region: Region, offset: int, span: Span, ids: torch.Tensor) -> torch.Tensor:
    """Ids int64 [U] → [U, hidden], in host memory."""
    rows = torch.empty(len(ids), *span.shape[1:], dtype=span.dtype)
    row_bytes = span.num_bytes // span.shape[0]
    target = rows.view(-1).view(torch.uint8)
    for place, row in enumerate(ids.tolist()):
        out = target[place * row_bytes : (place + 1) * row_bytes]
        region.read_into(offset + row * row_bytes, out)
    return rows
