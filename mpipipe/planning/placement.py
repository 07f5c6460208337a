"""Where the weights of one stage stand: on its device, in host memory, on disk. Pure.

What does not fit the device is offloaded and comes to it once a step, ahead of its use
(`models.streaming`). In this order, each only as far as needed:

1. the embedding, whose few rows a step looks up where they stand, where that is the cheaper,
2. layers, which pass through staging buffers on the device,
3. the LM head, in blocks of rows through the same buffers.

Host memory is taken before the disk. Streamed layers are spread evenly between the resident ones,
and those on disk evenly among the streamed ones, so that link and disk are busy all the time.

Streamed layer number i uses buffer i modulo `num_buffers`, in every step, and the blocks of a
streamed head go on behind the last one. So there are more streamed layers than buffers, unless a
head uses the buffers, too: a layer with a buffer of its own would be a resident one. Where their
number is no multiple of `num_buffers`, the first layer of a step waits until the last one of the
step before it has left their common buffer: that exposes one layer's bringing or its compute, the
shorter of them. One layer more is streamed instead where the compute hides it. One buffer does
where two do not fit, or would drive layers to a slower place; then nothing overlaps.

`offload_search` decides for all stages together how much of a device the weights may take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.cost import (
    Ceilings,
    StepCost,
    dtype_bytes,
    head_decode_cost,
    layer_decode_cost,
    stage_weight_bytes,
)
from mpipipe.planning.links import LinkRates
from mpipipe.planning.plan import StageOffload, StepForecast
from mpipipe.types import Tier

__all__ = [
    "ModelParts",
    "PartBytes",
    "Placed",
    "StageChoice",
    "StageRoom",
    "StageShape",
    "StageSpeed",
    "StepWork",
    "forecast_step",
    "keeps_head",
    "least_device_bytes",
    "offload_of",
    "part_bytes",
    "place_stage",
    "spread",
    "staging_bytes",
]

_BUFFER_COUNTS = (2, 1)
_ONE_BUFFER_PENALTY = 1.1  # link and compute take turns, and each waits for the other to be told


@dataclass(frozen=True, slots=True)
class PartBytes:
    """What the parts of the model take, in the form in which stages hold them."""

    layer: int
    embedding: int
    head: int
    embedding_row: int
    positions: int  # the table of learned ones, on the device of the embedding's stage
    tied: bool  # embedding and head of one stage are one matrix, which stays on its device


@dataclass(frozen=True, slots=True)
class ModelParts:
    """The model in the dtype that it runs in."""

    spec: ModelSpec
    dtype: str
    parts: PartBytes


@dataclass(frozen=True, slots=True)
class StageShape:
    """Which part of the model a stage is, wherever its layers begin."""

    num_layers: int
    has_embedding: bool
    has_head: bool


@dataclass(frozen=True, slots=True)
class StageRoom:
    """What the weights of one stage may take."""

    device_bytes: int  # staging buffers included
    host_bytes: int  # for what is offloaded
    has_disk: bool
    pins_staging: bool = False  # of `host_bytes`, `staging_bytes` are for what comes from the disk


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes."""

    rows: int  # one token each
    context_tokens: float = 0.0  # in the cache, of each row's sequence
    rows_to_head: int | None = None  # None: all


@dataclass(frozen=True, slots=True)
class StageSpeed:
    """How fast a rank computes, and how fast weights come to its device."""

    ceilings: Ceilings
    rates: LinkRates


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the parts of a stage stand, in numbers; `offload_of` says which layers these are."""

    shape: StageShape
    device_bytes: int  # weights that stay, and staging buffers
    num_host_layers: int = 0
    num_disk_layers: int = 0
    embedding: Tier = "device"
    head: Tier = "device"
    num_buffers: int = 0
    host_bytes: int = 0  # of offloaded weights there
    disk_bytes: int = 0
    streamed_host_bytes: int = 0  # of these, what comes to the device in every step
    streamed_disk_bytes: int = 0

    @property
    def num_streamed(self) -> int:
        """Layers that do not stay on the device."""
        return self.num_host_layers + self.num_disk_layers

    @property
    def is_resident(self) -> bool:
        """All weights stay on the device."""
        return not (self.host_bytes or self.disk_bytes)


@dataclass(frozen=True, slots=True)
class StageChoice:
    """A placement, and what a full decode step then takes."""

    placed: Placed
    forecast: StepForecast
    num_kv_host_layers: int = 0  # whose cache is in host memory


def part_bytes(spec: ModelSpec, dtype: str) -> PartBytes:
    """The sizes of the parts, by the rule that `StagePlan.weight_bytes` follows."""

    def of(num_layers: int, *, has_embedding: bool, has_head: bool) -> int:
        return stage_weight_bytes(
            spec,
            dtype,
            num_layers=num_layers,
            has_embedding=has_embedding,
            has_head=has_head,
        )

    positions = spec.position_parameters * dtype_bytes(dtype)
    return PartBytes(
        layer=of(1, has_embedding=False, has_head=False),
        embedding=of(0, has_embedding=True, has_head=False) - positions,
        head=of(0, has_embedding=False, has_head=True),
        embedding_row=(spec.embedding_size or spec.hidden_size) * dtype_bytes(dtype),
        positions=positions,
        tied=spec.is_head_the_embedding,
    )


# ---- which parts stay ----------------------------------------------------------------------------


def place_stage(
    model: ModelParts, shape: StageShape, room: StageRoom, work: StepWork, speed: StageSpeed
) -> StageChoice | None:
    """The placement with the shortest step; None: none fits. All stays where all fits.

    Of equals the one with two buffers, then the one whose head, then whose embedding stays.
    """
    tried = [
        placed
        for rounds_up in (False, True)
        for num_buffers in _BUFFER_COUNTS
        for streams_head in (False, True)
        for embedding_stays in (True, False)
        if (
            placed := _placed(
                shape,
                model.parts,
                room,
                num_buffers=num_buffers,
                embedding_stays=embedding_stays,
                streams_head=streams_head,
                rounds_up=rounds_up,
            )
        )
    ]
    choices = [StageChoice(placed, forecast_step(model, placed, work, speed)) for placed in tried]
    resident = next((choice for choice in choices if choice.placed.is_resident), None)
    return resident or min(choices, key=_expected_s, default=None)


def _expected_s(choice: StageChoice) -> float:
    """A step's time; with a single buffer a step is likely to take longer than it is reckoned."""
    return choice.forecast.step_s * (_ONE_BUFFER_PENALTY if choice.placed.num_buffers == 1 else 1)


def _placed(
    shape: StageShape,
    parts: PartBytes,
    room: StageRoom,
    *,
    num_buffers: int,
    embedding_stays: bool,
    streams_head: bool,
    rounds_up: bool,
) -> Placed | None:
    """The one with as few streamed layers as can be; None: this choice is none, or does not fit.

    `rounds_up`: so few that with them each buffer is used equally often.
    """
    is_one_matrix = parts.tied and shape.has_embedding and shape.has_head
    if not embedding_stays and (not shape.has_embedding or is_one_matrix):
        return None
    if streams_head and (not shape.has_head or is_one_matrix):
        return None
    fixed = parts.embedding * (shape.has_embedding and embedding_stays and not is_one_matrix)
    fixed += parts.head * (shape.has_head and not streams_head)
    fixed += parts.positions * shape.has_embedding
    left = room.device_bytes - fixed
    if left >= shape.num_layers * parts.layer and not streams_head:
        if rounds_up:
            return None
        num_streamed, num_buffers = 0, 0
    else:
        too_many = shape.num_layers - (left // parts.layer - num_buffers)
        num_streamed = max(too_many, 0 if streams_head else num_buffers + 1)
        missing = -(num_streamed + streams_head * _head_blocks(parts)) % num_buffers
        if rounds_up and not missing:
            return None
        num_streamed += missing * rounds_up
        if num_streamed > shape.num_layers:
            return None
    num_resident = shape.num_layers - num_streamed
    placed = Placed(
        shape, fixed + (num_resident + num_buffers) * parts.layer, num_buffers=num_buffers
    )
    placed = replace(
        placed, num_disk_layers=num_streamed, head="disk" if streams_head else "device"
    )
    return _above_disk(placed, parts, room, embedding_stays=embedding_stays)


def _head_blocks(parts: PartBytes) -> int:
    """In so many blocks a streamed head passes through buffers as large as a layer."""
    return -(-parts.head // parts.layer)


def _above_disk(
    placed: Placed, parts: PartBytes, room: StageRoom, *, embedding_stays: bool
) -> Placed | None:
    """With what host memory takes of that on disk: the embedding, then layers, then the head.

    None: something is left, and there is no disk.
    """
    found = _shared_out(placed, parts, room.host_bytes, embedding_stays=embedding_stays)
    if found.streamed_disk_bytes and room.pins_staging:
        host_left = max(0, room.host_bytes - staging_bytes(parts))
        found = _shared_out(placed, parts, host_left, embedding_stays=embedding_stays)
    return None if found.disk_bytes and not room.has_disk else found


def staging_bytes(parts: PartBytes) -> int:
    """Pinned host memory between disk and GPU: one layer is read while another is copied."""
    return 2 * parts.layer


def _shared_out(
    placed: Placed, parts: PartBytes, host_left: int, *, embedding_stays: bool
) -> Placed:
    """`placed` with so many bytes of host memory for weights."""
    taken: dict[Tier, int] = {"host": 0, "disk": 0}
    embedding: Tier = "device"
    if not embedding_stays:
        embedding = "host" if parts.embedding <= host_left else "disk"
        taken[embedding] += parts.embedding
        host_left -= parts.embedding * (embedding == "host")
    num_streamed = placed.num_disk_layers
    num_host = min(num_streamed, host_left // parts.layer)
    host_left -= num_host * parts.layer
    streamed: dict[Tier, int] = {
        "host": num_host * parts.layer,
        "disk": (num_streamed - num_host) * parts.layer,
    }
    head = placed.head
    if head == "disk":
        head = "host" if parts.head <= host_left else "disk"
        streamed[head] += parts.head
    return replace(
        placed,
        num_host_layers=num_host,
        num_disk_layers=num_streamed - num_host,
        embedding=embedding,
        head=head,
        host_bytes=taken["host"] + streamed["host"],
        disk_bytes=taken["disk"] + streamed["disk"],
        streamed_host_bytes=streamed["host"],
        streamed_disk_bytes=streamed["disk"],
    )


def _exposed_s(placed: Placed, parts: PartBytes, compute_s: float, brought_s: float) -> float:
    """What is not hidden because the last part of a step and the first of the next share a buffer.

    Where bringing takes longer, nothing is brought while the last part computes; else the first
    part is waited for.
    """
    num_parts = placed.num_streamed + (placed.head != "device") * _head_blocks(parts)
    if placed.num_buffers < 2 or num_parts % placed.num_buffers == 0:
        return 0.0
    return min(brought_s / num_parts, compute_s / placed.shape.num_layers)


def _lookup_s(placed: Placed, parts: PartBytes, rates: LinkRates, rows: int) -> float:
    """Seconds to look `rows` up in an embedding that is not on the device."""
    match placed.embedding:
        case "device":
            return 0.0
        case "host":
            return rows * parts.embedding_row / rates.host_bytes_per_s
        case "disk":
            return rows / rates.disk_reads_per_s


def least_device_bytes(shape: StageShape, parts: PartBytes) -> int:
    """With less on the device a stage cannot run, however much may be offloaded."""
    positions = parts.positions * shape.has_embedding
    return parts.layer + positions + parts.head * keeps_head(shape, parts)


def keeps_head(shape: StageShape, parts: PartBytes) -> bool:
    """Whether the LM head stays on the device whatever is offloaded: it is the embedding too."""
    return parts.tied and shape.has_embedding and shape.has_head


def offload_of(choice: StageChoice, first_layer: int) -> StageOffload | None:
    """Which layers of a stage that begins at `first_layer` stand where; None: all on the device."""
    placed = choice.placed
    if placed.is_resident:
        return None
    streamed = spread(placed.num_streamed, range(placed.shape.num_layers))
    on_disk = set(spread(placed.num_disk_layers, streamed))
    return StageOffload(
        host_layers=tuple(first_layer + layer for layer in streamed if layer not in on_disk),
        disk_layers=tuple(first_layer + layer for layer in sorted(on_disk)),
        embedding=placed.embedding,
        head=placed.head,
        num_buffers=placed.num_buffers,
        device_bytes=placed.device_bytes,
        host_bytes=placed.host_bytes,
        disk_bytes=placed.disk_bytes,
        forecast=choice.forecast,
    )


def spread(count: int, places: range | list[int]) -> list[int]:
    """`count` of `places`, at equal distances, the last one among them."""
    total = len(places)
    return [
        place
        for number, place in enumerate(places)
        if (number + 1) * count // total > number * count // total
    ]


# ---- how long a step takes ----------------------------------------------------------------------


def forecast_step(
    model: ModelParts, placed: Placed, work: StepWork, speed: StageSpeed
) -> StepForecast:
    """What a step of the stage brings to its device, and how long that and its compute take."""
    shape, spec, dtype, rates = placed.shape, model.spec, model.dtype, speed.rates
    layer = layer_decode_cost(
        spec, dtype, num_sequences=work.rows, context_tokens=work.context_tokens
    )
    rows_to_head = work.rows if work.rows_to_head is None else work.rows_to_head
    head = head_decode_cost(spec, dtype, num_sequences=rows_to_head)
    compute = StepCost(
        shape.num_layers * layer.bytes_moved + shape.has_head * head.bytes_moved,
        shape.num_layers * layer.flops + shape.has_head * head.flops,
    )
    streamed = placed.streamed_host_bytes + placed.streamed_disk_bytes
    compute_s = compute.seconds(speed.ceilings)
    link_s = streamed / rates.host_bytes_per_s
    disk_s = placed.streamed_disk_bytes / rates.disk_bytes_per_s
    return StepForecast(
        rows=work.rows,
        host_bytes=placed.streamed_host_bytes,
        disk_bytes=placed.streamed_disk_bytes,
        compute_s=compute_s,
        link_s=link_s,
        disk_s=disk_s,
        exposed_s=_exposed_s(placed, model.parts, compute_s, max(link_s, disk_s)),
        lookup_s=_lookup_s(placed, model.parts, rates, work.rows),
        overlaps=placed.num_buffers != 1,
        host_bytes_per_s=rates.host_bytes_per_s,
        disk_bytes_per_s=rates.disk_bytes_per_s,
    )
