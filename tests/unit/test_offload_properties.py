"""What holds of every placement: budgets, completeness, order, and that more room never hurts."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import Config, MemoryConfig
from mpipipe.errors import PlanError
from mpipipe.planning.cost import Ceilings, kv_page_bytes, stage_weight_bytes
from mpipipe.planning.links import LinkRates
from mpipipe.planning.placement import (
    ModelParts,
    StageChoice,
    StageRoom,
    StageShape,
    StageSpeed,
    StepWork,
    offload_of,
    part_bytes,
    place_stage,
)
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.resources import RankResources
from mpipipe.planning.workload import Workload
from mpipipe.topology.gpu import GpuFacts
from tests.unit.model_specs import OPENLLAMA_7B
from tests.unit.planned_rank import GIB, make_rank

MIB = 2**20

SPEC = replace(
    OPENLLAMA_7B,
    num_layers=24,
    hidden_size=2048,
    intermediate_size=5504,
    num_heads=16,
    num_kv_heads=16,
)
SPEED = StageSpeed(Ceilings(3e12, 6e14), LinkRates(11e9, 1e9))

specs = st.builds(
    lambda tied, vocab, layers: replace(
        SPEC, tied_embeddings=tied, vocab_size=vocab, num_layers=layers
    ),
    st.booleans(),
    st.sampled_from([1000, 32000, 256000]),
    st.integers(1, 40),
)
shapes = st.tuples(st.booleans(), st.booleans())
sizes = st.integers(0, 6 * GIB)


def placed(
    spec: ModelSpec, ends: tuple[bool, bool], room: StageRoom, rows: int = 32
) -> StageChoice | None:
    model = ModelParts(spec, "float16", part_bytes(spec, "float16"))
    shape = StageShape(spec.num_layers, *ends)
    return place_stage(model, shape, room, StepWork(rows, 300.0), SPEED)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(specs, shapes, sizes, sizes, st.booleans(), st.integers(1, 512), st.booleans())
def test_a_stage_keeps_to_its_room_and_places_every_layer_once(
    spec: ModelSpec,
    ends: tuple[bool, bool],
    device: int,
    host: int,
    disk: bool,
    rows: int,
    pins: bool,
) -> None:
    room = StageRoom(device, host, disk, pins)
    choice = placed(spec, ends, room, rows)
    if choice is None:
        return
    assert placed(spec, ends, room, rows) == choice
    found = choice.placed
    assert found.device_bytes <= device
    stages_disk = pins and found.streamed_disk_bytes > 0
    layer_bytes = part_bytes(spec, "float16").layer
    assert found.host_bytes <= max(0, host - 2 * layer_bytes * stages_disk)
    assert disk or not found.disk_bytes
    offload = offload_of(choice, 7)
    if offload is None:
        assert found.device_bytes == stage_weight_bytes(
            spec, "float16", num_layers=spec.num_layers, has_embedding=ends[0], has_head=ends[1]
        )
        return
    streamed = [*offload.host_layers, *offload.disk_layers]
    assert len(set(streamed)) == len(streamed) == found.num_streamed
    assert set(streamed) <= set(range(7, 7 + spec.num_layers))
    assert not streamed or offload.head != "device" or len(streamed) > offload.num_buffers
    # What stays, what is on the host and what is on disk are all of the stage, but for buffers.
    parts = part_bytes(spec, "float16")
    total = found.device_bytes + found.host_bytes + found.disk_bytes
    assert total - found.num_buffers * parts.layer == stage_weight_bytes(
        spec, "float16", num_layers=spec.num_layers, has_embedding=ends[0], has_head=ends[1]
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(specs, shapes, sizes, sizes, sizes, st.booleans())
def test_more_room_makes_no_step_longer(
    spec: ModelSpec, ends: tuple[bool, bool], device: int, host: int, more: int, disk: bool
) -> None:
    """Up to what a single buffer is held to be worse than it is reckoned."""
    before = placed(spec, ends, StageRoom(device, host, disk))
    if before is None:
        return
    for room in (StageRoom(device + more, host, disk), StageRoom(device, host + more, disk)):
        after = placed(spec, ends, room)
        assert after is not None
        slack = 1.1 if after.placed.num_buffers != before.placed.num_buffers else 1.0
        assert after.forecast.step_s <= before.forecast.step_s * slack + 1e-12


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(3, 40), sizes, sizes, st.sampled_from(["host", "disk"]))
def test_more_device_bytes_never_stream_more(
    layers: int, device: int, more: int, tier: str
) -> None:
    spec = replace(SPEC, num_layers=layers)
    host = 64 * GIB if tier == "host" else 0

    def streamed(num_bytes: int) -> int | None:
        choice = placed(spec, (False, False), StageRoom(num_bytes, host, tier == "disk"))
        return None if choice is None else choice.placed.num_streamed

    before, after = streamed(device), streamed(device + more)
    if before is not None:
        assert after is not None
        assert after <= before


# ---- whole plans ---------------------------------------------------------------------------------


def gpu(rank: int, free_bytes: int, memory: int) -> RankResources:
    return make_rank(
        rank,
        f"node{rank}",
        memory_available_bytes=memory,
        gpu=GpuFacts(
            index=0,
            name="Tesla T4",
            uuid=f"GPU-{rank}",
            capability=75,
            free_bytes=free_bytes,
            nccl_version="2.28.9",
            link_generation=3,
            link_width=16,
        ),
        attention_backends=("triton", "sdpa", "reference"),
    )


def planned(
    world: list[RankResources], memory: MemoryConfig, requests: int, spec: ModelSpec = SPEC
) -> PipelinePlan | None:
    workload = Workload(
        num_requests=requests,
        longest_request_tokens=160,
        num_prompt_tokens=requests * 128,
        num_output_tokens=requests * 32,
    )
    try:
        return make_plan(Config(memory=memory), spec, world, "/models/m", workload)
    except PlanError:
        return None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=3),
    st.integers(0, 4),
    st.booleans(),
    st.integers(1, 600),
)
def test_a_plan_keeps_to_every_budget_and_holds_every_layer_once(
    device_gib: list[int], host_gib: int, disk: bool, requests: int
) -> None:
    world = [gpu(rank, free * GIB, 8 * GIB) for rank, free in enumerate(device_gib)]
    memory = MemoryConfig(host_bytes=host_gib * GIB, offload_dir="/disk" if disk else "")
    made = planned(world, memory, requests)
    if made is None:
        return
    assert planned(world[::-1], memory, requests) == made
    assert [s.first_layer for s in made.stages[1:]] == [s.last_layer for s in made.stages[:-1]]
    assert (made.stages[0].first_layer, made.stages[-1].last_layer) == (0, SPEC.num_layers)
    assert made.max_tokens_per_step >= made.max_sequences_per_slot
    pinned = 0
    for stage, free in zip(made.stages, device_gib, strict=True):
        layer_page = kv_page_bytes(
            SPEC, made.dtype, num_layers=1, page_size_tokens=16, row_multiple=8
        )
        page = stage.num_kv_device_layers * layer_page
        in_host = stage.num_layers - stage.num_kv_device_layers
        pinned += (made.num_kv_pages + 1) * in_host * layer_page
        pinned += made.num_host_pages * page
        held = stage.weight_bytes if stage.offload is None else stage.offload.device_bytes
        assert held + (made.num_kv_pages + 1) * page < free * GIB * 0.9
        if stage.offload is not None:
            pinned += stage.offload.host_bytes
            assert stage.offload.host_bytes <= host_gib * GIB
            assert disk or not stage.offload.disk_bytes
            assert set(stage.offload.host_layers + stage.offload.disk_layers) <= set(
                range(stage.first_layer, stage.last_layer)
            )
    assert pinned <= 8 * GIB
    assert PipelinePlan.from_json(made.to_json()) == made


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1500, 5000), st.integers(1, 4000), st.integers(1, 400))
def test_a_plan_for_more_device_bytes_is_no_slower(mib: int, more: int, requests: int) -> None:
    """By its own prediction, for the requests at once that the smaller one had."""
    world = [gpu(0, 15 * GIB, 32 * GIB)]

    def rows_per_s(num_mib: int) -> float | None:
        made = planned(world, MemoryConfig(device_bytes=num_mib * MIB), requests)
        if made is None:
            return None
        offload = made.stages[0].offload
        if offload is None:
            return float("inf")
        return offload.forecast.rows / offload.forecast.step_s

    before, after = rows_per_s(mib), rows_per_s(mib + more)
    if before is not None:
        assert after is not None
        assert after >= before * 0.9
